"""BERT-type encoders, for reading only: every token sees the whole text, and none is predicted.

A block is read before and after (`resid_pre`, `resid_post`). BERT normalises behind each add, so
what its attention and MLP add is rescaled at once: `resid_post` is the normed sum, and the parts
between have no meaning shared with decoders. Edits hold in forward passes; without a next token
there are no replies, no logits and no loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saefty.errors import MismatchError
from saefty.models.base import (
    MODEL_FAMILIES,
    Intervention,
    ModelAdapter,
    TokenBatch,
    TokenizedExample,
)
from saefty.models.batching import pad_together, whole_pass
from saefty.models.checkpoint import (
    ModelInfo,
    ModelSection,
    describe,
    load_tokenizer,
    load_weights,
)
from saefty.models.hooks import capturing, editing, find_blocks, place_of
from saefty.models.text import TextEncoder
from saefty.records import Example, Site


@MODEL_FAMILIES.register("encoder")
class Encoder(ModelAdapter):
    """A BERT encoder.

    Args:
        model: A transformers model without a head.
        tokenizer: Its fast tokenizer.
        info: Its size and name.
        provenance: Where it comes from, for `metadata.json`.
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
        embedding = model.get_input_embeddings().weight
        self.dtype, self.device = embedding.dtype, embedding.device
        self._batch: TokenBatch | None = None

    @staticmethod
    def claims(config: Any) -> bool:
        """Return whether a checkpoint holds a BERT that is no decoder."""
        return config.model_type == "bert" and not config.is_decoder

    @classmethod
    def load(cls, section: ModelSection, info: ModelInfo) -> "Encoder":
        """Read tokenizer and weights from a folder or the hub."""
        tokenizer = load_tokenizer(section)
        model = load_weights(section, transformers.AutoModel, add_pooling_layer=False)
        return cls(model, tokenizer, info, describe(section, info, model))

    def tokenize(
        self, examples: Sequence[Example], *, truncate: Literal["never", "left", "right"] = "never"
    ) -> list[TokenizedExample]:
        """Turn examples into tokens; see `ModelAdapter.tokenize`."""
        return self.text(examples, truncate)

    def collate(
        self, items: Sequence[TokenizedExample], side: Literal["left", "right"] = "right"
    ) -> TokenBatch:
        """Pad tokenised examples to one length."""
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
            MismatchError: If a site lies within a block.
        """
        self.info.check_sites(sites)
        places = [(site, *self._place(site)) for site in sites]
        found: dict[Site, Tensor] = {}
        if places:
            with capturing(places, rows, found):
                self.final(batch)
        return {site: found[site] for site in sites}

    @torch.no_grad()
    def final(self, batch: TokenBatch) -> Float[Tensor, "batch seq d_model"]:
        """Return the states after the last block, in the model's dtype."""
        self._batch = batch
        try:
            return self.model(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                position_ids=batch.position_ids,
            ).last_hidden_state
        finally:
            self._batch = None

    def logits(self, batch: TokenBatch) -> NoReturn:
        """Refuse: an encoder predicts no next token.

        Raises:
            MismatchError: Always.
        """
        self._refuse("next-token logits")

    def loss(self, batch: TokenBatch) -> NoReturn:
        """Refuse: an encoder predicts no next token.

        Raises:
            MismatchError: Always.
        """
        self._refuse("a next-token loss")

    @contextmanager
    def intervene(self, site: Site, edit: Intervention) -> Iterator[None]:
        """Edit the activations at a site in forward passes; see `ModelAdapter.intervene`.

        Raises:
            ConfigError: If the layer is out of range.
            MismatchError: If the site lies within a block.
        """
        self.info.check_sites([site])
        self._place(site)

        def edit_here(x: Float[Tensor, "batch seq d_model"]) -> Tensor:
            assert self._batch is not None, "an edit ran outside a forward pass"
            return edit(x, whole_pass(self._batch))

        with editing(site, self.blocks[site.layer], self.model.config, edit_here):
            yield

    def generate(
        self,
        examples: Sequence[Example],
        *,
        max_new_tokens: int,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 32,
    ) -> NoReturn:
        """Refuse: an encoder predicts no next token.

        Raises:
            MismatchError: Always.
        """
        self._refuse("replies")

    def _refuse(self, what: str) -> NoReturn:
        raise MismatchError(
            f"{self.name} is an encoder ({self.info.architecture}): it reads whole texts and "
            f"predicts no next token, so it has no {what}.",
            then="Use it for extract, train and encode; to steer or to generate, set model.name to "
            "a causal language model (…ForCausalLM).",
        )

    def _place(self, site: Site) -> tuple[nn.Module, Literal["in", "out"]]:
        if site.part not in {"resid_pre", "resid_post"}:
            raise MismatchError(
                f"{site.part} cannot be read in {self.name}: a BERT block normalises behind each "
                "add, so what its attention and MLP add is not a part of its output.",
                then="Set extract.hook_point to resid_pre or resid_post.",
            )
        return place_of(site, self.blocks[site.layer], self.model.config)
