"""What every stage returns, and how a stage gets its model and its data."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saefty import fsio, matmul
from saefty.data.base import DataSection, load_examples
from saefty.engine import EngineSection, ThreadsSection
from saefty.errors import ConfigError, InputError
from saefty.images import digest_or_none
from saefty.models.base import ModelAdapter, ModelSection, inspect_model, load_model
from saefty.records import Example, Site, example_record
from saefty.runs import METADATA, RunSection, read_metadata, run_folder
from saefty.sae_sets import find_saes, open_saes
from saefty.saes.base import SparseAutoencoder
from saefty.stores.features import layer_of

log = logging.getLogger(__name__)

GIVEN_IN_PYTHON = "python"
"""`data.name` of a run whose examples were handed over as objects."""

EVERYTHING_GB = 1e6


@dataclass(frozen=True)
class Outcome:
    """What a stage did: its run folder and the figures that the command prints."""

    stage: str
    folder: Path
    figures: Mapping[str, Any]

    def as_record(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {"stage": self.stage, "run": str(self.folder), "figures": dict(self.figures)}


def existing_folder(section: RunSection, kind: str) -> Path | None:
    """Return the folder of a run whose place was chosen; None if it will be generated."""
    chosen = section.dir is not None or section.id is not None
    return run_folder(section, kind) if chosen else None


def open_model(section: ModelSection, sites: Sequence[Site]) -> ModelAdapter:
    """Load a model, after checking the layers against its config alone.

    Raises:
        ConfigError: If a layer is out of range.
    """
    inspect_model(section.name, section.revision).check_sites(sites)
    return load_model(**section.model_dump())


def settle_arithmetic(section: ThreadsSection, folder: Path | None) -> int:
    """Set the number of torch's threads, on which the last bits of results depend; return it.

    They depend on what multiplies matrices too, which is settled with it. A run that is resumed
    keeps what it was started with, unless something else is asked for, or its way to multiply is
    less accurate here; then it is refused, as for any other setting.

    Args:
        section: The number asked for, if any.
        folder: The run's folder, if it may exist already.
    """
    recorded = way = None
    if folder is not None and (folder / METADATA).exists():
        metadata = read_metadata(folder)
        inputs = metadata["inputs"]
        recorded = inputs.get("threads") or inputs.get("model", {}).get("threads")
        way = metadata.get("matmul", {}).get("chosen", matmul.DEFAULT)
    matmul.settle(way)
    threads = section.threads or recorded or torch.get_num_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


def workers_model(
    engine: EngineSection, section: ModelSection | None, model: ModelAdapter | None
) -> ModelSection | None:
    """Return how worker processes load the model; None if there are none.

    Raises:
        ConfigError: If there are to be workers, but the model is an object of this process.
    """
    if engine.workers == 1:
        return None
    if model is not None:
        raise ConfigError(
            f"engine.workers is {engine.workers}, but a model that was handed over as an object "
            "lives in this process alone.",
            then="Name the model in the configuration, or set engine.workers=1.",
        )
    return section


def open_data(section: DataSection, examples: Sequence[Example] | None) -> list[Example]:
    """Return the examples that were handed over, or read the dataset.

    Raises:
        InputError: If a run made from objects is run again from its configuration.
    """
    if examples is not None:
        return list(examples)
    if section.name == GIVEN_IN_PYTHON:
        raise InputError(
            "this run was made from examples given in Python, which its configuration cannot name.",
            then="Call the same function with the same examples and out=FOLDER again.",
        )
    return load_examples(section)


def data_inputs(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the fingerprint of a dataset: how many examples, and a checksum of all they hold.

    Images are files beside it, and have a checksum of their own.
    """
    lines = (fsio.dump_json_line(_placeless(example_record(one))) for one in examples)
    blocks = (line.encode("utf-8") for line in lines)
    found: dict[str, Any] = {
        "examples": len(examples),
        "xxh3_128": fsio.digest_blocks(blocks),
    }
    images = [example.image for example in examples if example.image is not None]
    if images:
        digests = (f"{digest_or_none(path)}\n".encode() for path in images)
        found["images_xxh3_128"] = fsio.digest_blocks(digests)
    return found


def _placeless(record: dict[str, Any]) -> dict[str, Any]:
    """Return an example's record that says of an image that it has one, not where the file lies."""
    return record if record["image"] is None else {**record, "image": True}


def model_inputs(model: ModelAdapter) -> dict[str, Any]:
    """Return what results depend on of a model: its files, not where they lie."""
    facts = {key: value for key, value in model.provenance.items() if key not in ("name", "python")}
    return facts | arithmetic_inputs(model.device)


def arithmetic_inputs(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return what multiplies float32 matrices, where it is the CPU and not torch's default."""
    return matmul.decisive() if torch.device(device).type == "cpu" else {}


def load_saes(source: Path, layers: Sequence[int] | None = None) -> dict[int, SparseAutoencoder]:
    """Return the SAEs of a training run, or of one SAE's folder, by layer: one a layer.

    Raises:
        ConfigError: If there are several SAEs of one layer.
        MismatchError: If a layer that was asked for has no SAE, or one SAE cannot be placed.
    """
    found = open_saes([str(source)], (), layers, memory_gb=EVERYTHING_GB)
    if len(found) > len(found.layers):
        names = ", ".join(path.name for path in find_saes(source))
        raise ConfigError(
            f"{source} holds several SAEs of one layer: {names}.",
            then="Name the folder of one of them.",
        )
    return {layer_of(key): found[key] for key in found}
