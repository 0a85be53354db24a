"""train: sparse autoencoders on extracted activations, and what each costs the model it reads."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from saefty import fsio
from saefty.config import Config, build_config, config_tree
from saefty.encoding import in_words
from saefty.engine import ThreadsSection
from saefty.errors import InputError, MismatchError
from saefty.fidelity import measure_loss_recovered
from saefty.models.base import ModelAdapter, ModelSection, load_model
from saefty.records import example_from
from saefty.runs import METADATA, Run, RunSection, find_run, read_metadata, run_folder
from saefty.saes.native import load_sae
from saefty.saes.section import SaeSection
from saefty.space import training_bytes
from saefty.stages.base import Outcome
from saefty.stores.activations import ActivationStore
from saefty.training import METRICS, TrainedSae, train_saes
from saefty.training_data import split_by_example
from saefty.training_settings import OptimizerSection, TrainSection

log = logging.getLogger(__name__)

PRINTED = (
    "fvu", "explained_variance", "l0_mean", "dead_share", "always_on_share", "loss_recovered",
)  # fmt: skip


class TrainStageSection(TrainSection):
    """What to train on, how long, and what to watch."""

    store: str = "latest"
    """An activation store: a run's folder or `latest`."""

    loss_recovered_examples: int = Field(default=64, ge=0)
    """Held-out examples on which the SAE is spliced into the model; 0 leaves that out."""


class TrainEngineSection(ThreadsSection):
    """How the process uses this machine."""

    overlap: bool = True
    """Read the next batch while the present one is learnt from. Off, memory holds one batch
    less, and nothing that the thread keeps for itself. Results do not depend on it."""


class TrainConfig(Config):
    """Configuration of `saefty train`."""

    ALIASES: ClassVar[dict[str, str]] = {"layers": "train.layers"}

    train: TrainStageSection = TrainStageSection()
    """What to train on, how long, and what to watch."""

    sae: SaeSection = SaeSection()
    """Which SAEs."""

    optimizer: OptimizerSection = OptimizerSection()
    """How weights move."""

    engine: TrainEngineSection = TrainEngineSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""


def run(
    cfg: TrainConfig,
    *,
    store: ActivationStore | None = None,
    model: ModelAdapter | None = None,
) -> Outcome:
    """Train SAEs; the same call on an existing folder resumes it.

    Args:
        cfg: The configuration.
        store: A store that is open already; None opens `cfg.train.store`.
        model: The model the store was made with, for the loss recovered; None loads it.
    """
    folder_of_store = store.folder if store else find_run(cfg.train.store, "extract", cfg.run.root)
    named = cfg.train.model_copy(update={"store": str(folder_of_store)})
    cfg = cfg.model_copy(update={"train": named})
    store = store or ActivationStore.open(folder_of_store)
    folder = run_folder(cfg.run, "sae")
    inputs = {"store": store.manifest["fingerprint"]}
    with Run(folder, "train", config_tree(cfg), inputs) as current:
        layers = cfg.train.layers or store.layers
        current.require_space(training_bytes(cfg.sae.configs(store.d_in), len(layers)))
        trained = train_saes(
            store,
            cfg.sae,
            cfg.train,
            cfg.optimizer,
            folder,
            metadata=_facts_of(store),
            threads=cfg.engine.threads,
            overlap=cfg.engine.overlap,
        )
        _add_loss_recovered(cfg, store, trained, model)
        current.ledger.ok = store.n_rows
        figures = {one.folder.name: _figures(one) for one in trained}
        for name, measured in figures.items():
            log.info("%s: %s", name, _in_words(measured))
        current.finish(figures)
    return Outcome("train", folder, figures)


def _facts_of(store: ActivationStore) -> dict[str, Any]:
    """Return what each SAE's cfg.json says of the rows it was trained on."""
    contrast = {} if store.contrast is None else {"contrast": store.contrast}
    return {"model_name": store.manifest.get("model_name") or None, **contrast}


def _add_loss_recovered(
    cfg: TrainConfig,
    store: ActivationStore,
    trained: list[TrainedSae],
    model: ModelAdapter | None,
) -> None:
    """Complete the metrics of each SAE with what it costs the model, or why that is not known."""
    waiting = [one for one in trained if "loss_recovered" not in _metrics(one)]
    if not waiting:
        return
    reason = _why_not(cfg, store)
    if reason is None:
        try:
            model = model or _model_of(store)
        except (InputError, MismatchError) as error:
            reason = f"the model could not be loaded: {error.message}"
    if reason is not None or model is None:
        log.info("loss recovered is left out: %s", reason)
        for one in waiting:
            _commit(one, {"loss_recovered": None, "loss_recovered_left_out": reason})
        return
    split = split_by_example(store, cfg.train.validation, cfg.train.seed, cfg.train.validation_rows)
    rows = split.held_out if split.held_out.any() else split.train
    chosen = np.unique(store.rows()["example"][rows])[: cfg.train.loss_recovered_examples]
    records = store.examples()
    items = model.tokenize([example_from(records[i]) for i in chosen], truncate="right")
    for one in waiting:
        try:
            figures = measure_loss_recovered(model, load_sae(one.folder), items).record()
        except MismatchError as error:  # an encoder has no next-token loss
            log.info("loss recovered is left out: %s", error.message)
            figures = {"loss_recovered": None, "loss_recovered_left_out": error.message}
        _commit(one, figures)


def _why_not(cfg: TrainConfig, store: ActivationStore) -> str | None:
    if not cfg.train.loss_recovered_examples:
        return "train.loss_recovered_examples is 0"
    if store.contrast is not None:
        return f"the store's rows are {in_words(store.contrast)}, not what the model computes"
    if store.manifest.get("pooling") != "none":
        return "the store's rows are pooled, so the SAE has no place in the forward pass"
    if not (store.folder / METADATA).exists():
        return f"{store.folder} does not say which model it was made with"
    return None


def _model_of(store: ActivationStore) -> ModelAdapter:
    section = build_config(ModelSection, read_metadata(store.folder)["config"]["model"])
    return load_model(**section.model_dump())


def _metrics(one: TrainedSae) -> dict[str, Any]:
    return dict(fsio.read_json(one.folder / METRICS))


def _commit(one: TrainedSae, figures: dict[str, Any]) -> None:
    fsio.commit_json(one.folder / METRICS, {**_metrics(one), **figures})


def _figures(one: TrainedSae) -> dict[str, Any]:
    metrics = _metrics(one)
    return {name: metrics.get(name) for name in PRINTED}


def _in_words(figures: Mapping[str, Any]) -> str:
    """Return an SAE's figures as one line."""
    shown = {name: value for name, value in figures.items() if value is not None}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
