"""extract: run a model over a dataset and keep its activations."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import field_validator

from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.engine import EngineSection
from saefty.extraction import write_activations
from saefty.models.base import ModelAdapter, ModelSection
from saefty.models.contrast import require_contrast
from saefty.reading import ReadingSection, prepare
from saefty.records import Example, Site
from saefty.runs import Run, RunSection, run_folder
from saefty.space import activation_bytes, planned_rows
from saefty.stages.base import (
    Outcome,
    data_inputs,
    existing_folder,
    model_inputs,
    open_data,
    open_model,
    settle_arithmetic,
    workers_model,
)


class ExtractSection(ReadingSection):
    """Which activations to keep, and of how many examples."""

    layers: tuple[int, ...]
    """Blocks to read, counted from 0."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the rows on disk; `auto` is what the model computes in (`model.dtype`), and
    float32 for means and contrasts. float16 rounds more finely than bfloat16, but ends at 65,504:
    a row beyond it counts as not finite (`nonfinite`)."""

    def rows_dtype(self, computed: torch.dtype) -> torch.dtype:
        """Return the number format of rows, of a model that computes in another one."""
        if self.dtype == "auto":
            return super().rows_dtype(computed)
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            self.dtype
        ]

    @field_validator("layers", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, layers: object) -> object:
        if isinstance(layers, str):
            raise ValueError(f"write a list of numbers, such as [0,2], not {layers!r}")
        return (layers,) if type(layers) is int else layers

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

    engine: EngineSection = EngineSection()
    """How the work is shared out on this machine."""

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
    reload = workers_model(cfg.engine, cfg.model, model)
    settle_arithmetic(cfg.engine, existing_folder(cfg.run, "extract"))
    model = model or open_model(cfg.model, sites)
    model.info.check_sites(sites)
    if cfg.extract.contrast.method != "none":
        require_contrast(model, sites, cfg.extract.contrast)
    folder = run_folder(cfg.run, "extract")
    inputs = {"model": model_inputs(model), "data": data_inputs(chosen)}
    with Run(folder, "extract", config_tree(cfg), inputs) as current:
        reading = prepare(model, chosen, cfg.extract, len(sites))
        current.ledger = reading.ledger
        item_bytes = cfg.extract.rows_dtype(model.dtype).itemsize
        rows = planned_rows(reading, cfg.extract)
        current.require_space(activation_bytes(rows, model.d_model, len(sites), item_bytes))
        store = write_activations(
            folder, current.fingerprint, model, reading, sites, cfg.extract, cfg.engine, reload
        )
        figures = {
            "layers": list(store.layers),
            "d_in": store.d_in,
            "rows": store.n_rows,
            "masked": store.manifest["masked"],
            "examples": reading.ledger.as_record(),
        }
        current.finish(figures)
    return Outcome("extract", folder, figures)
