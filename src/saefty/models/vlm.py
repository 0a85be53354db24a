"""Vision-language models whose image is a stretch of tokens: LLaVA, Qwen-VL, Gemma 3 and their kin.

The text model is read and edited as any decoder. What differs: the processor says which tokens
stand for an image, the pixels are made anew for each batch, and some families say by token types
which tokens see each other (an image's in Gemma 3; image and prompt in PaliGemma) or count
positions in rows and columns (Qwen-VL).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from saefty.images import load_image
from saefty.models.base import MODEL_FAMILIES, Positions, TokenBatch, TokenizedExample
from saefty.models.checkpoint import (
    ModelInfo,
    ModelSection,
    describe,
    load_weights,
    read_config,
)
from saefty.models.decoder import Decoder
from saefty.models.image_text import ImageTextEncoder
from saefty.models.processors import ImageReader, load_processor

PREFIX_FAMILIES = ("paligemma",)
"""Those in which image and prompt see each other as a whole, and the response what is before it."""


@MODEL_FAMILIES.register("vlm")
class VisionDecoder(Decoder):
    """A language model that reads an image among its tokens.

    Args:
        model: A transformers model with its language-model head.
        processor: Its processor: a fast tokenizer, and how images are prepared.
        info: Its size and name.
        provenance: Where it comes from, for `metadata.json`.
    """

    reads_images = True

    def __init__(
        self, model: Any, processor: Any, info: ModelInfo, provenance: dict[str, Any]
    ) -> None:
        self.processor = processor
        self.images = ImageReader(processor, model.config, info.name)
        tokenizer = processor.tokenizer
        # Templates of vision-language models are often saved beside the tokenizer, not in it.
        tokenizer.chat_template = getattr(processor, "chat_template", None) or (
            tokenizer.chat_template
        )
        super().__init__(model, tokenizer, info, provenance)
        self.text = ImageTextEncoder(tokenizer, info.name, info.max_length, self.images)
        head = model.get_output_embeddings()
        if self.images.token_id < head.weight.shape[0]:
            self._barred = [self.images.token_id]  # it would stand for an image that is not there
        self._stack = model.base_model  # what is called with ids; the text model gets embeddings
        self._takes.add("use_cache")  # some take it among others, and would fill a cache

    def image_tokens(self, ids: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Return which tokens stand for an image: none else has their id, and no reply holds it."""
        return ids == self.images.token_id

    @staticmethod
    def claims(config: Any) -> bool:
        """Return whether a checkpoint holds a vision-language model with its head."""
        return config.model_type != "mllama" and reads_images(config)

    @classmethod
    def load(cls, section: ModelSection, info: ModelInfo) -> "VisionDecoder":
        """Read processor and weights from a folder or the hub."""
        config, _ = read_config(section.name, section.revision)
        processor = load_processor(section, config)  # before gigabytes are read
        model = load_weights(section, transformers.AutoModelForImageTextToText)
        made_by = {
            "processor": type(processor).__name__,
            "image_processor": type(processor.image_processor).__name__,
        }
        return cls(model, processor, info, describe(section, info, model) | made_by)

    def collate(
        self, items: Sequence[TokenizedExample], side: Literal["left", "right"] = "right"
    ) -> TokenBatch:
        """Pad tokenised examples to one length, and make the pixels of those that have an image.

        Raises:
            BadImageError: If an image can no longer be read.
            ValueError: If there are no examples, or one is not `ok`.
        """
        batch = super().collate(items, side)
        held = batch.image.any(dim=1).tolist()
        images = [
            load_image(str(item.example.image))
            for item, has in zip(batch.items, held, strict=True)
            if has
        ]
        if not images:
            return batch
        pixels = self.images.pixels(images, self.device, self.dtype)
        return replace(batch, inputs=self._inputs(batch, pixels))

    def _inputs(self, batch: TokenBatch, pixels: dict[str, Any]) -> dict[str, Any]:
        """Return what a batch's forward pass takes beside tokens, pixels among it."""
        inner = self.model.base_model
        if "image_grid_thw" not in pixels or not hasattr(inner, "get_rope_index"):
            return pixels
        places, _ = inner.get_rope_index(
            batch.ids,
            mm_token_type_ids=batch.image.int(),
            image_grid_thw=pixels["image_grid_thw"],
            attention_mask=batch.mask.long(),
        )
        return {**pixels, "position_ids": places}

    def _beside(self, batch: TokenBatch, positions: Positions) -> dict[str, Any]:
        found = super()._beside(batch, positions)
        places = batch.inputs.get("position_ids")
        if places is None:
            return found
        # What a reply adds continues each row's own count, which an image's tokens advance by less
        # than their number. Replies are padded on the left: the last column is a real token.
        given = batch.ids.shape[1]
        added = positions.index[:, given:] if positions.is_prefill else positions.index
        more = places[..., -1:] + (added - batch.position_ids[:, -1:])
        if positions.is_prefill:
            more = torch.cat([places, more], dim=-1)
        return {**found, "position_ids": more}

    def _forward(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch total"],
        positions: Positions,
        **options: Any,
    ) -> Any:
        if positions.is_prefill:
            of_image = (ids == self.images.token_id).long()
            prefix = self.model.config.model_type in PREFIX_FAMILIES
            options["token_type_ids"] = positions.response.long() if prefix else of_image
            options["mm_token_type_ids"] = of_image
        return super()._forward(ids, mask, positions, **options)


def reads_images(config: Any) -> bool:
    """Return whether a checkpoint holds a model that transformers knows to read images and text."""
    names = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if not hasattr(config, "vision_config") or getattr(config, "is_encoder_decoder", False):
        return False
    if not config.architectures:
        return config.model_type in names
    return config.architectures[0] in names.values()
