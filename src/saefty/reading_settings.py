"""What a person sets about reading a dataset through a model: places, tokens, poolings, limits."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from saefty.config import Config
from saefty.errors import ConfigError
from saefty.models.batching import DEFAULT_TOKEN_BUDGET
from saefty.models.contrast import ContrastSection
from saefty.records import Site


class PoolingSection(Config):
    """How the rows of an example's tokens become one row."""

    name: Literal["none", "text_only_mean", "eos", "last_k_mean", "span_mean"] = "none"
    """`none` keeps every token that is not special; `text_only_mean` their mean, after the image
    where there is one; `eos` the last token; `last_k_mean` the mean of the last `last_k`;
    `span_mean` the mean of the tokens `span`, or of the example's own (`data.span`)."""

    last_k: int = Field(default=5, gt=0)
    """Tokens in `last_k_mean`."""

    span: tuple[int, int] | None = None
    """Token positions [start, end) of `span_mean`, BOS counted as 0; None takes each example's."""

    @model_validator(mode="after")
    def _a_span_of_tokens(self) -> "PoolingSection":
        if self.span is not None and not 0 <= self.span[0] < self.span[1]:
            raise ValueError(f"span is [start, end) with 0 <= start < end, not {list(self.span)}")
        return self


class SaveSection(Config):
    """How the store is cut into files."""

    shard_size: int | None = Field(default=None, gt=0)
    """Rows in a shard; None cuts by bytes (64 MiB a layer)."""


class ReadingSection(Config):
    """How a model is read over a dataset; shared by `extract` and `encode`."""

    SECTION: ClassVar[str] = "extract"
    """The section's name in the configuration, for messages."""

    BOS_ENDS_PROMPT: ClassVar[bool] = True
    """Whether a BOS that the tokenizer adds may stand for a prompt without a token of its own."""

    hook_point: Literal[
        "resid_pre", "post_attn_resid", "post_attn_ln", "resid_post", "attn_out", "mlp_out"
    ] = "resid_post"
    """What to read in each block (see the concepts page); `post_mlp` is `resid_post`."""

    tokens: Literal["text", "all", "prompt_end", "response"] = "text"
    """Which tokens are kept: `text` all that are not special; `all` special ones too; `prompt_end`
    the last token before the response (of a text without a response, its last); `response` the
    tokens of the response, the one that straddles its beginning and special ones behind it
    included. A causal model computes nothing behind the last kept token. SAEs are mostly trained
    without special tokens, whose activations lie far from all others: with `all`, expect their
    latents to mean little. With a pooling, which chooses tokens itself, only `text` is allowed."""

    pooling: PoolingSection = PoolingSection()
    """How the rows of an example's tokens become one row."""

    contrast: ContrastSection = ContrastSection()
    """Read differences h_on - h_off between passes with and without a part of the model, in
    float32, in the place of activations."""

    limit_examples: int | None = Field(default=None, gt=0)
    """Stop after this many examples; None reads them all."""

    truncate: Literal["never", "left", "right"] = "never"
    """What to do with a text longer than the model's context: `never` skips and counts it, `right`
    drops its end, `left` its beginning."""

    max_bad_images: float = Field(default=0.01, ge=0, le=1)
    """Share of the images that may be bad: missing, cut off, no image, too large. Their examples
    are left out, counted, and named with the reason in the example table; more of them are an
    error."""

    nonfinite: Literal["stop", "mask"] = "stop"
    """What to do when an activation is NaN or infinite: `stop`, or `mask`: drop the row in all
    layers and count it for each layer."""

    token_budget: int = Field(default=DEFAULT_TOKEN_BUDGET, gt=0)
    """Tokens in one forward pass, padding counted; and patches of images, all tiles of each
    counted, which may be many more than the image has tokens."""

    save: SaveSection = SaveSection()
    """How the store is cut into files."""

    @property
    def in_float32(self) -> bool:
        """Whether rows are float32 whatever the model computes in: means and differences are."""
        return self.pooling.name != "none" or self.contrast.method != "none"

    def rows_dtype(self, computed: torch.dtype) -> torch.dtype:
        """Return the number format of rows, of a model that computes in another one."""
        return torch.float32 if self.in_float32 else computed

    @field_validator("hook_point", mode="before")
    @classmethod
    def _as_sites_spell_it(cls, given: object) -> object:
        """Accept other spellings of a place, such as post_mlp for resid_post."""
        try:
            return Site.parse(f"0.{given}").part
        except ConfigError:
            return given

    @model_validator(mode="after")
    def _one_choice_of_tokens(self) -> "ReadingSection":
        if self.tokens != "text" and self.pooling.name != "none":
            raise ValueError(
                f"tokens={self.tokens} keeps tokens as they are, and pooling.name="
                f"{self.pooling.name} chooses tokens itself: set tokens=text or pooling.name=none"
            )
        return self
