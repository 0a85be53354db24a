"""Whether a model can be given a dataset's images, and how many of them may be bad."""

from collections.abc import Iterable, Mapping
from math import ceil

from saefty.errors import InputError, MismatchError
from saefty.models.base import ModelAdapter
from saefty.reading_settings import ReadingSection
from saefty.records import Example

SHOWN = 3
ROUNDING = 1e-9  # 0.29 * 100 is less than 29


def check_reads_images(model: ModelAdapter, examples: Iterable[Example]) -> None:
    """Refuse images for a model of texts, which would be given their prompts alone.

    Raises:
        MismatchError: If an example has an image and the model does not read images.
    """
    if model.reads_images:
        return
    first = next((example for example in examples if example.image is not None), None)
    if first is not None:
        raise MismatchError(
            f"example {first.id} has an image, but {model.name} reads texts only: its answer would "
            "be about the prompt without the image.",
            then="Set model.name to a vision-language model, or leave data.image out to read the "
            "prompts alone.",
        )


def check_bad_images(bad: Mapping[str, str], images: int, section: ReadingSection) -> None:
    """Refuse a dataset too many of whose images cannot be read.

    Args:
        bad: Why an image cannot be read, by the example's id.
        images: Examples with an image.
        section: How they are read.

    Raises:
        InputError: If their share is above `max_bad_images`.
    """
    allowed = section.max_bad_images
    if len(bad) <= allowed * images + ROUNDING:
        return
    shown = "; ".join(f"example {name}: {reason}" for name, reason in list(bad.items())[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    share = len(bad) / images
    enough = ceil(1e4 * share) / 1e4  # rounded up, so that it does let them pass
    raise InputError(
        f"{len(bad)} of {images} images cannot be read ({share:.2%}), more than "
        f"{section.SECTION}.max_bad_images={allowed:g} allows: {shown}{more}.",
        then="Put the files right or take the rows out (saefty data show counts the reasons), or "
        f"set {section.SECTION}.max_bad_images={enough:g} to leave these examples out.",
    )
