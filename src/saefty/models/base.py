"""What every model offers: tokenise, read activations, edit them, generate; and how one is found.

A *site* is a block and a part of it (`saefty.records.Site`); *activations* are what the model
computes there, as the model stores them, [batch, seq, d_model]. An *intervention* is a function
from activations to activations that is called once for each forward pass: with the whole prompt,
then, under generation with a cache, with one new token at a time. `Positions` tells it which tokens
it has been given, so that it need not count them. Hooks, tuples and caches stay in `hooks.py`.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty.config import build_config
from saefty.errors import MismatchError
from saefty.models.checkpoint import ModelInfo, ModelSection, read_config
from saefty.records import ROLES, Example, Site, Span
from saefty.registry import Registry

Status = Literal["ok", "too_long", "empty", "bad_image"]


OF_TEXT = "its text "


@dataclass(frozen=True)
class TokenizedExample:
    """One example as the model reads it, with everything needed to say what each token is."""

    example: Example
    text: str
    """The text that was tokenised, chat template included; a BOS that the tokenizer adds is not in
    it."""
    ids: Int[np.ndarray, "tokens"]
    offsets: Int[np.ndarray, "tokens 2"]
    """Characters [start, end) of `text` for each token. Tokens that are bytes of one character
    share its span, those of an image the span of its marker; a token that is not in the text has an
    empty one."""
    roles: Int[np.ndarray, "tokens"]
    """Index into `saefty.records.ROLES`. What the template adds around contents is `special`."""
    special: Bool[np.ndarray, "tokens"]
    """True for special tokens, by id (BOS, end of turn, ...), and for all that stands for an image;
    words of the template are not."""
    response_start: int | None
    """Index of the response's first token; None without a response."""
    straddles: bool
    """The response's first token also holds the prompt's last characters."""
    truncated: bool
    status: Status
    """`ok`; `too_long` for the model's context; `empty` if no token, or no token of a response that
    was given, is left to look at; `bad_image` if its image cannot be read, or does not fit its
    text. Only `ok` examples can be collated."""
    reason: str | None = None
    """Why the status is not `ok`, where it does not say enough; of a `bad_image` it begins with
    `OF_TEXT` where the image may be fine."""
    patches: int = 0
    """Patches of its image, of all the tiles it is cut into: what the image tower computes, which
    may be many times the image's tokens."""

    @property
    def spans(self) -> list[Span]:
        """Stretches of tokens with one role, in order."""
        edges = np.flatnonzero(np.diff(self.roles)) + 1
        starts = [0, *edges.tolist()] if len(self.roles) else []
        ends = [*edges.tolist(), len(self.roles)]
        return [
            Span(start, end, ROLES[self.roles[start]])
            for start, end in zip(starts, ends, strict=False)
        ]


@dataclass(frozen=True)
class TokenBatch:
    """Examples padded to one length: what one forward pass reads."""

    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    """True for real tokens, False for padding."""
    position_ids: Int[Tensor, "batch seq"]
    """0 for an example's first real token, wherever the padding is."""
    special: Bool[Tensor, "batch seq"]
    response: Bool[Tensor, "batch seq"]
    """True from each example's `response_start` on."""
    image: Bool[Tensor, "batch seq"]
    """True for the tokens that stand for an image."""
    items: tuple[TokenizedExample, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What a forward pass takes beside tokens, by the names of the model's own arguments: pixels,
    for instance. Empty for a language model."""
    reads_padding: bool = True
    """Whether the padding is looked at, by whoever reads the activations or by a real token. Where
    it is not, because the model is causal, attention need not hide it, which is faster."""


@dataclass(frozen=True)
class Positions:
    """Which tokens an intervention has been given. All tensors have its batch and seq."""

    mask: Bool[Tensor, "batch seq"]
    """True for real tokens, False for padding and for rows that have ended."""
    index: Int[Tensor, "batch seq"]
    """Position of each token in its own example, the first real token being 0."""
    special: Bool[Tensor, "batch seq"]
    """True for special tokens, by id."""
    response: Bool[Tensor, "batch seq"]
    """True for tokens of a teacher-forced response, and for every token that was generated."""
    is_prefill: bool
    """True for a pass over whole examples, False for a step that adds tokens to a cache."""
    generated: Bool[Tensor, "batch seq"] | None = None
    """True for tokens that the model wrote itself. None: all tokens of a step that adds to a cache,
    none of a pass over whole examples."""
    rows: Int[Tensor, "batch"] | None = None
    """Which example each row is, by its place among those given to `generate`; None: in order."""

    @property
    def written(self) -> Bool[Tensor, "batch seq"]:
        """True for tokens that the model wrote itself, False for those it was given."""
        if self.generated is not None:
            return self.generated
        whole = torch.zeros_like if self.is_prefill else torch.ones_like
        return whole(self.mask)

    @property
    def examples(self) -> Int[Tensor, "batch"]:
        """Which of the given examples each row is."""
        if self.rows is not None:
            return self.rows
        return torch.arange(len(self.mask), device=self.mask.device)

    def to(self, device: torch.device) -> "Positions":
        """Return the same positions on a device: blocks of one model may lie on several."""
        if self.mask.device == device:
            return self
        return replace(
            self,
            mask=self.mask.to(device),
            index=self.index.to(device),
            special=self.special.to(device),
            response=self.response.to(device),
            generated=None if self.generated is None else self.generated.to(device),
            rows=None if self.rows is None else self.rows.to(device),
        )


Intervention = Callable[
    [Float[Tensor, "batch seq d_model"], Positions], Float[Tensor, "batch seq d_model"]
]


class ModelAdapter(abc.ABC):
    """A model that can be read and edited. One subclass a family of architectures.

    Attributes:
        info: What the checkpoint's config.json says.
        tokenizer: The checkpoint's own (fast) tokenizer.
        dtype: Number format of the activations.
        device: Where the inputs go.
        provenance: Commit or digests of the weights, versions, attention: for `metadata.json`.
        reads_images: Whether an example's image is read with its text.
    """

    reads_images: bool = False
    info: ModelInfo
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    provenance: dict[str, Any]

    @staticmethod
    @abc.abstractmethod
    def claims(config: Any) -> bool:
        """Return whether the family loads a checkpoint with this transformers config."""

    @classmethod
    @abc.abstractmethod
    def load(cls, section: ModelSection, info: ModelInfo) -> "ModelAdapter":
        """Read tokenizer and weights."""

    @property
    def name(self) -> str:
        """The folder or hub id that was asked for."""
        return self.info.name

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.info.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.info.d_model

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return self.info.max_length

    @property
    def causal(self) -> bool:
        """Whether what is computed at a token depends on it and those before it alone.

        Then a text may be cut behind the last token of interest. False where it is not known.
        """
        return False

    @abc.abstractmethod
    def tokenize(
        self, examples: Sequence[Example], *, truncate: Literal["never", "left", "right"] = "never"
    ) -> list[TokenizedExample]:
        """Turn examples into tokens, in order, one for each.

        Args:
            examples: What to tokenise.
            truncate: `never` gives a text longer than the context the status `too_long`; `right`
                drops its end, `left` its beginning. A leading BOS stays, and so do the special
                tokens that the tokenizer puts around a text (BERT's [CLS] and [SEP]).
        """

    @abc.abstractmethod
    def collate(
        self, items: Sequence[TokenizedExample], side: Literal["left", "right"] = "right"
    ) -> TokenBatch:
        """Pad tokenised examples to one length. Pad right to read, left to generate."""

    @abc.abstractmethod
    def capture(
        self,
        batch: TokenBatch,
        sites: Sequence[Site],
        rows: Bool[Tensor, "batch seq"] | None = None,
    ) -> dict[Site, Tensor]:
        """Return the activations at some sites, from one forward pass that stops after the last.

        Args:
            batch: What to read.
            sites: Where to look; each once.
            rows: Keep only these tokens, in row-major order; None keeps all, padding included.

        Returns:
            For each site [batch, seq, d_model], or [rows, d_model] if `rows` is given, in the
            model's dtype, on the device of their block. Whether they are finite is for the caller
            to check.
        """

    def capture_behind(
        self, batch: TokenBatch, sites: Sequence[Site], rows: Bool[Tensor, "batch seq"]
    ) -> dict[Site, Tensor]:
        """Return what `capture` does, for rows that begin alike; how they begin may be read once.

        Args:
            batch: What to read; best where all rows begin with the same long prompt.
            sites: Where to look; each once.
            rows: Keep only these tokens, in row-major order.
        """
        return self.capture(batch, sites, rows)

    @abc.abstractmethod
    def logits(self, batch: TokenBatch) -> Float[Tensor, "batch seq vocab"]:
        """Return the next-token logits at every position, in the model's dtype."""

    def release(self) -> None:  # noqa: B027 - nothing, where there is nothing to let go of
        """Let go of the weights, when others read in this model's place; tokenising goes on."""

    def final(self, batch: TokenBatch) -> Float[Tensor, "batch seq width"]:
        """Return what the model computes last: its logits, or an encoder's final states."""
        return self.logits(batch)

    @abc.abstractmethod
    def loss(self, batch: TokenBatch) -> Float[Tensor, "batch next"]:
        """Return -log p of each token given those before it, in nats, as float32.

        Returns:
            [batch, seq - 1]: entry t is about token t + 1. NaN where token t or t + 1 is padding,
            so that `torch.nanmean` is the mean over real tokens.
        """

    @abc.abstractmethod
    def intervene(self, site: Site, edit: Intervention) -> AbstractContextManager[None]:
        """Edit the activations at a site in every forward pass within the context.

        Interventions nest; at one site the outer one comes first. `edit` gets a copy of its own,
        and its result is cast to the model's dtype.
        """

    @abc.abstractmethod
    def generate(
        self,
        examples: Sequence[Example | str],
        *,
        max_new_tokens: int,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 32,
        cache: bool = True,
    ) -> list[str]:
        """Return the model's reply to each example, in order; responses given are ignored.

        Args:
            examples: What to reply to; a text is a prompt, whose id is its place.
            max_new_tokens: Longest reply; a reply ends earlier at an end-of-text token.
            seed: With `temperature` > 0, each example draws from a stream of its own, named by
                this and its id: its reply does not depend on the examples beside it.
            temperature: 0 takes the likeliest token.
            batch_size: Most examples in one forward pass.
            cache: Keep keys and values from one token to the next. Without, the whole text is read
                again for each token: the same replies, slowly.

        Raises:
            NumericError: If the logits of a row hold NaN or infinity; it names the step.
        """


MODEL_FAMILIES: Registry[type[ModelAdapter]] = Registry("model family", "saefty.models")


def load_model(name: str | Path, **fields: Any) -> ModelAdapter:
    """Load a model and its tokenizer from a folder or the hub.

    Args:
        name: A folder with a Hugging Face checkpoint, or a hub id.
        **fields: The other keys of `ModelSection`: revision, dtype, device, attn, device_map.

    Raises:
        InputError: If there is no such checkpoint, or it lacks a tokenizer or weights.
        MismatchError: If it is no causal language model, vision-language model or BERT encoder.

    Example:
        >>> model = load_model("google/gemma-2-2b-it", dtype="bfloat16")  # doctest: +SKIP
    """
    name = str(name) if isinstance(name, Path) else name
    section = build_config(ModelSection, {"name": name, **fields})
    family, info = _find(section.name, section.revision)
    return family.load(section, info)


def inspect_model(name: str, revision: str | None = None) -> ModelInfo:
    """Return a checkpoint's size from its config.json, so that a bad layer fails early.

    Raises:
        InputError: If there is no such checkpoint, or a folder has no tokenizer.
        MismatchError: If it is no causal language model, vision-language model or BERT encoder.
    """
    return _find(name, revision)[1]


def _find(name: str, revision: str | None) -> tuple[type[ModelAdapter], ModelInfo]:
    # Before the configuration is read: another package may teach transformers its model type.
    families = [MODEL_FAMILIES[known] for known in MODEL_FAMILIES]
    # Other packages' families first: they exist for what ours would misread.
    families.sort(key=lambda family: family.__module__.startswith("saefty."))
    config, info = read_config(name, revision)
    for family in families:
        if family.claims(config):
            return family, info
    raise MismatchError(
        f"{info.name} holds a {info.architecture} (model type {info.family}), which is not a "
        "causal language model, a vision-language model or a BERT encoder.",
        then="Set model.name to a checkpoint saved with its language-model head (…ForCausalLM), or "
        "to a BERT; those that read images end in …ForConditionalGeneration.",
    )
