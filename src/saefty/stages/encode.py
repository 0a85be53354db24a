"""encode: the sparse features of every token of a dataset, by any number of SAEs at once."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.diagnosis.gate import odd_features
from saefty.encoding import (
    EncodedPiece,
    EncodedStoredPiece,
    Encoding,
    StoredEncoding,
    check_against_store,
    check_saes,
    finish_features,
)
from saefty.engine import EngineSection, Step, share_out
from saefty.errors import ConfigError, ResourceError
from saefty.log import progress
from saefty.models.base import ModelAdapter, ModelSection
from saefty.models.contrast import require_contrast
from saefty.pieces import PieceReader
from saefty.piecework import do_pieces
from saefty.reading import PLAN, ReadingSection, prepare
from saefty.records import Example
from saefty.runs import Run, RunSection, find_run, run_folder
from saefty.sae_sets import SaeSet, open_saes, warn_of_other_model
from saefty.saes.base import SparseAutoencoder
from saefty.space import feature_bytes, planned_rows
from saefty.stages.base import (
    Outcome,
    arithmetic_inputs,
    data_inputs,
    existing_folder,
    model_inputs,
    open_data,
    open_model,
    settle_arithmetic,
    workers_model,
)
from saefty.stores.activations import ActivationStore
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import KIND, FeatureStore, Key

log = logging.getLogger(__name__)


class EncodeSection(ReadingSection):
    """Which SAEs to apply, and to what."""

    SECTION: ClassVar[str] = "encode"

    sae: str | tuple[str, ...] = "latest"
    """Which SAEs: a training run's folder, one SAE's folder, a repository of the hub, a release, or
    `latest`; several as a list, or as words with commas between them. All read one forward pass."""

    sae_id: str | tuple[str, ...] | None = None
    """Which SAEs of a repository or release: as many as `sae` names, or several of one."""

    store: str | None = None
    """An activation store to encode instead of running a model: a run's folder or `latest`."""

    layers: tuple[int, ...] | None = None
    """Encode these layers only; None encodes every layer that has an SAE. Of SAEs that do not say
    which block they read: the block of all of them, or one for each that `sae` names."""

    @field_validator("sae", "sae_id")
    @classmethod
    def _words_between_commas(
        cls, given: str | tuple[str, ...] | None
    ) -> str | tuple[str, ...] | None:
        if isinstance(given, str) and "," in given and not Path(given).exists():
            given = tuple(word.strip() for word in given.split(","))
        if given is not None and (not given or not all(given)):
            raise ValueError("name at least one, and none of them empty")
        return given


class EncodeEngineSection(EngineSection):
    """How work is shared out on this machine. Results do not depend on it."""

    sae_memory_gb: float | None = Field(default=None, ge=0)
    """Memory that SAEs may fill in each process, in 10⁹ bytes; those that do not fit are loaded
    anew for each piece, one at a time. None takes half of what is free, shared by the workers."""


class EncodeConfig(Config):
    """Configuration of `saefty encode`."""

    ALIASES: ClassVar[dict[str, str]] = {
        f"encode.model.{key}": f"model.{key}" for key in ModelSection.model_fields
    }

    model: ModelSection | None = None
    """Which model to run; not needed with `encode.store`."""

    data: DataSection = DataSection()
    """Which data to read; not needed with `encode.store`."""

    encode: EncodeSection = EncodeSection()
    """Which SAEs to apply, and to what."""

    engine: EncodeEngineSection = EncodeEngineSection()
    """How the work is shared out on this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""

    @model_validator(mode="after")
    def _one_source(self) -> "EncodeConfig":
        if (self.model is None) == (self.encode.store is None):
            given = "neither is given" if self.model is None else "both are given"
            raise ValueError(
                "set either model.name (to read a dataset) or encode.store (to read a store); "
                f"{given}"
            )
        return self


def run(
    cfg: EncodeConfig,
    *,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
    saes: Mapping[Key, SparseAutoencoder] | Mapping[int, SparseAutoencoder] | None = None,
) -> Outcome:
    """Encode tokens into a feature store; the same call on an existing folder resumes it.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads `cfg.model`.
        examples: Examples that are read already; None reads `cfg.data`.
        saes: SAEs that are loaded already, by layer (further ones of a layer by `<layer>__<name>`);
            None loads `cfg.encode.sae`.
    """
    cfg = _resolved(cfg, load=saes is None)
    chosen = _chosen(cfg, saes)
    inputs: dict[str, Any] = {
        "saes": {str(key): record.checksum for key, record in chosen.records.items()}
    }
    threads = settle_arithmetic(cfg.engine, existing_folder(cfg.run, "features"))
    if cfg.encode.store is not None:
        inputs |= {"threads": threads, **arithmetic_inputs()}
        return _encode_store(cfg, chosen.placed("cpu"), inputs)
    assert cfg.model is not None  # the configuration has one source
    texts = open_data(cfg.data, examples)
    worker_model = workers_model(cfg.engine, cfg.model, model)
    model = model or open_model(cfg.model, chosen.sites)
    contrast = cfg.encode.contrast
    read = None
    if contrast.method != "none":
        require_contrast(model, chosen.sites, contrast, cfg.encode.SECTION)
        read = contrast.model_dump()
    check_saes(chosen.records, model.d_model, model.name, read)
    chosen = chosen.placed(model.device)
    warn_of_other_model(chosen.records, model.name)
    folder = run_folder(cfg.run, "features")
    inputs.update(model=model_inputs(model), data=data_inputs(texts), kernels=chosen.kernels)
    with Run(folder, "encode", config_tree(cfg), inputs) as current:
        reading = prepare(model, texts, cfg.encode, len(chosen.sites))
        current.ledger = reading.ledger
        current.require_space(feature_bytes(planned_rows(reading, cfg.encode), chosen.fired))
        key = current.fingerprint
        writer = StoreWriter(folder, KIND, key)
        work = EncodedPiece(PieceReader(model, chosen.sites, cfg.encode), chosen, writer)
        elsewhere = (
            Encoding(
                worker_model, chosen.sites, cfg.encode, chosen, folder, key, cfg.engine.workers
            )
            if worker_model
            else None
        )
        ordered = do_pieces(
            writer, reading, work, elsewhere, cfg.engine, model.release, work.reader.check
        )
        whole = cfg.encode.tokens == "all"
        store = finish_features(
            writer,
            ordered,
            chosen,
            model_name=model.name,
            extra=[EXAMPLES, PLAN],
            bos_id=model.tokenizer.bos_token_id if whole else None,
        )
        return _finish(current, store)


def _chosen(
    cfg: EncodeConfig,
    saes: Mapping[Key, SparseAutoencoder] | Mapping[int, SparseAutoencoder] | None,
) -> SaeSet:
    if saes is None:
        return open_saes(
            _listed(cfg.encode.sae),
            _listed(cfg.encode.sae_id),
            cfg.encode.layers,
            cfg.engine.sae_memory_gb,
            cfg.encode.hook_point,
        )
    if cfg.engine.workers > 1:
        raise ConfigError(
            f"engine.workers is {cfg.engine.workers}, but SAEs that were handed over as objects "
            "live in this process alone.",
            then="Name the SAEs in the configuration (encode.sae), or set engine.workers=1.",
        )
    return SaeSet.of(saes, cfg.encode.hook_point)


def _encode_store(cfg: EncodeConfig, saes: SaeSet, inputs: dict[str, Any]) -> Outcome:
    store = ActivationStore.open(cfg.encode.store or "")
    check_against_store(saes.records, store)
    folder = run_folder(cfg.run, "features")
    inputs.update(kernels=saes.kernels, store=store.manifest["fingerprint"])
    with Run(folder, "encode", config_tree(cfg), inputs) as current:
        current.ledger.ok = store.n_rows
        current.require_space(feature_bytes(store.n_rows, saes.fired))
        store.copy_examples(folder)
        writer = StoreWriter(folder, KIND, current.fingerprint)
        records = writer.done()
        tasks = [index for index in range(len(store.pieces)) if index not in records]
        workers = cfg.engine.workers
        with progress("encoding", store.n_rows, "rows") as bar:
            for record in share_out(
                tasks,
                len(tasks),
                EncodedStoredPiece(store, saes, writer),
                StoredEncoding(store.folder, saes, folder, current.fingerprint, workers),
                _not_smaller,
                workers,
                bar.advance,
            ):
                records[int(record["piece"])] = record
        features = finish_features(
            writer,
            [records[i] for i in sorted(records)],
            saes,
            model_name=str(store.manifest.get("model_name", "")),
            extra=[EXAMPLES],
        )
        return _finish(current, features)


def _listed(given: str | tuple[str, ...] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _not_smaller(task: int, step: Step, how: str) -> int:
    raise ResourceError(
        f"encoding piece {task} of the store brings its process down ({how}).",
        safe="The pieces before it are committed.",
        then="Set engine.workers to a smaller number and run the same command again.",
    )


def _finish(current: Run, store: FeatureStore) -> Outcome:
    n_tokens = max(store.n_tokens, 1)
    figures = {
        "layers": list(store.layers),
        "tokens": store.n_tokens,
        "masked": store.manifest["masked"],
        "l0_mean": {layer: nnz / n_tokens for layer, nnz in store.manifest["nnz"].items()},
        "ledger": current.ledger.as_record(),
    }
    for oddity in odd_features(store):
        log.warning("%s", oddity)
    current.finish(figures)
    return Outcome("encode", current.folder, figures)


def _resolved(cfg: EncodeConfig, load: bool) -> EncodeConfig:
    """Put folders in the place of `latest`, which would mean another run tomorrow."""
    folders: dict[str, Any] = {}
    if load:
        named = [
            str(find_run(name, "sae", cfg.run.root))
            if name == "latest" or Path(name).is_dir()
            else name
            for name in _listed(cfg.encode.sae)
        ]
        folders["sae"] = named[0] if isinstance(cfg.encode.sae, str) else tuple(named)
    if cfg.encode.store is not None:
        folders["store"] = str(find_run(cfg.encode.store, "extract", cfg.run.root))
    return cfg.model_copy(update={"encode": cfg.encode.model_copy(update=folders)})
