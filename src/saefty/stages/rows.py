"""Where the rows come from that an SAE is measured on: a model that reads texts, or a store."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from saefty.data.base import DataSection, load_examples
from saefty.diagnosis.base import Rows
from saefty.diagnosis.causes import READ
from saefty.diagnosis.readings import ModelReadings, Readings, StoreReadings, outliers
from saefty.diagnosis.record import METRICS
from saefty.encoding import check_saes
from saefty.errors import ConfigError, IntegrityError, MismatchError
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import PARTS, Example, Site, example_from
from saefty.runs import METADATA, RunSection, find_run, read_metadata
from saefty.saes.base import SparseAutoencoder
from saefty.stages.base import open_model
from saefty.stores.activations import ActivationStore
from saefty.training_data import split_by_example

log = logging.getLogger(__name__)


@runtime_checkable
@runtime_checkable
class RowsSection(Protocol):
    """The keys of a section that say which rows to read."""

    @property
    def store(self) -> str | None:
        """An activation store, or None for a model."""
        ...

    @property
    def layer(self) -> int | None:
        """The block to read; None for the SAE's own."""
        ...

    @property
    def hook_point(self) -> str | None:
        """What to read in it; None for what the SAE names."""
        ...

    @property
    def rows(self) -> int:
        """About how many rows."""
        ...


@runtime_checkable
@runtime_checkable
class RowsConfig(Protocol):
    """The sections of a configuration that say where rows come from, beside `RowsSection`."""

    @property
    def model(self) -> ModelSection | None:
        """The model, or None for a store."""
        ...

    @property
    def data(self) -> tuple[DataSection, ...]:
        """The texts."""
        ...

    @property
    def run(self) -> RunSection:
        """Where runs lie."""
        ...


def without_outliers(rows: Rows) -> dict[str, Rows]:
    """Return the rows, and the same without those of very large norm, if there are any."""
    far = outliers(rows)
    held = {READ: rows}
    if far.any():
        held["without_outliers"] = rows.only(~far)
    return held


def outlier_facts(rows: Rows) -> dict[str, Any]:
    """Return norms of the rows for the report."""
    far = outliers(rows)
    norms = rows.norms.numpy()
    return {
        "norm_median": float(np.median(norms)),
        "norm_mean": float(norms.mean()),
        "norm_largest": float(norms.max()),
        "outlier_rows": int(far.sum()),
    }


def open_readings(
    cfg: RowsConfig,
    settings: RowsSection,
    sae: SparseAutoencoder,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
    *,
    recorded: bool = True,
) -> tuple[Readings, Site, bool]:
    """Return where rows come from, the site, and whether they are the record's own rows.

    Args:
        cfg: Model, texts, and where runs lie.
        settings: Which rows.
        sae: The SAE.
        model: A model that is loaded already; None loads `cfg.model`.
        examples: Texts that are read already; None reads `cfg.data`.
        recorded: Read the rows of the SAE's record, where the store holds them.

    Raises:
        MismatchError: If the SAE does not fit the model or the store.
        ConfigError: If there are no texts to read.
        SaeftyError: As the loaders of model and data.
    """
    if settings.store is not None:
        if Path(settings.store).is_file():
            raise ConfigError(
                f"--store {settings.store} is a file, and a store of activations is a folder.",
                then="If it holds texts: leave out --store, and give --model MODEL --data "
                f"{settings.store}.",
            )
        store = ActivationStore.open(find_run(settings.store, "extract", cfg.run.root))
        only = store.site(store.layers[0]) if len(store.layers) == 1 else None
        site = _site(settings, sae, only)
        if site.layer not in store.layers or store.site(site.layer) != site:
            held = ", ".join(store.site(layer).name for layer in store.layers)
            raise MismatchError(
                f"{_who_says(settings, sae, site)}, but the store holds {held}.",
                then="Extract that place, or set --layer to one of these to try it there.",
            )
        check_saes({site.layer: sae}, store.d_in, str(store.folder), store.contrast)
        keep = _recorded_rows(sae, store) if recorded else None
        return StoreReadings(store, site, settings.rows, keep), site, keep is not None
    assert cfg.model is not None  # the configuration has one source
    site = _site(settings, sae, None)
    model = model or open_model(cfg.model, [site])
    check_saes({site.layer: sae}, model.d_model, model.name)
    same, whose = False, "given in Python"
    if examples is None and cfg.data:
        examples = [one for section in cfg.data for one in load_examples(section)]
        files = ", ".join(section.path or section.name for section in cfg.data)
        whose = f"those of {files}"
    elif examples is None:
        examples, same = _recorded_texts(sae), True
        whose = "those that the SAE's own record was taken on, because no --data is given"
    n_rows = None if same else settings.rows
    readings = ModelReadings(model, examples, site, n_rows)
    readings.facts["texts_from"] = whose
    return readings, site, same


def _who_says(settings: RowsSection, sae: SparseAutoencoder, site: Site) -> str:
    """Say where a place that is not there comes from: from options, or from the SAE."""
    said = []
    if settings.layer is not None:
        said.append(f"--layer {settings.layer}")
    if settings.hook_point is not None:
        said.append(f"--hook-point {settings.hook_point}")
    if not said:
        return f"the SAE reads {site}"
    own = "" if sae.site is None else f" (the SAE itself names {sae.site})"
    verb = "asks" if len(said) == 1 else "ask"
    return f"{' and '.join(said)} {verb} for {site}{own}"


def _site(settings: RowsSection, sae: SparseAutoencoder, only: Site | None) -> Site:
    """Return the place to read: the one asked for, the SAE's own, or the only one there is."""
    own = sae.site
    part = settings.hook_point or (own or only or Site(0)).part
    if part not in PARTS:
        raise ConfigError(f"--hook-point is one of {', '.join(PARTS)}, not {part!r}.")
    if settings.layer is not None:
        if own is not None and own.layer != settings.layer:
            log.warning("the SAE names %s and is read at block %d", own, settings.layer)
        return Site(settings.layer, part)
    if own is not None:
        return Site(own.layer, part)
    hook = sae.metadata.get("published_hook")
    if hook:
        raise MismatchError(
            f"the SAE reads {hook}, which is not captured; what is captured are "
            f"{', '.join(PARTS)} of a block."
        )
    if only is None:
        raise MismatchError("the SAE does not say which block it reads.", then="Set --layer 12.")
    return only


def _training(sae: SparseAutoencoder) -> dict[str, Any] | None:
    """Return the metadata of the training run that an SAE's folder lies in, if it does."""
    folder = sae.folder and sae.folder.resolve().parent
    if not folder or not (folder / METADATA).is_file():
        return None
    try:
        found = read_metadata(folder)
    except IntegrityError:
        return None
    return found if found.get("stage") == "train" else None


def _recorded_rows(
    sae: SparseAutoencoder, store: ActivationStore
) -> Bool[np.ndarray, "n_rows"] | None:
    """Return the rows of a store on which the SAE's metrics were taken, if they were on it."""
    training = _training(sae)
    if training is None or training["inputs"].get("store") != store.manifest["fingerprint"]:
        return None
    if sae.folder is None or not (sae.folder / METRICS).is_file():
        return None
    train = training["config"]["train"]
    split = split_by_example(store, train["validation"], train["seed"], train["validation_rows"])
    keep = split.held_out if split.held_out.any() else split.train
    size = min(train["batch_size"], int(split.train.sum()))
    limit = (max(1, train["validation_rows"] // size) + 1) * size
    keep = keep.copy()
    keep[np.flatnonzero(keep)[limit:]] = False
    return keep


def _recorded_texts(sae: SparseAutoencoder) -> list[Example]:
    """Return the texts on which the SAE's metrics were taken.

    Raises:
        ConfigError: If they cannot be had.
    """
    training = _training(sae)
    where = training and Path(training["config"]["train"]["store"])
    if where and where.is_dir():
        store = ActivationStore(where)
        keep = _recorded_rows(sae, store)
        if keep is not None:
            records = store.examples()
            return [example_from(records[i]) for i in np.unique(store.rows()["example"][keep])]
    raise ConfigError(
        "there are no texts to read: no --data, and no store beside this SAE's training.",
        then="Set --data to a file of texts like those the SAE was trained on.",
    )
