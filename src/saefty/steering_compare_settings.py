"""What a person sets about a comparison of vectors: which ones, on what, and who judges."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from saefty.config import Config
from saefty.data.base import DataSection
from saefty.engine import ThreadsSection
from saefty.interventions.steer import Unit
from saefty.models.base import ModelSection
from saefty.runs import RunSection
from saefty.steering_settings import JudgedSection, Tokens


class AttributeSection(Config):
    """A further attribute of the replies, beside the behaviour that is steered to."""

    judge: str
    """The judge that scores it; `saefty list judges` names them."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of that judge."""


class CompareSection(JudgedSection):
    """Which vectors to compare, and on what."""

    vectors: dict[str, Path]
    """The vectors by name: `{caa: FOLDER, sae_ts: FOLDER}`; each says where it is added."""

    random: int = Field(default=3, ge=0)
    """Random directions beside them: what any vector of this length does."""

    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Strengths to try; 0 is always among them."""

    unit: Unit = "residual"
    """What alpha = 1 means: `residual` the direction, as long as activations are on average, which
    is one length for all vectors and the fair measure; `activation` the vector as it is, so that a
    long one is pushed further by the same grid; `latent` as long as what its latent adds at its
    largest value."""

    methods: tuple[Literal[1, 2], ...] = Field(default=(1,), min_length=1)
    """1 adds the vector; 2 adds it and keeps the activations' norm. Each vector is compared under
    each."""

    where: Tokens = "both"
    """At which tokens to act: both, prefill, decode, response, last, or a list of places."""

    attributes: dict[str, AttributeSection] = Field(default_factory=dict)
    """Other attributes that might move, by name."""

    sae: str | None = None
    """The SAE whose latents are watched for what else moves; None leaves that map out."""

    sae_id: str | None = None
    """Which SAE of a repository or release."""

    layer: int | None = None
    """Which of several SAEs, by the block it reads."""

    max_new_tokens: int = Field(default=32, gt=0)
    """Longest reply, in tokens."""

    seed: int = Field(default=0, ge=0)
    """Fixes the streams, the halves of the prompts, the random directions and the bootstrap."""

    batch_size: int = Field(default=64, gt=0)
    """Replies that are generated together."""

    coverage: float = Field(default=0.95, ge=0, le=1)
    """Share of the replies that must have both scores, on the prompts for choosing and on the
    others, for a strength to be chosen and drawn: one that breaks the model leaves few."""

    permutations: int = Field(default=2000, ge=100)
    """Exchanges for each p, at least; more are made where many pairs are compared."""


class CompareConfig(Config):
    """Configuration of `saefty steer compare`."""

    model: ModelSection
    """Which model to steer."""

    data: DataSection = DataSection()
    """The prompts to reply to."""

    harmless: DataSection | None = None
    """Text that should not change, for what a vector costs there; None leaves that out."""

    compare: CompareSection
    """Which vectors to compare, and on what."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""
