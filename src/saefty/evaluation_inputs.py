"""What `eval` and `probe` are about: labelled examples, their features, and activations on the way.

Both start from a feature store, or from an activation store and SAEs; both need to know how the
examples were read, so that they are read alike again, and by which model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from saefty.baselines import Labelled, names_to_codes
from saefty.config import Config, build_config
from saefty.encoding import (
    check_against_store,
    in_words,
    same_contrast,
    stored_pieces,
    write_features,
)
from saefty.errors import ConfigError, InputError, MismatchError
from saefty.extraction import write_activations
from saefty.image_checks import check_same_images
from saefty.models.base import ModelAdapter, ModelSection
from saefty.models.contrast import ContrastSection
from saefty.reading import ReadingSection, prepare
from saefty.records import Site, example_from
from saefty.runs import METADATA, Ledger, find_run, read_metadata
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ActivationStore
from saefty.stores.base import EXAMPLES
from saefty.stores.features import FeatureStore, Key, layer_of

S = TypeVar("S", bound=Config)
EMBEDDING = Site(0, "resid_pre")


def encoded(
    store: ActivationStore,
    saes: Mapping[Key, SparseAutoencoder] | Mapping[int, SparseAutoencoder],
    folder: Path,
    fingerprint: str,
) -> FeatureStore:
    """Encode an activation store into a folder of the run; pieces that are there are kept.

    Raises:
        MismatchError: If an SAE reads another place, width or contrast than the store holds.
    """
    check_against_store(saes, store)
    layers = sorted({layer_of(key) for key in saes})
    store.copy_examples(folder)
    return write_features(
        folder,
        fingerprint,
        lambda done: stored_pieces(store, layers, done),
        saes,
        model_name=str(store.manifest.get("model_name", "")),
        extra=[EXAMPLES],
    )


def check_same_contrast(features: FeatureStore, activations: ActivationStore, key: str) -> None:
    """Refuse latents of contrasts beside plain activations, or of another contrast, or the reverse.

    Args:
        features: The latents.
        activations: Activations of the same examples.
        key: The setting that names these.

    Raises:
        MismatchError: If they are of different rows.
    """
    ours, theirs = features.manifest.get("contrast"), activations.contrast
    if not same_contrast(ours, theirs):
        raise MismatchError(
            f"the latents in {features.folder} are of {in_words(ours)}, and {key} "
            f"({activations.folder}) holds {in_words(theirs)}.",
            then=f"Set {key} to the activations that the latents were made of, or leave it out.",
        )


def read_again(
    records: Sequence[Mapping[str, Any]],
    model: ModelAdapter,
    section: ReadingSection,
    sites: Sequence[Site],
    folder: Path,
    fingerprint: str,
) -> ActivationStore:
    """Extract activations of the examples a store was made of; pieces that are there are kept.

    Args:
        records: The example table.
        model: The model.
        section: How the examples were read.
        sites: Where to read, one site a layer.
        folder: The store's folder.
        fingerprint: A checksum of everything the activations depend on.

    Raises:
        MismatchError: If an example's image is no longer what it was.
    """
    check_same_images(records)
    if set(sites) == {EMBEDDING}:  # before the first block there is nothing to switch off
        section = section.model_copy(update={"contrast": ContrastSection()})
    examples = [example_from(record) for record in records]
    reading = prepare(model, examples, section, len(sites))
    return write_activations(folder, fingerprint, model, reading, sites, section)


def labelled_examples(
    records: Sequence[Mapping[str, Any]],
    ledger: Ledger,
    *,
    drop_missing: bool,
    section: str,
    made_by: str = "encode",
) -> Labelled:
    """Return the examples that were read and have a label; count the others.

    Args:
        records: The example table.
        ledger: Takes down what became of each example.
        drop_missing: Leave out examples without a label instead of refusing them.
        section: The section of the settings that the messages name, such as `eval`.
        made_by: The command that made the example table, which the messages name.

    Raises:
        InputError: If a label is missing, or all are alike.
    """
    rows, missing = [], 0
    for i, record in enumerate(records):
        if record["status"] != "ok":
            ledger.skipped[record["status"]] += 1
        elif record["label"] is None:
            missing += 1
        else:
            rows.append(i)
    if missing and not drop_missing:
        raise InputError(
            f"{missing} of {len(records)} examples have no label.",
            then=(f"Set {section}.drop_missing_labels=true to leave them out, or s" if rows
                  else "S")
            + "et data.label (and data.harmful) to the column that holds the labels, and "
            f"{made_by} again.",
        )  # fmt: skip
    if missing:
        ledger.skipped["no_label"] += missing
    ledger.ok = len(rows)
    harmful = np.array([records[i]["label"] for i in rows], dtype=bool)
    if harmful.all() or not harmful.any():
        what = "an evaluation" if section == "eval" else "a detector"
        raise InputError(
            f"all {len(rows)} labelled examples are "
            f"{'harmful' if len(rows) and harmful.all() else 'harmless'}; {what} needs "
            "both kinds.",
            then="Check data.label and data.harmful, or add examples of the other kind.",
        )
    groups = [records[i]["group"] for i in rows]
    sources = names_to_codes([records[i]["source"] for i in rows])
    several = sources is not None and len(np.unique(sources)) > 1
    return Labelled(
        rows=np.array(rows),
        texts=tuple(records[i]["text"] for i in rows),
        harmful=harmful,
        clusters=names_to_codes(groups),
        sources=sources if several else None,
        n_table=len(records),
    )


def images_of(
    records: Sequence[Mapping[str, Any]], rows: Int[np.ndarray, "examples"]
) -> list[str | None]:
    """Return a name for the content of each example's image: its checksum, or else its path."""
    chosen = (records[i] for i in rows.tolist())
    return [record.get("image_hash") or record.get("image") for record in chosen]


def recorded_reading(folder: Path) -> ReadingSection:
    """Return how a run read its examples, as far as it decides which tokens they have.

    Raises:
        ConfigError: If the run was made of a store that is gone, and with it what says so.
    """
    if not (folder / METADATA).exists():
        return ReadingSection()
    config = read_metadata(folder)["config"]
    section = config.get("encode") or config.get("extract") or {}
    if section.get("store"):
        store = Path(section["store"])
        if not (store / METADATA).exists():
            raise ConfigError(
                f"{folder} was made of the activations in {store}, where there is no {METADATA} "
                "any more; only that says which tokens of each example were read.",
                then="Put that folder back, or encode again from the data or from another store.",
            )
        return recorded_reading(store)
    decisive = ("tokens", "pooling", "contrast", "truncate", "max_bad_images", "nonfinite")
    kept = {key: section[key] for key in decisive if key in section}
    return build_config(ReadingSection, kept)


def recorded_model(folder: Path, without: str) -> ModelSection:
    """Return the model that a run says it used; a run on a store is followed to its source.

    Args:
        folder: The run's folder.
        without: The setting with which no model is needed, for the message.

    Raises:
        ConfigError: If the run does not say.
    """
    facts = recorded_with_model(folder)
    if facts is None:
        raise ConfigError(
            f"{folder} does not say which model it was made with.",
            then=f"Set model.name, or {without}.",
        )
    return build_config(ModelSection, facts["config"]["model"])


def recorded_with_model(folder: Path) -> dict[str, Any] | None:
    """Return what the run was started with that ran the model of a store; None if none says so."""
    for _ in range(3):
        if not (folder / METADATA).exists():
            break
        facts = read_metadata(folder)
        config = facts["config"]
        if config.get("model"):
            return facts
        source = config.get("encode", {}).get("store") or config.get("train", {}).get("store")
        if not source:
            break
        folder = Path(source)
    return None


def with_folders(section: S, root: Path) -> S:
    """Put folders in the place of `latest`, which would mean another run tomorrow.

    Args:
        section: Settings with the keys `features`, `sae` and `store`.
        root: The folder of all runs.
    """
    kinds = {"features": "features", "sae": "sae", "store": "extract"}
    folders = {
        key: str(find_run(given, kind, root))
        for key, kind in kinds.items()
        if (given := getattr(section, key)) is not None
    }
    return section.model_copy(update=folders)
