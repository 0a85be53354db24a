"""What all models of transformers share: one list of blocks, one tokenizer, hooks at their places.

Decoders and encoders differ in what a forward pass takes and gives, and in which parts of a block
have a meaning.
"""

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saefty.models.base import (
    Intervention,
    ModelAdapter,
    Positions,
    TokenBatch,
    TokenizedExample,
)
from saefty.models.batching import pad_together
from saefty.models.checkpoint import ModelInfo, input_device
from saefty.models.hooks import capturing, editing, find_blocks, place_of
from saefty.models.text import TextEncoder
from saefty.records import Example, Site


class TransformerModel(ModelAdapter):
    """A model of transformers, read and edited by hooks on its blocks.

    Args:
        model: A transformers model.
        tokenizer: Its fast tokenizer.
        info: Its size and name.
        provenance: Where it comes from, for `metadata.json`.

    Raises:
        InputError: If the tokenizer gives no character offsets.
        MismatchError: If the model has no single list of as many blocks as `info` says.
    """

    def __init__(
        self, model: Any, tokenizer: Any, info: ModelInfo, provenance: dict[str, Any]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.info = info
        self.provenance = provenance
        self.text = TextEncoder(tokenizer, info.name, info.max_length)
        self.blocks = find_blocks(model, info.n_layers)
        self.config = model.config.get_text_config()
        self.dtype, self.device = model.get_input_embeddings().weight.dtype, input_device(model)
        self._positions: Positions | None = None  # set during a forward pass
        self._edits: list[tuple[Site, Intervention]] = []  # those that hold now

    @abc.abstractmethod
    def _read(self, batch: TokenBatch) -> Any:
        """Run the model over whole examples, with `_positions` set."""

    def _place(self, site: Site) -> tuple[nn.Module, Literal["in", "out"]]:
        """Return where a site is read, or refuse it with the reason."""
        return place_of(site, self.blocks[site.layer], self.config)

    def image_tokens(self, ids: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Return which tokens stand for an image."""
        return torch.zeros_like(ids, dtype=torch.bool)

    def release(self) -> None:
        """Let go of the weights; tokenising goes on."""
        self.model.to("meta")

    def tokenize(
        self, examples: Sequence[Example], *, truncate: Literal["never", "left", "right"] = "never"
    ) -> list[TokenizedExample]:
        """Turn examples into tokens; see `ModelAdapter.tokenize`."""
        return self.text(examples, truncate)

    def collate(
        self, items: Sequence[TokenizedExample], side: Literal["left", "right"] = "right"
    ) -> TokenBatch:
        """Pad tokenised examples to one length.

        Raises:
            ValueError: If there are none, or one is not `ok`.
        """
        return pad_together(items, self.tokenizer.pad_token_id or 0, side, self.device)

    def capture(
        self,
        batch: TokenBatch,
        sites: Sequence[Site],
        rows: Bool[Tensor, "batch seq"] | None = None,
    ) -> dict[Site, Tensor]:
        """Return the activations at some sites; see `ModelAdapter.capture`.

        Raises:
            ConfigError: If a layer is out of range or a site occurs twice.
            MismatchError: If the family does not have the part, or its blocks compute something
                else than one row of `d_model` numbers for each token.
        """
        self.info.check_sites(sites)
        places = [(site, *self._place(site)) for site in sites]
        found: dict[Site, Tensor] = {}
        if places:
            shape = (*batch.ids.shape, self.d_model)
            with capturing(places, shape, rows, found):
                self._read(batch)
        if rows is not None:
            return {site: found[site] for site in sites}
        return {site: found[site].reshape(*batch.ids.shape, -1) for site in sites}

    @contextmanager
    def intervene(self, site: Site, edit: Intervention) -> Iterator[None]:
        """Edit the activations at a site within the context; see `ModelAdapter.intervene`.

        Raises:
            ConfigError: If the layer is out of range.
            MismatchError: If the family does not have the part.
        """
        self.info.check_sites([site])
        self._place(site)

        def edit_here(x: Float[Tensor, "*tokens d_model"]) -> Tensor:
            assert self._positions is not None, "an edit ran outside a forward pass"
            positions = self._positions.to(x.device)
            if x.ndim > 2:
                return edit(x, positions)
            folded = edit(x.reshape(*positions.index.shape, -1), positions)
            return folded.reshape(-1, folded.shape[-1])

        with editing(site, self.blocks[site.layer], self.config, edit_here):
            held = (site, edit)
            self._edits.append(held)
            try:
                yield
            finally:
                self._edits = [other for other in self._edits if other is not held]
