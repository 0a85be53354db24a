"""Llama 3.2 Vision (Mllama): the image enters by cross-attention, in blocks of its own.

Of the blocks, some attend to the image in place of the text. They count as blocks as any other; the
residual can be read before, within and behind them. What their attention and their MLP give is
scaled by a gate before it is added, so `attn_out` and `mlp_out` are refused there.

A text without an image goes past these blocks: they leave the residual as it is, in a batch of its
own as beside examples with an image. transformers skips them in a batch of texts alone, and then
nothing could be read there; here they are run, and what they add is set to zero.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saefty.errors import MismatchError
from saefty.models.attention_off import cross_layers
from saefty.models.base import MODEL_FAMILIES, Positions, TokenBatch
from saefty.models.vlm import VisionDecoder, reads_images
from saefty.records import Site

GATED = ("attn_out", "mlp_out")


@MODEL_FAMILIES.register("mllama")
class Mllama(VisionDecoder):
    """A Llama 3.2 Vision model.

    Args:
        model: A transformers model with its language-model head.
        processor: Its processor: a fast tokenizer, and how images are prepared.
        info: Its size and name.
        provenance: Where it comes from, for `metadata.json`.
    """

    @staticmethod
    def claims(config: Any) -> bool:
        """Return whether a checkpoint holds a Mllama with its image tower and its head."""
        return config.model_type == "mllama" and reads_images(config)

    def _place(self, site: Site) -> tuple[nn.Module, Literal["in", "out"]]:
        across = cross_layers(self.blocks)
        if site.part in GATED and site.layer in across:
            raise MismatchError(
                f"{site} cannot be read in {self.name}: block {site.layer} attends to the image, "
                "and what its attention and MLP give is scaled by a gate before it is added.",
                then="Set extract.hook_point to resid_pre, post_attn_resid or resid_post, or take "
                f"layers other than {', '.join(map(str, across))}.",
            )
        return super()._place(site)

    def _inputs(self, batch: TokenBatch, pixels: dict[str, Any]) -> dict[str, Any]:
        """Return pixels for every row, and which of its tokens see them: those from the marker on.

        Rows without an image get empty pixels, which no token sees.
        """
        held = batch.image.any(dim=1)
        spread = {name: _for_rows(value, held) for name, value in pixels.items()}
        tiles = spread["aspect_ratio_mask"].clone()
        spread["aspect_ratio_mask"][~held, :, 0] = 1  # transformers' own mark of a missing image
        behind = (batch.image.cumsum(dim=1) > 0) & batch.mask
        return {**spread, "cross_attention_mask": behind[:, :, None, None] * tiles[:, None]}

    def _beside(self, batch: TokenBatch, positions: Positions) -> dict[str, Any]:
        found = super()._beside(batch, positions)
        found["without_image"] = ~batch.image.any(dim=1)
        seen = batch.inputs.get("cross_attention_mask")
        if seen is None:
            return found
        last, length = seen[:, -1:], positions.index.shape[1]
        if not positions.is_prefill:
            seen = last
        elif length > seen.shape[1]:
            seen = torch.cat([seen, last.expand(-1, length - seen.shape[1], -1, -1)], dim=1)
        return {**found, "cross_attention_mask": seen}

    def _forward(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch total"],
        positions: Positions,
        **options: Any,
    ) -> Any:
        without = options.pop("without_image", torch.ones(len(ids), dtype=torch.bool))
        if "pixel_values" not in options and positions.is_prefill:
            options["cross_attention_states"] = torch.zeros(
                len(ids), 1, self.d_model, dtype=self.dtype, device=self.device
            )
        with self._passing_by(without):
            return super()._forward(ids, mask, positions, **options)

    @contextmanager
    def _passing_by(self, rows: Bool[Tensor, "batch"]) -> Iterator[None]:
        """Let some rows go past the blocks that attend to the image."""

        def silence(_: nn.Module, __: Any, output: Any) -> Any:
            first = output if isinstance(output, Tensor) else output[0]
            quiet = first.masked_fill(rows.to(first.device)[:, None, None], 0)
            return quiet if isinstance(output, Tensor) else (quiet, *output[1:])

        with ExitStack() as hooks:
            for layer in cross_layers(self.blocks) if rows.any() else []:
                for name in ("cross_attn", "mlp"):
                    child = self.blocks[layer].get_submodule(name)
                    hooks.callback(child.register_forward_hook(silence, prepend=True).remove)
            yield


def _for_rows(values: Tensor, held: Bool[Tensor, "batch"]) -> Tensor:
    """Return values for all rows, those of rows that hold nothing being zero."""
    spread = values.new_zeros(len(held), *values.shape[1:])
    spread[held.to(values.device)] = values
    return spread
