"""verify: an SAE's figures against its record, and which known cause restores them."""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field, model_validator

from saefty import fsio
from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.diagnosis.base import Rows
from saefty.diagnosis.causes import AS_IT_IS, READ, Trial, reading_trial, trials
from saefty.diagnosis.evidence import remarks_on
from saefty.diagnosis.record import find_record
from saefty.diagnosis.report import Report
from saefty.diagnosis.verdict import judge, run_trials
from saefty.engine import ThreadsSection
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example
from saefty.runs import Run, RunSection, run_folder
from saefty.sae_sets import sae_checksum
from saefty.saes.base import SparseAutoencoder
from saefty.sources import load_sae
from saefty.stages.base import Outcome, settle_arithmetic
from saefty.stages.rows import open_readings, outlier_facts, without_outliers

OTHER_ROWS = (
    "these are other rows than the record's, so 5 % is allowed beside the sampling error. On the "
    "record's own rows (the SAE in its training run's folder, the run's store or no --data) it is "
    "0.1 %, which a small damage does not pass."
)

JSON, PAGE = "verify.json", "verify.md"


class VerifySection(Config):
    """Which SAE to check, on what, and against which figures."""

    sae: str
    """A folder of any known format, a repository of the hub, or a release."""

    sae_id: str | None = None
    """The SAE inside the repository or release."""

    store: str | None = None
    """An activation store to measure on instead of running a model: a run's folder or `latest`."""

    layer: int | None = Field(default=None, ge=0)
    """The block to read; None reads the one that the SAE names."""

    hook_point: str | None = None
    """What to read in the block; None reads what the SAE names, else `resid_post`."""

    expected_l0: float | None = Field(default=None, gt=0)
    """Mean number of firing latents that the SAE should have; wins over what is recorded."""

    expected_fvu: float | None = Field(default=None, gt=0)
    """FVU that the SAE should have; wins over what is recorded."""

    margin: float | None = Field(default=None, ge=0)
    """Share by which figures may differ from the record beside the sampling error; None takes
    0.1 % on the record's own rows, 5 % on other rows of its kind, 20 % for published figures."""

    rows: int = Field(default=8192, gt=0)
    """Measure on about this many tokens, whole texts at a time."""

    try_all: bool = False
    """Try the causes even where the SAE is healthy."""


class VerifyConfig(Config):
    """Configuration of `saefty sae verify`."""

    model: ModelSection | None = None
    """Which model to read; not needed with `verify.store`."""

    data: tuple[DataSection, ...] = ()
    """Which texts to read; none reads those that the SAE's own record was taken on."""

    verify: VerifySection
    """Which SAE to check, on what, and against which figures."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""

    @model_validator(mode="after")
    def _one_source(self) -> "VerifyConfig":
        if (self.model is None) == (self.verify.store is None):
            given = "neither is given" if self.model is None else "both are given"
            raise ValueError(
                f"an SAE is checked on a model (--model) or on a store (--store); {given}"
            )
        if self.verify.store is not None and self.data:
            files = ", ".join(section.path or section.name for section in self.data)
            raise ValueError(
                f"a store is measured on its own rows, and reads no texts: --store "
                f"{self.verify.store} and --data {files} are both given"
            )
        return self


def run(
    cfg: VerifyConfig,
    *,
    sae: SparseAutoencoder | None = None,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
) -> Outcome:
    """Check an SAE and write verify.json and verify.md into a run's folder.

    Args:
        cfg: The configuration.
        sae: As for `check`.
        model: As for `check`.
        examples: As for `check`.
    """
    report = check(cfg, sae=sae, model=model, examples=examples)
    return write(cfg, report)


def write(cfg: VerifyConfig, report: Report) -> Outcome:
    """Write a report into a run's folder, the same again where the run is complete.

    Raises:
        ConfigError: If the folder holds something else.
        MismatchError: If it holds a run of other settings, or of another SAE.
    """
    folder = run_folder(cfg.run, "verify")
    figures = report.figures()
    with Run(folder, "verify", config_tree(cfg), {"sae": report.facts["weights"]}) as current:
        fsio.commit_json(folder / JSON, figures)
        fsio.commit_text(folder / PAGE, report.markdown())
        current.ledger.ok = int(report.facts["rows"])
        current.finish(
            {key: figures[key] for key in ("sae", "healthy", "sentence", "cause", "next")}
        )
    return Outcome("verify", folder, figures)


def check(
    cfg: VerifyConfig,
    *,
    sae: SparseAutoencoder | None = None,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
) -> Report:
    """Measure an SAE, compare it with its record, and look for the cause if it is off.

    Args:
        cfg: The configuration.
        sae: An SAE that is loaded already; None loads `cfg.verify.sae`.
        model: A model that is loaded already; None loads `cfg.model`.
        examples: Texts that are read already; None reads `cfg.data`.

    Raises:
        MismatchError: If the SAE does not fit the model or the store, or is a transcoder.
        ConfigError: If there are no texts to read.
        SaeftyError: As the loaders of SAE, model and data.
    """
    settings = cfg.verify
    sae = sae or load_sae(settings.sae, settings.sae_id)
    if sae.is_transcoder:
        sae.require_autoencoder("sae verify")
    settle_arithmetic(cfg.engine, cfg.run.dir)
    record = find_record(
        sae, settings.sae_id or "", settings.expected_l0, settings.expected_fvu, settings.margin
    )
    readings, site, same = open_readings(cfg, settings, sae, model, examples)
    rows = readings[READ]
    n_recorded = {one.n_rows for one in record.figures.values()}
    if same and settings.margin is None and len(rows.x) in n_recorded:
        record = record.on_the_same_rows()
    held = without_outliers(rows)
    sae, named = sae.float(), sae.site == site
    first = run_trials(sae, held, [AS_IT_IS], record)[0]
    verdict = judge(first, [], record)
    facts = {**readings.facts, "rows": len(rows.x), "site": site.name, "weights": sae_checksum(sae)}
    facts |= outlier_facts(rows)
    if verdict.healthy and not settings.try_all and record.tells:
        chosen = [one for one in _reading_trials(held, named) if one.rows == "without_outliers"]
    else:
        held |= {key: readings[key] for key in readings.others()}
        chosen = [*trials(sae, rows), *_reading_trials(held, named)]
    tried = run_trials(sae, held, chosen, record)
    verdict = judge(first, tried, record)
    verdict = remarks_on(verdict, sae, facts)
    if not same and settings.margin is None and any(one.n_rows for one in record.figures.values()):
        verdict = replace(verdict, remarks=(*verdict.remarks, OTHER_ROWS))
    return Report(settings.sae_id or settings.sae, record, verdict, facts)


def _reading_trials(held: dict[str, Rows], named: bool) -> list[Trial]:
    return [reading_trial(key, named) for key in held if key != READ]
