"""What a vision-language checkpoint's own processor makes of an image: its tokens and its pixels.

Processors that also read videos need torchvision for them, and refuse to be made without it. No
video is read here, so without torchvision they are made without that part; images are then resized
by Pillow. With torchvision, transformers chooses.
"""

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING,
    processor_class_from_name,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from saefty.errors import InputError, MismatchError
from saefty.models.checkpoint import CHECK_NAME, ModelSection, local_folder, unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEO = "video_processor"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
SIZES_KEPT = 4096
"""Image sizes whose tokens are remembered."""


def load_processor(section: ModelSection, config: Any) -> Any:
    """Return the checkpoint's own processor: its tokenizer, and how it prepares images.

    Args:
        section: Which checkpoint.
        config: Its transformers configuration.

    Raises:
        InputError: If it has none that can be read.
        MismatchError: If it is of a kind that does not say which tokens stand for an image.
    """
    folder = local_folder(section.name)
    if folder is not None and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise InputError(
            f"the model folder {section.name} does not say how images are prepared: it has neither "
            f"{' nor '.join(PROCESSOR_FILES)}.",
            then="Copy them from where the model is from, or write them with "
            "processor.save_pretrained(folder).",
        )
    source = folder or section.name
    try:
        family = _class_of(source, section.revision, config)
        processor = without_video(family).from_pretrained(
            source, revision=section.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            unreadable(section.name, "the image processor", error),
            then=CHECK_NAME,
        ) from error
    says = type(processor).replace_image_token is not ProcessorMixin.replace_image_token
    if not (says and getattr(processor, "image_token", None)):
        raise MismatchError(
            f"the processor of {section.name} ({type(processor).__name__}) does not say which "
            "tokens stand for an image.",
            then="Use a vision-language model of docs/families.md.",
        )
    return processor


def _class_of(source: Any, revision: str | None, config: Any) -> Any:
    """Return the class that the checkpoint's files name, or that its model type has."""
    try:
        described, _ = ProcessorMixin.get_processor_dict(source, revision=revision)
    except OSError:
        described = {}
    named = described.get("processor_class")
    found = processor_class_from_name(named) if named else None
    return found or PROCESSOR_MAPPING[type(config)]


def without_video(family: Any) -> Any:
    """Return a processor class that can be made without torchvision; itself where it can be.

    Its objects are made and saved under the class's own name.
    """
    if is_torchvision_available() or VIDEO not in family.get_attributes():
        return family

    class NoVideo(family):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in family.get_attributes() if name != VIDEO]

        @classmethod
        def _get_arguments_from_pretrained(cls, *given: Any, **named: Any) -> list[Any]:
            parts = super()._get_arguments_from_pretrained(*given, **named)
            found = dict(zip(cls.get_attributes(), parts, strict=True))
            return [found.get(name) for name in family.get_attributes()]

        def __new__(cls, *given: Any, **named: Any) -> Any:
            _excuse_number_words(family)
            return super().__new__(cls)

    NoVideo.__name__ = NoVideo.__qualname__ = family.__name__
    return NoVideo


def _excuse_number_words(family: Any) -> None:
    """Let SmolVLM's processor be made without num2words, which spells out how long a video is."""
    module = importlib.import_module(family.__module__)
    if getattr(module, "num2words", True) is None:
        module.num2words = _no_videos  # type: ignore[attr-defined]


def _no_videos(number: int) -> str:
    raise ImportError("reading videos needs the packages num2words and torchvision")


class ImageReader:
    """What one processor makes of images, one image an example.

    Args:
        processor: A processor of transformers.
        config: The model's transformers configuration.
        name: The model's name, for messages.

    Attributes:
        marker: What stands for an image in a text; the processor puts the text of `made_of` in its
            place.
        token_id: The token whose embedding is replaced by a part of the image.
    """

    def __init__(self, processor: Any, config: Any, name: str) -> None:
        self.processor = processor
        self.name = name
        self.marker: str = processor.image_token
        named = getattr(config, "image_token_id", None)
        self.token_id: int = config.image_token_index if named is None else named
        self._options = dict(getattr(processor, "images_kwargs", {}))
        self._patch = getattr(config.vision_config, "patch_size", None)
        self.made_of = lru_cache(maxsize=SIZES_KEPT)(self._made_of)

    def _made_of(self, width: int, height: int) -> tuple[str, int]:
        """Return what is made of an image of this size, in pixels.

        Returns:
            The text that takes a marker's place, and how many patches the image is cut into, those
            of all its tiles; 0 where that is not known.
        """
        from PIL import Image

        processed = self._processed([Image.new("RGB", (width, height))])
        return self.processor.replace_image_token(processed, image_idx=0), self._patches(processed)

    def _patches(self, processed: Any) -> int:
        grid, pixels = processed.get("image_grid_thw"), processed.get("pixel_values")
        if grid is not None:
            return int(grid.prod())
        if not isinstance(pixels, Tensor) or pixels.ndim < 4 or not isinstance(self._patch, int):
            return 0
        return pixels.numel() // (pixels.shape[-3] * self._patch**2)

    def laid_out(self, text: str) -> str:
        """Return a text with one marker as the processor lays it out: with a BOS behind it, say."""
        from PIL import Image

        image = Image.new("RGB", (2, 2))
        return self.processor.prepare_inputs_layout(images=[[image]], text=[text])[1][0]

    def pixels(
        self, images: Sequence["Image"], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return what the model reads of images, one an example, by the names of its arguments."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self._processed(images).items()
            if isinstance(value, Tensor)
        }

    def _processed(self, images: Sequence["Image"]) -> Any:
        nested = [[image] for image in images]
        return self.processor.image_processor(images=nested, return_tensors="pt", **self._options)
