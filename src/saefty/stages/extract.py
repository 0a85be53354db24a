"""extract: run a model over a dataset and keep its activations."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import field_validator

from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.extraction import Reading, ReadingSection, prepare, read_pieces, write_tables
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example, Site
from saefty.runs import Run, RunSection, run_folder
from saefty.stages.base import Outcome, data_inputs, model_inputs, open_data, open_model
from saefty.stores.activations import KIND, commit_activations
from saefty.stores.base import EXAMPLES, StoreWriter

log = logging.getLogger(__name__)


class ExtractSection(ReadingSection):
    """Which activations to keep, and of how many examples."""

    layers: tuple[int, ...]
    """Blocks to read, counted from 0."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise ValueError(f"name each block once, counted from 0, not {list(layers)}")
        return layers


class ExtractConfig(Config):
    """Configuration of `saefty extract`."""

    model: ModelSection
    """Which model to run, and how."""

    data: DataSection = DataSection()
    """Which data to read, and what its columns mean."""

    extract: ExtractSection
    """Which activations to keep."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""


def run(
    cfg: ExtractConfig,
    *,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
) -> Outcome:
    """Extract activations into a store; the same call on an existing folder resumes it.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads `cfg.model`.
        examples: Examples that are read already; None reads `cfg.data`.
    """
    sites = [Site(layer, cfg.extract.hook_point) for layer in sorted(cfg.extract.layers)]
    chosen = open_data(cfg.data, examples)
    model = model or open_model(cfg.model, sites, cfg.run.dir)
    model.info.check_sites(sites)
    folder = run_folder(cfg.run, "extract")
    inputs = {"model": model_inputs(model), "data": data_inputs(chosen)}
    with Run(folder, "extract", config_tree(cfg), inputs) as current:
        reading = prepare(model, chosen, cfg.extract, len(sites))
        current.ledger = reading.ledger
        writer = StoreWriter(folder, KIND, current.fingerprint)
        records = writer.done()
        if records:
            log.info("%d of %d pieces are done", len(records), len(reading.plan.pieces))
        write_tables(folder, reading, EXAMPLES)
        for piece in read_pieces(model, reading, sites, cfg.extract, records):
            x = {site.layer: values for site, values in piece.activations.items()}
            counts = {"masked": dict(piece.masked)}
            records[piece.index] = commit_activations(writer, piece.index, x, piece.rows, counts)
        facts = _facts(cfg, model, sites, list(records.values()))
        writer.finish([records[i] for i in sorted(records)], facts, [EXAMPLES, "plan.json"])
        figures = _figures(facts, reading)
        current.finish(figures)
    return Outcome("extract", folder, figures)


def _facts(
    cfg: ExtractConfig,
    model: ModelAdapter,
    sites: Sequence[Site],
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    masked: Counter[str] = Counter()
    for record in records:
        masked.update(record["masked"])
    pooled = cfg.extract.pooling.name != "none"
    return {
        "layers": [site.layer for site in sites],
        "sites": {str(site.layer): site.name for site in sites},
        "d_in": model.d_model,
        "dtype": "float32" if pooled else str(model.dtype).removeprefix("torch."),
        "pooling": cfg.extract.pooling.name,
        "model_name": model.name,
        "n_rows": sum(record["rows"] for record in records),
        "masked": dict(masked),
    }


def _figures(facts: dict[str, Any], reading: Reading) -> dict[str, Any]:
    return {
        "layers": facts["layers"],
        "d_in": facts["d_in"],
        "rows": facts["n_rows"],
        "masked": facts["masked"],
        "examples": reading.ledger.as_record(),
    }
