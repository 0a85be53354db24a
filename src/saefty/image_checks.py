"""Whether a model can be given a dataset's images, whether they are the same, how many are bad."""

import logging
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

from saefty.errors import InputError, MismatchError
from saefty.images import digest_or_none
from saefty.models.base import OF_TEXT, ModelAdapter
from saefty.reading_settings import ReadingSection
from saefty.records import Example

log = logging.getLogger(__name__)

SHOWN = 3
ROUNDING = 1e-9  # 0.29 * 100 is less than 29
MEND_TEXT = (
    "Write the image's marker once, where the image belongs, or leave it out of the text (it is "
    "then put before the prompt), and out of texts without an image."
)


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
            then="Set model.name to a vision-language model, or leave data.image out, where it is "
            "set, to read the prompts alone.",
        )


def check_same_images(records: Iterable[Mapping[str, Any]]) -> None:
    """Refuse examples of an earlier run whose images have changed since, or are gone.

    What is read of them now would stand beside what was read of other pictures.

    Args:
        records: Of an example table; those that were left out may be what they like.

    Raises:
        MismatchError: If one has another checksum than the table says.
    """
    changed = [
        record
        for record in records
        if record.get("image_hash") is not None
        and record["status"] == "ok"
        and digest_or_none(record["image"]) != record["image_hash"]
    ]
    if changed:
        shown = "; ".join(f"{one['example_id']}: {one['image']}" for one in changed[:SHOWN])
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise MismatchError(
            f"{len(changed)} examples have other images than when they were read, or none: "
            f"{shown}{more}.",
            then="Put the files back where they were, or extract again.",
        )


def tell_of_texts(texts: int, examples: int, section: ReadingSection) -> None:
    """Warn where δ of texts stands beside δ of images with texts, which is another thing.

    Contrasts of an image alone leave texts out.

    Args:
        texts: Examples without an image that are read.
        examples: All that are read.
        section: How they are read.
    """
    if section.contrast.method != "zero_attention" or not 0 < texts < examples:
        return
    behind = ", a mean over all their text instead of that behind an image"
    log.warning(
        "%d of %d examples have no image: their δ of zero_attention is what their words give each "
        "other%s. Leave these rows out, or read the image's share (%s.contrast.method=knockout or "
        "cross_attention), of which they have none: then they are left out and counted as no_image",
        texts, examples, behind if section.pooling.name == "text_only_mean" else "",
        section.SECTION,
    )  # fmt: skip


def check_bad_images(bad: Mapping[str, str], images: int, section: ReadingSection) -> None:
    """Refuse a dataset too many of whose images cannot be read, or do not fit their texts.

    Args:
        bad: Why an image cannot be read or does not fit, by the example's id.
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
    of_text = sum(reason.startswith(OF_TEXT) for reason in bad.values())
    what = "cannot be read"
    mend = "Put the files right or take the rows out (saefty data show counts the reasons)"
    if of_text:
        every = of_text == len(bad)
        some = "" if every else f"{what} or ({of_text} of them) "
        what = f"{some}do not fit their texts"
        first = "The files may be fine." if every else f"{mend}."
        mend = f"{first} {MEND_TEXT} Or take those rows out"
    raise InputError(
        f"{len(bad)} of {images} images {what} ({share:.2%}), more than "
        f"{section.SECTION}.max_bad_images={allowed:g} allows: {shown}{more}.",
        then=f"{mend}, or set {section.SECTION}.max_bad_images={enough:g} to leave these examples "
        "out.",
    )
