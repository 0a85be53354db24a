"""analyze: what the latents of an SAE do over all tokens, and whether its codes are sparse."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from saefty.analysis_report import STATS_FILE, write_layer, write_summary
from saefty.code_analysis import CodeAnalysis, analyze_codes, save_feature_stats
from saefty.code_sources import CodeSource, of_activations, of_dump, of_features
from saefty.config import Config, config_tree
from saefty.engine import ThreadsSection
from saefty.errors import ConfigError
from saefty.feature_dump import META, FeatureDump
from saefty.log import progress
from saefty.runs import Run, RunSection, find_run, run_folder
from saefty.sae_sets import SaeSet, open_saes
from saefty.stages.base import Outcome, arithmetic_inputs, existing_folder, settle_arithmetic
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

log = logging.getLogger(__name__)

REPORT_BYTES = 20 << 20  # of statistics and pictures, a layer


class AnalyzeSection(Config):
    """Which codes to analyse, and how many tokens to look at closely."""

    features: str | None = None
    """A feature store: the folder of an encode run, or `latest`."""

    sae: str | None = None
    """With `analyze.store`: the SAE to encode with, as for `encode.sae`. Codes are not written."""

    sae_id: str | None = None
    """Which SAE of a repository or release `analyze.sae` names."""

    store: str | None = None
    """An activation store to encode on the way: the folder of an extract run, or `latest`."""

    dump: Path | None = None
    """A folder of dense codes: `meta.json` and `sae_feats_layer<L>_chunk<n>.pt`."""

    layers: tuple[int, ...] | None = None
    """Analyse these layers only; None analyses all."""

    sample_tokens: int = Field(default=20000, gt=0)
    """Tokens whose codes are looked at closely: percentiles, thresholds, PCA. They are drawn
    uniformly; statistics of latents read all tokens."""

    seed: int = Field(default=0, ge=0)
    """Of the draw."""

    nonfinite: Literal["stop", "mask"] = "stop"
    """What to do with codes that are NaN or infinite: stop, or leave out those tokens."""

    into_dump: bool = False
    """Also write `feature_stats.npz` into the dump's folder, of one layer."""


class AnalyzeConfig(Config):
    """Configuration of `saefty analyze`."""

    analyze: AnalyzeSection = AnalyzeSection()
    """Which codes to analyse."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""

    @model_validator(mode="after")
    def _one_source(self) -> "AnalyzeConfig":
        given = self.analyze
        names = [name for name in ("features", "store", "dump") if getattr(given, name) is not None]
        if len(names) != 1 or (given.sae is None) != (given.store is None):
            raise ValueError(
                "set one of analyze.features (a feature store), analyze.sae with analyze.store "
                "(activations, encoded on the way) and analyze.dump (a folder of dense codes)"
            )
        if given.into_dump and given.dump is None:
            raise ValueError("analyze.into_dump needs analyze.dump")
        return self


def run(cfg: AnalyzeConfig) -> Outcome:
    """Analyse codes and write statistics, pictures and a summary; a complete run is not done again.

    Args:
        cfg: The configuration.
    """
    cfg = _resolved(cfg)
    section = cfg.analyze
    inputs: dict[str, Any] = {}
    store: ActivationStore | FeatureStore | None = None
    saes: SaeSet | None = None
    if section.store is not None:
        store = ActivationStore(section.store)
        ids = [section.sae_id] if section.sae_id else []
        saes = open_saes([section.sae or ""], ids, section.layers).placed("cpu")
        inputs["threads"] = settle_arithmetic(cfg.engine, existing_folder(cfg.run, "analyze"))
        inputs |= arithmetic_inputs()
        inputs["saes"] = {str(key): one.checksum for key, one in saes.records.items()}
        inputs["kernels"] = saes.kernels
    elif section.features is not None:
        store = FeatureStore(section.features)
    if store is not None:
        inputs["source"] = store.manifest["fingerprint"]
    else:
        assert section.dump is not None  # the configuration has one source
        inputs["source"] = _listed(section.dump, section.layers)
    folder = run_folder(cfg.run, "analyze")
    with Run(folder, "analyze", config_tree(cfg), inputs) as current:
        if current.finished:
            log.info("%s is complete; set run.dir to a new folder to analyse again", folder)
            return Outcome("analyze", folder, current.figures)
        if isinstance(store, ActivationStore):
            assert saes is not None  # opened with the store
            sources = of_activations(store, saes)
        elif store is not None:
            sources = of_features(store, section.layers)
        else:
            sources = _of_dump(section, current)
        current.require_space(_needed(section, sources))
        found = [_analyzed(section, source, current) for source in sources]
        for one in found:
            current.ledger.ok += one.stats.token_count
            if one.left_out:
                current.ledger.skipped["NaN or infinity"] += one.left_out
        figures = write_summary(folder, found, section)
        current.finish(figures)
    return Outcome("analyze", folder, figures)


def _analyzed(section: AnalyzeSection, source: CodeSource, current: Run) -> CodeAnalysis:
    with progress(f"layer {source.key}", source.n_tokens, "tokens") as bar:
        found = analyze_codes(
            source,
            sample_tokens=section.sample_tokens,
            seed=section.seed,
            nonfinite=section.nonfinite,
            scratch=current.folder,
            advance=bar.advance,
        )
    if found.report.negative_share:
        log.warning(
            "layer %s: %.2f %% of the codes are below zero; a latent counts as active where |z| > "
            "0. Codes of ReLU-like SAEs are never negative: are these pre-activations or a "
            "reconstruction?", source.key, 100 * found.report.negative_share,
        )  # fmt: skip
    write_layer(current.folder, found)
    if section.into_dump and section.dump is not None:
        save_feature_stats(found.stats, section.dump / STATS_FILE)
    return found


def _of_dump(section: AnalyzeSection, current: Run) -> list[CodeSource]:
    assert section.dump is not None
    dump = FeatureDump(section.dump, current.folder)
    layers = section.layers or dump.layers
    if section.into_dump and len(layers) > 1:
        raise ConfigError(
            f"{section.dump} holds layers {list(layers)}, but {STATS_FILE} in it those of one.",
            then="Set analyze.layers to one of them, or leave analyze.into_dump out.",
        )
    # One chunk at a time lies converted on the disk.
    current.require_space(max(dump.largest(layer) for layer in layers))
    return of_dump(dump, layers)


def _needed(section: AnalyzeSection, sources: Sequence[CodeSource]) -> int:
    """Return how many bytes the run may write: the report, and a dense sample on the way."""
    samples = [min(section.sample_tokens, one.n_tokens) * one.dense_bytes for one in sources]
    return REPORT_BYTES * len(sources) + max(samples, default=0)


def _listed(folder: Path, layers: Sequence[int] | None) -> dict[str, list[int]]:
    """Return what tells one state of a dump from another: names, sizes and times of its files."""
    dump = FeatureDump(folder, folder)
    files = [path for layer in layers or dump.layers for path in dump.files(layer)]
    meta = folder / META
    files += [meta] if meta.exists() else []
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _resolved(cfg: AnalyzeConfig) -> AnalyzeConfig:
    """Put folders in the place of `latest`, which would mean another run tomorrow."""
    given = cfg.analyze
    found: dict[str, Any] = {}
    for key, kind in (("features", "features"), ("store", "extract")):
        if (name := getattr(given, key)) is not None:
            found[key] = str(find_run(name, kind, cfg.run.root))
    if given.sae is not None and (given.sae == "latest" or Path(given.sae).is_dir()):
        found["sae"] = str(find_run(given.sae, "sae", cfg.run.root))
    return cfg.model_copy(update={"analyze": given.model_copy(update=found)})
