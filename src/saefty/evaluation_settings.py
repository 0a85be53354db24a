"""What a person sets about an evaluation or a comparison of detectors."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from saefty.config import Config


class EvalSection(Config):
    """Which features to evaluate, and how."""

    features: str | None = None
    """A feature store: a run's folder or `latest`."""

    sae: str | None = None
    """With `eval.store`: a training run or an SAE, applied to the store on the way."""

    store: str | None = None
    """An activation store, a run's folder or `latest`: what `eval.sae` encodes. Beside
    `eval.features`: activations of the same examples, which the model need not read again."""

    layers: tuple[int, ...] | None = None
    """Layers to evaluate; None takes all in the store."""

    pooling: Literal["max", "mean", "sum", "last"] = "max"
    """How the latents of an example's tokens become one row."""

    topk_latents: int = Field(default=50, gt=0)
    """Latents that are chosen on one half and reported on the other."""

    ranked_by: str = "consensus"
    """The score that chooses them; `saefty list metrics` names them."""

    drop_missing_labels: bool = False
    """Leave out examples without a label instead of refusing them."""

    permutations: int = Field(default=1000, ge=100)
    """Labellings of the permutation test of the maximum."""

    boots: int = Field(default=1000, ge=100)
    """Draws of each bootstrap."""

    baselines: bool = True
    """Also measure dense probes, a random SAE and raw neurons; needs the model or the store."""

    seed: int = Field(default=0, ge=0)
    """Fixes the split, the permutations and the bootstrap."""


class InterventionSection(Config):
    """What to silence, in the stored activations and in the real forward pass."""

    enabled: bool = True
    """Whether to silence latents at all."""

    forward: bool = True
    """Also silence them while the model replies, which needs the model; False stays with the
    stored activations."""

    method: Literal["gate", "subtract"] = "gate"
    """`gate` takes what the latents contribute out of the activations, `subtract` takes out
    `intervention.strength` times as much; with a strength of 1 the two are the same."""

    strength: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of `subtract`: c in h - c Σ z_k W_k; above 1 it over-corrects. `gate` is c = 1."""

    false_alarms: float = Field(default=0.05, gt=0, lt=1)
    """Where a probe calls an activation harmful: at this share of harmless examples of the
    selection half."""

    latents: tuple[int, ...] | None = None
    """Which latents to silence, in this order; None takes those that pass both tests of the
    selection half, best first."""

    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """How many latents to silence, one after the other."""

    judge: str = "refusal"
    """The judge of behaviour; `saefty list judges` names them."""

    judge_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of that judge, such as a pattern."""

    fluency: str = "perplexity"
    """The judge of fluency."""

    fluency_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the judge of fluency; `perplexity` has none."""

    max_new_tokens: int = Field(default=64, gt=0)
    """Longest reply, in tokens."""

    prompts: int = Field(default=256, gt=0)
    """At most this many prompts of the report half, as many harmful as harmless ones."""

    batch_size: int = Field(default=32, gt=0)
    """Most prompts in one forward pass."""

    @model_validator(mode="after")
    def _one_meaning(self) -> "InterventionSection":
        if self.method == "gate" and self.strength != 1.0:
            raise ValueError(
                f"intervention.strength is {self.strength:g}, but intervention.method=gate takes "
                "out what latents contribute exactly once; set intervention.method=subtract, or "
                "leave the strength at 1"
            )
        if not self.counts or min(self.counts) < 1:
            raise ValueError(
                "intervention.counts says how many latents to silence, one after the other, each "
                f"at least 1, not {list(self.counts)}"
            )
        return self


class ProbeSection(Config):
    """Which features to compare with other inputs, and how."""

    features: str | None = None
    """A feature store: a run's folder or `latest`."""

    sae: str | None = None
    """With `probe.store` and without `probe.features`: a training run or an SAE, applied to the
    store on the way."""

    store: str | None = None
    """An activation store, a run's folder or `latest`: what `probe.sae` encodes. Beside
    `probe.features`: activations of the same examples, so that the model is not run again."""

    layers: tuple[int, ...] | None = None
    """Layers to compare; None takes all in the store."""

    poolings: tuple[Literal["max", "mean", "last"], ...] = ("max", "mean", "last")
    """How the latents and activations of an example's tokens become one row; which one a detector
    uses is chosen on folds of the training side."""

    k: tuple[int, ...] | None = None
    """How many latents the k-sparse probes read; None takes those of 1, 2, 5, 16, 64 that are not
    more than there are."""

    test_share: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the examples that detectors are judged on; whole prompt groups."""

    balanced: bool = True
    """Also train on a subset with as many harmful as harmless examples, if there is one."""

    leave_one_source_out: bool = True
    """Also train on all sources but one, and judge on that one."""

    one_vs_rest: bool = True
    """Also tell each category from all other examples."""

    baselines: bool = True
    """Compare with dense activations and a random SAE; needs the model or the store."""

    drop_missing_labels: bool = False
    """Leave out examples without a label instead of refusing them."""

    permutations: int = Field(default=2000, ge=100)
    """Exchanges of the paired permutation test, at least; 100 for each pair where there are many
    pairs."""

    boots: int = Field(default=1000, ge=100)
    """Draws of each bootstrap."""

    seed: int = Field(default=0, ge=0)
    """Fixes split, folds, random directions, permutations and bootstrap."""

    save: Path | None = None
    """Write a detector into this folder, as a guard."""

    save_detector: str | None = None
    """Which one, by the name in the report's table; None takes the one with the least loss on
    folds of the training side."""
