"""BERT-type encoders, for reading only: every token sees the whole text, and none is predicted.

A block is read before and after (`resid_pre`, `resid_post`). BERT normalises behind each add, so
what its attention and MLP add is rescaled at once: `resid_post` is the normed sum, and the parts
between have no meaning shared with decoders. Edits hold in forward passes; without a next token
there are no replies, no logits and no loss.
"""

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from saefty.errors import MismatchError
from saefty.models.base import MODEL_FAMILIES, TokenBatch
from saefty.models.batching import whole_pass
from saefty.models.checkpoint import (
    ModelInfo,
    ModelSection,
    describe,
    load_tokenizer,
    load_weights,
)
from saefty.models.transformer import TransformerModel
from saefty.records import Example, Site


@MODEL_FAMILIES.register("encoder")
class Encoder(TransformerModel):
    """A BERT encoder.

    Args:
        model: A transformers model without a head.
        tokenizer: Its fast tokenizer.
        info: Its size and name.
        provenance: Where it comes from, for `metadata.json`.
    """

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

    def final(self, batch: TokenBatch) -> Float[Tensor, "batch seq d_model"]:
        """Return the states after the last block, in the model's dtype."""
        return self._read(batch).last_hidden_state

    @torch.no_grad()
    def _read(self, batch: TokenBatch) -> Any:
        self._positions = whole_pass(batch)
        try:
            return self.model(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                position_ids=batch.position_ids,
            )
        finally:
            self._positions = None

    def logits(self, batch: TokenBatch) -> NoReturn:
        """Refuse: an encoder predicts no next token.

        Raises:
            MismatchError: Always.
        """
        self._refuse("no next-token logits")

    def loss(self, batch: TokenBatch) -> NoReturn:
        """Refuse: an encoder predicts no next token.

        Raises:
            MismatchError: Always.
        """
        self._refuse("no next-token loss")

    def generate(
        self,
        examples: Sequence[Example | str],
        *,
        max_new_tokens: int,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 32,
        cache: bool = True,
    ) -> NoReturn:
        """Refuse: an encoder predicts no next token.

        Raises:
            MismatchError: Always.
        """
        self._refuse("no replies")

    def _refuse(self, what: str) -> NoReturn:
        raise MismatchError(
            f"{self.name} is an encoder ({self.info.architecture}): it reads whole texts and "
            f"predicts no next token, so it has {what}.",
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
        return super()._place(site)
