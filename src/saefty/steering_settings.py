"""What a person sets about steering: with which vector, how strongly and where, on which scale."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from saefty.config import Config
from saefty.errors import ConfigError
from saefty.interventions.base import Where, require_where
from saefty.interventions.steer import Unit

MOST_ALPHAS = 1000
"""Most strengths of a sweep."""
LONGEST_NAME = 48
"""Characters of what a behaviour is called where the judge's settings say it."""


def _checked(where: Where) -> Where:
    require_where(where)
    return where


Tokens = Annotated[Where, AfterValidator(_checked)]
"""At which tokens to act, as a configuration checks it."""


class VectorSection(Config):
    """Which vector to steer with, and what one alpha of it means."""

    vector: Path | None = None
    """A vector that was saved: its folder or file."""

    sae: str | None = None
    """With `steer.latent`: an SAE's folder, a repository of the hub, or a release."""

    sae_id: str | None = None
    """Which SAE of a repository or release `steer.sae` names."""

    latent: int | None = Field(default=None, ge=0)
    """The latent whose decoder row is the vector, as the SAE defines it."""

    layer: int | None = Field(default=None, ge=0)
    """The block to steer in; None takes the one that the vector or the SAE names."""

    hook_point: str | None = None
    """What to change in the block; None takes what the vector or the SAE names, else
    `resid_post`."""

    normalize: bool = False
    """Take the vector's direction with length 1 instead of the vector as it is."""

    unit: Unit = "activation"
    """What alpha = 1 means: `activation` the vector as it is; `residual` its direction, as long as
    activations at the site are on average over the prompts given here, whatever the vector was made
    on, so that it is one length for all vectors; `latent` as long as what its latent adds at its
    largest value, which a saved vector brings along."""

    latent_max: float | None = Field(default=None, gt=0)
    """With `steer.sae` and `steer.unit=latent`: the latent's largest value; None measures it on the
    prompts."""

    where: Tokens = "both"
    """At which tokens to act: both, prefill (those of the prompt), decode (those generated),
    response, last (the last one of the prompt), or a list of places, counted from 0."""

    skip_special: bool = True
    """Leave special tokens alone; a BOS has several times the norm of other tokens."""

    ALIASES: ClassVar[dict[str, str]] = {"feature": "latent", "feature_id": "latent"}

    @model_validator(mode="after")
    def _one_vector(self) -> "VectorSection":
        given = self.latent is not None or self.sae is not None
        if given == (self.vector is not None) or (self.latent is None) != (self.sae is None):
            named = {"vector": self.vector, "sae": self.sae, "latent": self.latent}
            told = ", ".join(f"{key}={value}" for key, value in named.items() if value is not None)
            raise ValueError(
                "a vector is either vector (one that was saved), or sae and latent (a row of that "
                f"SAE's decoder), but given are {told or 'none of them'}"
            )
        if self.latent_max is not None and (self.sae is None or self.unit != "latent"):
            raise ValueError(
                f"latent_max={self.latent_max:g} is the largest value of the latent of an SAE, in "
                f"units of which unit=latent counts alpha; but unit is {self.unit}"
                + ("" if self.sae is not None else " and the vector is one that was saved")
                + ", so it would do nothing"
            )
        return self


class JudgedSection(Config):
    """How steered replies are drawn and judged, by a sweep and by a comparison alike."""

    judge: str
    """The judge of behaviour; `saefty list judges` names them."""

    judge_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of that judge, such as a pattern, words, or a criterion."""

    fluency: str = "perplexity"
    """The judge of fluency, or coherence. `perplexity` compares with the model's own replies, which
    score 1 by definition."""

    fluency_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the judge of fluency."""

    behaviour_name: str | None = None
    """What the behaviour is called in tables and pictures; None says what the judge looks for."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; above, each prompt draws from a stream of its own, the same one
    under every vector, method and strength."""

    boots: int = Field(default=1000, ge=100)
    """Draws of each bootstrap."""

    @property
    def behaviour(self) -> str:
        """What the behaviour is called."""
        return self.behaviour_name or _looked_for(self.judge, self.judge_options)


class SweepSection(JudgedSection, VectorSection):
    """What to sweep over, and how to judge the replies."""

    alphas: tuple[float, ...] | None = None
    """The grid, as numbers; None takes `alpha_count` of them from `alpha_from` to `alpha_to`."""

    alpha_from: float = -300.0
    """The least alpha of an even grid."""

    alpha_to: float = 300.0
    """The largest alpha of an even grid."""

    alpha_count: int = Field(default=20, gt=0)
    """How many alphas an even grid has, both ends included."""

    anchors: tuple[float, ...] = ()
    """Alphas that are in the grid whatever else is, and are marked in the pictures, such as a
    published one. 0 is always in it."""

    methods: tuple[Literal[1, 2], ...] = Field(default=(1, 2), min_length=1)
    """1 adds the vector; 2 adds it and brings the activations back to their norm."""

    max_new_tokens: int = Field(default=64, gt=0)
    """Longest reply, in tokens."""

    seed: int = Field(default=0, ge=0)
    """Fixes the streams and the bootstrap."""

    batch_size: int = Field(default=32, gt=0)
    """Replies that are generated together; a batch holds several alphas."""

    coverage: float = Field(default=0.95, ge=0, le=1)
    """Share of a curve's replies that must have a score for its picture to be drawn, and of one
    alpha's replies for that alpha to be named the best."""


def _looked_for(judge: str, options: Mapping[str, Any]) -> str:
    """Return in words what a judge looks for in a reply."""
    asked = options.get("criterion", options.get("pattern", options.get("target")))
    words = {
        "openai": f"“{asked}”",
        "regex": f"a match of {asked}",
        "language": f"sentences in {asked}",
        "lexicon": "share of listed words",
        "refusal": "refusal",
        "guard": "what the guard detects",
        "sandbox_refusal": "refusal",
    }
    told = words.get(judge, f"what {judge} looks for")
    return told if len(told) <= LONGEST_NAME else told[: LONGEST_NAME - 1] + "…"


def alpha_grid(section: SweepSection) -> tuple[float, ...]:
    """Return the alphas of a sweep in ascending order: the grid, the anchors and 0, each once.

    Raises:
        ConfigError: If the grid has no spread, or more alphas than anyone looks at.
    """
    if section.alphas is None:
        ends = (section.alpha_from, section.alpha_to)
        if ends[0] == ends[1] or section.alpha_count < 2:
            raise ConfigError(
                f"the grid of alphas has no spread: {section.alpha_count} from {ends[0]:g} to "
                f"{ends[1]:g}.",
                then="Set steer.alpha_from and steer.alpha_to to different numbers and "
                "steer.alpha_count to 2 or more, or name the alphas: steer.alphas=[60,120].",
            )
        _check_count(section.alpha_count)
        grid: Sequence[float] = np.linspace(*ends, section.alpha_count).tolist()
    else:
        _check_count(len(section.alphas))
        grid = section.alphas
    found = sorted({float(alpha) + 0.0 for alpha in (*grid, *section.anchors, 0.0)})
    if len(found) < 2:
        raise ConfigError(
            f"the grid of alphas has no spread: steer.alphas is {list(grid)}, and 0 is always in "
            "it.",
            then="Set steer.alphas to at least one number that is not 0.",
        )
    return tuple(found)


def _check_count(count: int) -> None:
    if count > MOST_ALPHAS:
        raise ConfigError(
            f"the grid has {count:,} alphas; at most {MOST_ALPHAS:,} are swept, for every prompt "
            "is replied to at each of them.",
            then="Set steer.alpha_count lower: 20 is usual. A second sweep can look closer at a "
            "part of the range.",
        )
