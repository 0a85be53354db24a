"""steer vector: make one vector to steer with, by any method, and keep it with its provenance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from saefty.config import Config
from saefty.data.base import DataSection, load_examples
from saefty.errors import ConfigError, MismatchError
from saefty.interventions.vectors import SteeringVector, load_vector
from saefty.latent_targets import parse_targets
from saefty.models.base import ModelAdapter, ModelSection, load_model
from saefty.records import Example, Site
from saefty.runs import find_run
from saefty.sae_ts.effects import read_effects
from saefty.sae_ts.scale import residual_norm
from saefty.sae_ts.vectors import Fit, targeted_vector
from saefty.saes.base import SparseAutoencoder
from saefty.steering_vectors import (
    POOLING,
    Pooling,
    caa_vector,
    check_sae,
    contrast,
    decoder_vector,
    latent_difference,
    latent_maximum,
    open_sae,
    random_vector,
)

Method = Literal[
    "decoder", "caa", "latent_difference", "sae_ts", "rotation", "pseudo_inverse", "random"
]
NEEDS = {
    "decoder": ("sae", "latents"),
    "caa": ("model",),
    "latent_difference": ("model", "sae"),
    "sae_ts": ("effects", "latents"),
    "rotation": ("effects", "latents"),
    "pseudo_inverse": ("effects", "latents"),
    "random": ("like",),
}
FITTED = ("sae", "sae_id", "layer", "latents", "effects", "lam", "fit", "penalty", "seed")
TAKES: dict[str, tuple[str, ...]] = {
    "decoder": ("sae", "sae_id", "layer", "latents"),
    "caa": ("layer", "hook_point", "pooling"),
    "latent_difference": ("sae", "sae_id", "layer", "pooling", "top"),
    "sae_ts": FITTED,
    "rotation": FITTED,
    "pseudo_inverse": FITTED,
    "random": ("like", "seed", "layer", "hook_point"),
}
"""Which settings mean something to each method; `method` and `norm` do to all."""
CONTRASTS = ("caa", "latent_difference")


def flag_of(key: str) -> str:
    """Return the option of the command line that sets a key."""
    return "--" + {"alphas": "alpha", "latents": "latent", "lam": "lambda"}.get(
        key, key.replace("_", "-")
    )


class MakingSection(Config):
    """How to make the vector."""

    method: Method
    """decoder, caa, latent_difference, random, sae_ts or its variants rotation, pseudo_inverse."""

    sae: str | None = None
    """The SAE: a training run, a folder, a repository or a release. For SAE-TS that of the run is
    taken where none is named."""

    sae_id: str | None = None
    """Which SAE of a repository or release."""

    layer: int | None = None
    """Which of several SAEs, by the block it reads; for caa the block to steer in."""

    hook_point: Literal[
        "resid_pre", "post_attn_resid", "post_attn_ln", "resid_post", "attn_out", "mlp_out"
    ] = "resid_post"
    """For caa: what to read, and change, in the block."""

    latents: tuple[str, ...] = ()
    """Latents to move, with weights: 12 or 12:0.5."""

    effects: str | None = None
    """A run of `saefty steer effects`, or `latest`."""

    lam: float = 1.0
    """λ of SAE-TS: how much of what every vector does is taken out."""

    fit: Fit = "ridge"
    """How SAE-TS fits effects: `ridge`, or gradient `descent`."""

    penalty: float | None = Field(default=None, gt=0)
    """Of the ridge fit; None chooses it by leaving vectors out."""

    pooling: Pooling | None = None
    """Which tokens of the contrast texts count: the `mean` over all, where None is set; those of
    the `response`; the `last`, which Rimsky et al. (2024) take of answers to multiple choice."""

    top: int | None = Field(default=None, gt=0)
    """For latent_difference: only the latents that differ most."""

    like: Path | None = None
    """For random: a vector whose place and length are taken."""

    norm: float | None = Field(default=None, gt=0)
    """Length of the vector; None leaves it as the method makes it."""

    seed: int = Field(default=0, ge=0)
    """Of what is drawn at random."""


class VectorConfig(Config):
    """What `saefty steer vector` does."""

    vector: MakingSection
    """How to make the vector."""

    model: ModelSection | None = None
    """The model; needed for contrasts, and to measure lengths."""

    positive: DataSection | None = None
    """Texts that show the behaviour."""

    negative: DataSection | None = None
    """Texts that do not."""

    texts: DataSection | None = None
    """Texts on which the lengths in which alpha can be counted are measured."""


def run(cfg: VectorConfig, *, model: ModelAdapter | None = None) -> SteeringVector:
    """Make a vector.

    Args:
        cfg: What to make it from.
        model: A model that is loaded already; None loads `cfg.model` where it is needed.

    Raises:
        ConfigError: If the method lacks something, or a latent is out of range.
        InputError: If a contrast has one side only.
        MismatchError: If model, SAE and effects do not belong together.
        NumericError: If nothing is left of the vector.
    """
    making = cfg.vector
    _check_needs(cfg, model)
    sides = _sides(cfg)
    if model is None and cfg.model is not None:
        model = load_model(**cfg.model.model_dump())
    vector, sae = _made(making, model, sides)
    if model is not None:
        vector.check_model(model)
        measured = [*load_examples(cfg.texts)] if cfg.texts else [*sides[0], *sides[1]]
        vector = _with_norms(vector, model, sae, measured)
    if making.norm is not None:
        vector = SteeringVector(
            vector.unit * making.norm, vector.site, vector.method, vector.norms, vector.provenance
        )
    return vector


def _made(
    making: MakingSection,
    model: ModelAdapter | None,
    sides: tuple[Sequence[Example], Sequence[Example]],
) -> tuple[SteeringVector, SparseAutoencoder | None]:
    """Return the vector and the SAE it was made with, if any."""
    targets = parse_targets(making.latents)
    if making.method == "random":
        place = None if making.layer is None else Site(making.layer, making.hook_point)
        like = load_vector(making.like or "", place, how="Name its block too: --layer 20.")
        return random_vector(like.d_model, like.site, norm=like.norm, seed=making.seed), None
    if making.method == "caa":
        assert model is not None  # `_check_needs` has seen to it
        site = Site(making.layer or 0, making.hook_point)
        model.info.check_sites([site])
        return caa_vector(model, site, *sides, pooling=making.pooling or POOLING), None
    if making.method in ("decoder", "latent_difference"):
        sae = open_sae(making.sae or "", making.sae_id, making.layer)
        if making.method == "decoder":
            if model is not None:
                check_sae(sae, model)
            return decoder_vector(sae, targets), sae
        assert model is not None  # as above
        pooling = making.pooling or POOLING
        return latent_difference(model, sae, *sides, top=making.top, pooling=pooling), sae
    assert making.method != "decoder"
    assert making.method != "latent_difference"
    effects = read_effects(find_run(making.effects or "", "effects"))
    source = making.sae or effects.facts.get("sae")
    if source is None:
        raise MismatchError(
            f"{making.effects} does not say where its SAE lies.", then="Name it: --sae FOLDER."
        )
    sae = open_sae(str(source), making.sae_id, making.layer)
    vector = targeted_vector(
        effects,
        sae,
        targets,
        way=making.method,
        lam=making.lam,
        fit=making.fit,
        penalty=making.penalty,
        seed=making.seed,
    )
    return vector, sae


def _check_needs(cfg: VectorConfig, model: ModelAdapter | None) -> None:
    """Refuse what a method cannot do without, or does nothing with, before anything is loaded."""
    making, method = cfg.vector, cfg.vector.method
    given = {**making.model_dump(), "model": cfg.model or model}
    missing = [flag_of(name) for name in NEEDS[method] if not given[name]]
    if method == "caa" and making.layer is None:
        missing.append("--layer")
    if missing:
        raise ConfigError(
            f"the method {method} needs {' and '.join(missing)}.",
            then="Give it; saefty steer vector --help says what each method needs.",
        )
    asked = [name for name in sorted(making.model_fields_set) if given[name] not in (None, ())]
    idle = [flag_of(name) for name in asked if name not in (*TAKES[method], "method", "norm")]
    if method not in CONTRASTS:
        idle += [f"--{side}" for side in ("positive", "negative") if getattr(cfg, side)]
    if making.penalty is not None and making.fit != "ridge":
        idle.append(f"--penalty with --fit {making.fit}")
    if cfg.texts and not given["model"]:
        idle.append("--texts without --model, which reads them,")
    if idle:
        sides = ("--positive", "--negative") if method in CONTRASTS else ()
        takes = [*map(flag_of, TAKES[method]), *sides, "--norm", "--model", "--texts"]
        raise ConfigError(
            f"{' and '.join(idle)} would do nothing for the method {method}.",
            then=f"Leave it out; {method} takes {', '.join(takes)}.",
        )


def _sides(cfg: VectorConfig) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the contrast texts; both sides, where the method takes them."""
    read = [load_examples(side) if side else [] for side in (cfg.positive, cfg.negative)]
    if cfg.vector.method in CONTRASTS:
        return contrast(*read)
    return read[0], read[1]


def _with_norms(
    vector: SteeringVector,
    model: ModelAdapter,
    sae: SparseAutoencoder | None,
    texts: Sequence[Example],
) -> SteeringVector:
    """Return the vector with the lengths that can be measured on some texts."""
    if not texts:
        return vector
    vector = vector.with_norms(residual=residual_norm(model, vector.site, texts))
    if sae is not None and vector.method == "decoder":
        targets = {int(latent): weight for latent, weight in vector.provenance["latents"]}
        vector = vector.with_norms(latent=latent_maximum(model, sae, targets, texts))
    return vector
