"""doctor: what is wrong with an SAE, without a record, by findings and by experiments."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from saefty import fsio
from saefty.code_analysis import CodeAnalysis
from saefty.code_sources import of_rows
from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.diagnosis.base import MIN_TEXTS, Rows
from saefty.diagnosis.causes import READ
from saefty.diagnosis.doctor_report import DoctorReport
from saefty.diagnosis.examination import WITHOUT_SPECIAL, examine
from saefty.diagnosis.finding import Finding
from saefty.diagnosis.findings import find_in_codes
from saefty.diagnosis.judgement import DEAD_ROWS, MIN_ROWS, MOST_ONCE, judge_examination
from saefty.diagnosis.kept_codes import analyzed_codes, open_kept
from saefty.diagnosis.out_folder import refuse_unfit
from saefty.diagnosis.readings import Readings, StoreReadings, Tokens
from saefty.diagnosis.record import find_record
from saefty.diagnosis.reference import Reference
from saefty.diagnosis.row_checks import refuse_all_nonfinite, require_rows
from saefty.diagnosis.row_quality import finite_rows, row_quality
from saefty.engine import ThreadsSection
from saefty.errors import ConfigError
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example
from saefty.runs import Run, RunSection, find_run, run_folder
from saefty.sae_sets import find_saes, sae_checksum
from saefty.saes.base import SparseAutoencoder
from saefty.sources import load_sae
from saefty.stages.base import Outcome, settle_arithmetic
from saefty.stages.rows import open_readings, outlier_facts, without_outliers
from saefty.stores.activations import ActivationStore

JSON, PAGE = "doctor.json", "doctor.md"
CODES_ALONE = (
    "To have the cause found by experiments, give the SAE and activations too: saefty doctor SAE "
    "--store STORE, or --model MODEL --data TEXTS, with the codes."
)


class DoctorSection(Config):
    """Which SAE or codes to examine, and on what."""

    sae: str | None = None
    """A folder of any known format, a repository of the hub, or a release; None examines kept
    codes alone, without experiments."""

    sae_id: str | None = None
    """The SAE inside the repository or release."""

    store: str | None = None
    """An activation store to measure on: a run's folder or `latest`."""

    dump: Path | None = None
    """A folder of dense codes, `meta.json` and `sae_feats_layer<L>_chunk<n>.pt`, to examine."""

    features: str | None = None
    """A feature store to examine: an encode run's folder or `latest`."""

    layer: int | None = Field(default=None, ge=0)
    """The block to read; None reads the one that the SAE names."""

    hook_point: str | None = None
    """What to read in the block; None reads what the SAE names, else `resid_post`."""

    expected_l0: float | None = Field(default=None, gt=0)
    """Mean number of firing latents that the SAE should have; wins over what is recorded."""

    expected_fvu: float | None = Field(default=None, gt=0)
    """FVU that the SAE should have; wins over what is recorded."""

    rows: int = Field(default=8192, gt=0)
    """Measure on about this many tokens, whole texts at a time."""


class DoctorConfig(Config):
    """Configuration of `saefty doctor`."""

    model: ModelSection | None = None
    """Which model to read; not needed with `doctor.store`."""

    data: tuple[DataSection, ...] = ()
    """Which texts to read; none reads those that the SAE's own record was taken on."""

    doctor: DoctorSection
    """Which SAE or codes to examine."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""

    @model_validator(mode="after")
    def _sources(self) -> "DoctorConfig":
        given = self.doctor
        if given.dump is not None and given.features is not None:
            raise ValueError(
                f"kept codes are those of a dump or of a feature store; --dump_dir {given.dump} "
                f"and --features {given.features} are both given"
            )
        rows = self.model is not None or given.store is not None
        if given.sae is None:
            if given.dump is None and given.features is None:
                raise ValueError(
                    "give an SAE (with --store, or --model and --data), or kept codes "
                    "(--dump_dir or --features)"
                )
            if rows:
                raise ValueError(
                    "kept codes alone are examined without activations; name the SAE to use "
                    "--store or --model"
                )
            return self
        if (self.model is None) == (given.store is None):
            which = "neither is given" if self.model is None else "both are given"
            raise ValueError(
                f"an SAE is examined on a model (--model) or on a store (--store); {which}"
            )
        if given.store is not None and self.data:
            files = ", ".join(section.path or section.name for section in self.data)
            raise ValueError(
                f"a store is measured on its own rows, and reads no texts: --store {given.store} "
                f"and --data {files} are both given"
            )
        if given.store is None and (given.dump is not None or given.features is not None):
            raise ValueError(
                "kept codes are compared with the rows of a store: give --store in the place of "
                "--model"
            )
        return self


def run(
    cfg: DoctorConfig,
    *,
    sae: SparseAutoencoder | None = None,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
) -> Outcome:
    """Examine an SAE and write doctor.json, doctor.md and the pictures into a run's folder.

    Args:
        cfg: The configuration.
        sae: As for `check`.
        model: As for `check`.
        examples: As for `check`.
    """
    cfg = resolved(cfg)
    return write(cfg, check(cfg, sae=sae, model=model, examples=examples))


def resolved(cfg: DoctorConfig) -> DoctorConfig:
    """Put the folder of an SAE in the place of `latest`, which would mean another one tomorrow.

    Raises:
        ConfigError: If there is no complete training, or it has several SAEs and none is named.
    """
    if cfg.doctor.sae != "latest":
        return cfg
    folder = find_run("latest", "sae", cfg.run.root)
    found, layer = find_saes(folder), cfg.doctor.layer
    if len(found) > 1:
        named = [path for path in found if path.name == f"layer_{layer}"]
        if not named:
            raise ConfigError(
                f"{folder} holds {len(found)} SAEs: {', '.join(path.name for path in found)}.",
                then=f"Name the folder of one of them, such as {found[0]}, or set --layer.",
            )
        found = named
    section = cfg.doctor.model_copy(update={"sae": str(found[0])})
    return cfg.model_copy(update={"doctor": section})


def write(cfg: DoctorConfig, report: DoctorReport) -> Outcome:
    """Write a report into a run's folder, the same again where the run is complete.

    Raises:
        ConfigError: If the folder holds something else.
        MismatchError: If it holds a run of other settings, or of another SAE.
    """
    folder = run_folder(cfg.run, "doctor")
    figures = report.figures()
    inputs = {"sae": report.facts.get("weights")}
    with Run(folder, "doctor", config_tree(cfg), inputs) as current:
        report.save_pictures(folder)
        fsio.commit_json(folder / JSON, figures)
        fsio.commit_text(folder / PAGE, report.markdown(pictures=True))
        current.ledger.ok = int(report.facts["rows"])
        current.finish({key: figures[key] for key in ("sae", "healthy", "sentence", "cause")})
    return Outcome("doctor", folder, figures)


@dataclass(frozen=True)
class _Read:
    """The rows to measure on."""

    rows: Rows
    tokens: Tokens | None
    others: dict[str, Rows]
    nonfinite: int
    facts: dict[str, Any]
    named: bool
    layer: int | None


def check(
    cfg: DoctorConfig,
    *,
    sae: SparseAutoencoder | None = None,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
    rows: Rows | None = None,
    kept_as: str = "",
) -> DoctorReport:
    """Examine an SAE or kept codes.

    Args:
        cfg: The configuration.
        sae: An SAE that is loaded already; None loads `cfg.doctor.sae`.
        model: A model that is loaded already; None loads `cfg.model`.
        examples: Texts that are read already; None reads `cfg.data`.
        rows: Rows in memory, in the place of a store or model.
        kept_as: The number format that these had.

    Raises:
        MismatchError: If the SAE does not fit the model, the store or the codes, or is a
            transcoder.
        InputError: If there are too few rows.
        SaeftyError: As the loaders of SAE, model, data and codes.
    """
    cfg = resolved(cfg)
    given = cfg.doctor
    refuse_unfit(cfg.run.dir, "doctor", config_tree(cfg))
    settle_arithmetic(cfg.engine, cfg.run.dir)
    if sae is None and given.sae is None:
        return _of_codes_alone(cfg)
    sae = sae or load_sae(given.sae or "", given.sae_id)
    if sae.is_transcoder:
        sae.require_autoencoder("doctor")
    sae = sae.float()
    read = _in_memory(rows, kept_as) if rows is not None else _read(cfg, sae, model, examples)
    require_rows(sae, read.rows.x)
    half = read.facts.get("dtype") == "float16"
    quality = row_quality(read.rows, read.tokens, read.nonfinite, half=half)
    held = {**without_outliers(read.rows), **read.others}
    if quality.special.any() and not quality.special.all():
        held[WITHOUT_SPECIAL] = read.rows.only(~quality.special)
    record = find_record(sae, given.sae_id or "", given.expected_l0, given.expected_fvu)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        kept = open_kept(given.dump, _features(cfg), scratch, read.layer)
        checked = None
        if kept is not None:
            assert read.layer is not None  # kept codes come with a store
            checked = kept.check(sae, ActivationStore(read.facts["store"]), read.layer)
            codes = kept.analyzed(scratch)
        else:
            codes = analyzed_codes(
                of_rows(sae, read.rows.x, "the SAE's codes of these rows"), scratch
            )
    found = examine(sae, held, Reference.of(sae, record), named=read.named)
    said = checked.findings if checked else ()
    diagnosis = judge_examination(found, quality, said)
    half = kept is not None and codes.left_out > 0 and kept.half()
    findings = [*said, *_in_codes(codes, sae, half)]
    facts = {
        **read.facts,
        **outlier_facts(read.rows),
        "rows": len(read.rows.x),
        "weights": sae_checksum(sae),
        "remarks": _remarks(read, found.silence.once, sae.d_sae, quality.special),
    }
    title = given.sae_id or given.sae or "the SAE"
    return DoctorReport(
        title, tuple(findings), facts, codes.stats, diagnosis, found, quality, checked
    )  # fmt: skip


def _in_memory(rows: Rows, dtype: str) -> _Read:
    keep = finite_rows(rows)
    if not keep.any():
        refuse_all_nonfinite(len(keep), dtype)
    kept = rows if keep.all() else rows.only(keep)
    facts = {"texts": int(kept.text[-1]) + 1, "site": "given in Python", "dtype": dtype}
    return _Read(kept, None, {}, int((~keep).sum()), facts, True, None)


def _read(
    cfg: DoctorConfig,
    sae: SparseAutoencoder,
    model: ModelAdapter | None,
    examples: Sequence[Example] | None,
) -> _Read:
    """Read the rows, and those of every other reading; rows with NaN or infinity are left out."""
    readings, site, _ = open_readings(cfg, cfg.doctor, sae, model, examples, recorded=False)
    rows = readings[READ]
    keep = finite_rows(rows)
    if not keep.any():
        refuse_all_nonfinite(len(keep), readings.facts.get("dtype"))
    kept = rows if keep.all() else rows.only(keep)
    tokens = readings.tokens.only(keep) if isinstance(readings, StoreReadings) else None
    others = {key: _finite(readings, key) for key in readings.others()}
    facts = {**readings.facts, "site": site.name}
    return _Read(
        kept, tokens, {key: one for key, one in others.items() if one is not None},
        int((~keep).sum()), facts, sae.site == site, site.layer,
    )  # fmt: skip


def _finite(readings: Readings, key: str) -> Rows | None:
    rows = readings[key]
    keep = finite_rows(rows)
    if keep.sum() < MIN_ROWS:
        return None
    return rows if keep.all() else rows.only(keep)


def _remarks(read: _Read, once: int, d_sae: int, special: np.ndarray) -> list[str]:
    """Return what limits the judgement, or is worth saying of the rows."""
    found = []
    n, texts = len(read.rows.x), read.facts["texts"]
    if read.nonfinite:
        found.append(f"{read.nonfinite:,} rows with NaN or infinity were left out.")
    if n < DEAD_ROWS:
        found.append(
            f"{n:,} rows are too few to call a latent dead: at least {DEAD_ROWS:,} are needed."
        )
    elif once > MOST_ONCE * d_sae:
        found.append(
            f"{once:,} of {d_sae:,} latents fire in a single text, so that these rows cannot tell "
            "dead latents from rare ones: give a larger --rows."
        )
    if texts == 1:
        found.append(
            "All rows are of one text: sampling errors are those of stretches of it, and say "
            "nothing of other texts."
        )
    elif texts < MIN_TEXTS:
        found.append(f"{texts} texts are few: sampling errors are those of stretches of them.")
    if special.any():
        found.append(f"{int(special.sum()):,} rows ({special.mean():.1%}) are special tokens.")
    return found


def _in_codes(codes: CodeAnalysis, sae: SparseAutoencoder, half: bool) -> list[Finding]:
    return find_in_codes(
        codes.stats, codes.report, codes.pca, d_sae=sae.d_sae, d_in=sae.d_in, signed=sae.signed,
        left_out=codes.left_out, half=half,
    )  # fmt: skip


def _features(cfg: DoctorConfig) -> Path | None:
    name = cfg.doctor.features
    return None if name is None else find_run(name, "features", cfg.run.root)


def _of_codes_alone(cfg: DoctorConfig) -> DoctorReport:
    given = cfg.doctor
    with tempfile.TemporaryDirectory() as name:
        kept = open_kept(given.dump, _features(cfg), Path(name), given.layer)
        assert kept is not None  # the configuration has a source
        codes = kept.analyzed(Path(name))
        half = codes.left_out > 0 and kept.half()
    findings = find_in_codes(
        codes.stats, codes.report, codes.pca, left_out=codes.left_out, half=half
    )
    facts = {"rows": codes.stats.token_count, "codes": codes.place, "layer": codes.key}
    name = str(given.dump or given.features)
    return DoctorReport(name, tuple(findings), facts, codes.stats, missing=CODES_ALONE)
