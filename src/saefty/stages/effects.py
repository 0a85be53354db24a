"""effects: what many steering vectors do to the latents of the text a model writes (SAE-TS data).

The vectors and their scale are fixed first, then measured batch by batch; a run that was cut short
measures the batches that are missing. What is learned from them is separate and cheap: `saefty
steer vector --method sae_ts`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.engine import ThreadsSection
from saefty.errors import ConfigError
from saefty.latent_targets import sae_facts
from saefty.log import progress
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example, Site
from saefty.runs import Run, RunSection, find_run, run_folder
from saefty.sae_ts.effects import (
    BASELINE,
    PLAN,
    Effects,
    Kind,
    Piece,
    piece_path,
    pieces_of,
    read_effects,
    read_means,
    read_plan,
    training_vectors,
    write_means,
    write_plan,
)
from saefty.sae_ts.rollouts import Rollouts, measure, plan_rollouts
from saefty.sae_ts.scale import find_scale, residual_norm
from saefty.saes.base import SparseAutoencoder
from saefty.stages.base import (
    Outcome,
    data_inputs,
    existing_folder,
    model_inputs,
    open_data,
    open_model,
    settle_arithmetic,
)
from saefty.steering import check_prompts
from saefty.steering_vectors import check_sae, open_sae

log = logging.getLogger(__name__)

SCALE_TEXTS, SCALE_VECTORS = 8, 16
"""How many are drawn to find the scale on."""
PIECE_ROLLOUTS = 8
"""Rollouts of each vector between two commits: what a run that is cut short loses at most."""
KIND = "effects"


class EffectsSection(Config):
    """Which vectors to try, and how."""

    sae: str = "latest"
    """The SAE whose latents are watched: a training run, a folder, a release, or `latest`."""

    sae_id: str | None = None
    """Which SAE of a repository or release."""

    layer: int | None = None
    """Which of several SAEs, by the block it reads."""

    vectors: int = Field(default=1500, ge=20)
    """How many training vectors."""

    kind: Kind = "mixed"
    """`random` directions, `decoder` rows of latents, or `mixed`: half of each."""

    rollouts: int = Field(default=32, gt=0)
    """Texts written under each vector, from the prompts in turn."""

    max_new_tokens: int = Field(default=16, gt=0)
    """Longest of these texts, in tokens."""

    temperature: float = Field(default=1.0, ge=0)
    """Of sampling; every vector draws the same random numbers."""

    loss_rise: float = Field(default=1.0, gt=0)
    """The vectors are as long as raises the loss on clean text by this much, in nats a token."""

    scale: float | None = Field(default=None, gt=0)
    """The vectors' length in units of the activations; None finds it by `loss_rise`."""

    batch_rows: int = Field(default=1024, gt=0)
    """Texts written side by side: one of each of so many vectors, from the same prompt."""

    seed: int = 0
    """Of the vectors and of sampling."""


class EffectsConfig(Config):
    """Configuration of `saefty steer effects`."""

    model: ModelSection
    """Which model to run, and how."""

    data: DataSection = DataSection()
    """What the rollouts start from."""

    clean: DataSection | None = None
    """Clean text, on which the loss is taken; None takes `data`."""

    effects: EffectsSection = EffectsSection()
    """Which vectors to try, and how."""

    engine: ThreadsSection = ThreadsSection()
    """How the work is done on this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""


def run(
    cfg: EffectsConfig,
    *,
    model: ModelAdapter | None = None,
    sae: SparseAutoencoder | None = None,
    examples: Sequence[Example] | None = None,
    clean: Sequence[Example] | None = None,
) -> Outcome:
    """Measure effects into a folder; the same call on an existing folder resumes it.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads `cfg.model`.
        sae: An SAE that is loaded already; None loads `cfg.effects.sae`.
        examples: Prompts that are read already; None reads `cfg.data`.
        clean: Clean text that is read already; None reads `cfg.clean`, or takes the prompts.

    Raises:
        ConfigError: If more decoder rows are asked for than there are, or the loss does not rise.
        MismatchError: If SAE and model do not belong together.
    """
    if sae is None and cfg.effects.sae == "latest":
        found = str(find_run("latest", "sae", cfg.run.root))
        cfg = cfg.model_copy(update={"effects": cfg.effects.model_copy(update={"sae": found})})
    section = cfg.effects
    prompts = open_data(cfg.data, examples)
    check_prompts(prompts)
    texts = (
        prompts
        if clean is None and cfg.clean is None
        else open_data(cfg.clean or DataSection(), clean)
    )
    sae = sae or open_sae(section.sae, section.sae_id, section.layer)
    settle_arithmetic(cfg.engine, existing_folder(cfg.run, KIND))
    model = model or open_model(cfg.model, [sae.site] if sae.site else [])
    site = check_sae(sae, model)
    sae = sae.to(model.device)
    folder = run_folder(cfg.run, KIND)
    inputs = {
        "model": model_inputs(model),
        "sae": sae_facts(sae)["sae_xxh3_128"],
        "data": data_inputs(prompts),
        "clean": data_inputs(texts),
        "threads": torch.get_num_threads(),
    }
    with Run(folder, KIND, config_tree(cfg), inputs) as current:
        if not (folder / PLAN).exists():
            _plan(folder, section, model, sae, site, texts)
        vectors, facts = read_plan(folder)
        rollouts = plan_rollouts(
            prompts,
            section.rollouts,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            seed=section.seed,
        )
        steps = facts["scale"] * torch.from_numpy(vectors)
        _measure(folder, model, sae, site, steps, rollouts, pieces_of(facts, len(steps)))
        effects = read_effects(folder)
        current.ledger.ok = len(effects.vectors)
        current.ledger.failed.update({"wrote nothing": effects.silent} if effects.silent else {})
        figures = _figures(effects)
        current.finish(figures)
    return Outcome(KIND, folder, figures)


def _plan(
    folder: Path,
    section: EffectsSection,
    model: ModelAdapter,
    sae: SparseAutoencoder,
    site: Site,
    texts: Sequence[Example],
) -> None:
    """Draw the vectors, find their length, and write both down."""
    units = training_vectors(section.kind, section.vectors, sae, seed=section.seed)
    rng = np.random.default_rng([section.seed, 11])
    read = sorted(rng.permutation(len(texts))[:SCALE_TEXTS].tolist())
    tried = sorted(rng.permutation(len(units))[:SCALE_VECTORS].tolist())
    some = [texts[n] for n in read]
    if section.scale is None:
        search = find_scale(model, site, units[tried], some, rise=section.loss_rise)
        found: dict[str, Any] = {
            "scale": search.scale,
            "residual": search.residual,
            "loss_clean": search.clean,
            "loss_rise": search.rise,
            "tried": [list(pair) for pair in search.tried],
            "scale_vectors": tried,
        }
    else:
        found = {"scale": section.scale, "residual": residual_norm(model, site, some)}
    facts = {
        **found,
        "scale_texts": [one.id for one in some],
        "site": site.name,
        "d_sae": sae.d_sae,
        "batch_vectors": _evenly(len(units), section.batch_rows),
        "rollouts": section.rollouts,
        "piece_rollouts": PIECE_ROLLOUTS,
        **sae_facts(sae),
        "model": model.name,
    }
    write_plan(folder, units, facts)


def _measure(
    folder: Path,
    model: ModelAdapter,
    sae: SparseAutoencoder,
    site: Site,
    steps: Float[Tensor, "vectors d_model"],
    rollouts: Rollouts,
    pieces: Sequence[Piece],
) -> None:
    """Measure what is missing: the texts without steering, then those of each piece."""
    missing = [piece for piece in pieces if not piece_path(folder, piece.index).exists()]
    for piece in pieces:
        if piece not in missing:  # a damaged piece stops the run before work is built on it
            read_means(piece_path(folder, piece.index), sae.d_sae)
    if not (folder / BASELINE).exists():
        plain = measure(model, sae, site, None, rollouts)
        if not plain.tokens[0]:
            raise ConfigError(
                f"without steering, the model writes nothing in {len(rollouts.rows)} rollouts.",
                then="Give prompts that the model continues.",
            )
        write_means(folder / BASELINE, plain)
    texts = {piece: _length(piece.vectors) * _length(piece.rollouts) for piece in pieces}
    done = sum(texts.values()) - sum(texts[piece] for piece in missing)
    with progress("measuring effects", sum(texts.values()), "texts", done) as bar:
        for piece in missing:
            some = replace(rollouts, rows=rollouts.rows[slice(*piece.rollouts)])
            found = measure(model, sae, site, steps[slice(*piece.vectors)], some)
            write_means(piece_path(folder, piece.index), found)
            bar.advance(texts[piece])


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _evenly(count: int, most: int) -> int:
    """Return the size of as few groups as hold `count`, none larger than `most`."""
    return -(-count // -(-count // most))


def _figures(effects: Effects) -> dict[str, Any]:
    fired = effects.steered.getnnz(axis=0) > 0
    facts = effects.facts
    return {
        "vectors": len(effects.vectors),
        "silent": effects.silent,
        "scale": effects.scale,
        "scale_in_residual_norms": effects.scale / facts["residual"],
        "loss_rise": facts.get("loss_rise"),
        "latents_fired": int(fired.sum()),
        "latents": effects.d_sae,
        "stored_share": effects.steered.nnz / max(effects.steered.shape[0] * effects.d_sae, 1),
    }
