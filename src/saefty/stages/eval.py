"""eval: which latents track harm, how sure that is, and what silencing them does."""

import logging
from pathlib import Path
from typing import Any

from pydantic import model_validator

from saefty.config import Config, config_tree
from saefty.engine import ThreadsSection
from saefty.evaluation_inputs import recorded_model, recorded_reading, with_folders
from saefty.evaluation_settings import EvalSection, InterventionSection
from saefty.harm_evaluation import HarmEvaluation
from saefty.harm_report import write_harm_report
from saefty.judges.base import judge_record, make_judge
from saefty.metrics.base import LATENT_SCORES
from saefty.models.base import ModelAdapter, ModelSection
from saefty.reading import ReadingSection
from saefty.runs import Run, RunSection, run_folder
from saefty.silencing import can_act
from saefty.stages.base import Outcome, load_saes, model_inputs, open_model, settle_arithmetic
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

log = logging.getLogger(__name__)

WITHOUT_MODEL = (
    "intervention.forward=false (or intervention.enabled=false) and eval.baselines=false"
)


class EvalConfig(Config):
    """Configuration of `saefty eval`."""

    model: ModelSection | None = None
    """Which model to run; None takes the one the features were made with."""

    eval: EvalSection = EvalSection()
    """Which features to evaluate, and how."""

    intervention: InterventionSection = InterventionSection()
    """What to silence, and how to judge the replies."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""

    @model_validator(mode="after")
    def _one_source(self) -> "EvalConfig":
        given = self.eval
        if (given.features is None) == (given.sae is None) or (given.sae and not given.store):
            raise ValueError(
                "set either eval.features, or eval.sae and eval.store (with eval.features, "
                "eval.store may name activations of the same examples)"
            )
        return self


def run(cfg: EvalConfig, *, model: ModelAdapter | None = None) -> Outcome:
    """Evaluate latents and write the report; a complete run is not done again.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads the one that made the features.
    """
    cfg = cfg.model_copy(update={"eval": with_folders(cfg.eval, cfg.run.root)})
    _check_names(cfg)
    folder = run_folder(cfg.run, "eval")
    features = FeatureStore(cfg.eval.features) if cfg.eval.features else None
    activations = ActivationStore(cfg.eval.store) if cfg.eval.store else None
    source = features or activations
    assert source is not None  # the configuration names one
    saes = load_saes(Path(cfg.eval.sae), cfg.eval.layers) if cfg.eval.sae else {}
    inputs: dict[str, Any] = {"source": source.manifest["fingerprint"]}
    if features is not None and activations is not None:
        inputs["store"] = activations.manifest["fingerprint"]
    if _forward(cfg, source):
        inputs["judges"] = {
            "behaviour": judge_record(cfg.intervention.judge, cfg.intervention.judge_options),
            "fluency": judge_record(cfg.intervention.fluency, cfg.intervention.fluency_options),
        }
    needed = _forward(cfg, source) or (cfg.eval.baselines and activations is None)
    if needed and model is None:
        section = cfg.model or recorded_model(source.folder, WITHOUT_MODEL)
        recorded_reading(source.folder)  # what refuses a lost store comes before the model
        settle_arithmetic(cfg.engine, cfg.run.dir)
        model = open_model(section, [])
    if model is not None:
        inputs["model"] = model_inputs(model)
    with Run(folder, "eval", config_tree(cfg), inputs) as current:
        if current.finished:
            log.info("%s is complete; set run.dir to a new folder to evaluate again", folder)
            return Outcome("eval", folder, current.figures)
        evaluation = HarmEvaluation(
            folder,
            current.fingerprint,
            cfg.eval,
            cfg.intervention,
            source,
            activations=activations if features is not None else None,
            saes=saes,
            load_saes=load_saes,
            model=model,
            reading=ReadingSection() if model is None else recorded_reading(source.folder),
            ledger=current.ledger,
        )
        results = evaluation.run()
        figures = write_harm_report(folder, results, evaluation.data, cfg.eval.pooling)
        current.finish(figures)
    return Outcome("eval", folder, figures)


def _forward(cfg: EvalConfig, source: ActivationStore | FeatureStore) -> bool:
    """Return whether latents are silenced while the model replies."""
    wanted = cfg.intervention.enabled and cfg.intervention.forward
    return wanted and can_act(source, cfg.eval.layers)


def _check_names(cfg: EvalConfig) -> None:
    """Look every name up before the work that would be lost on one that cannot be used."""
    LATENT_SCORES[cfg.eval.ranked_by]
    if cfg.intervention.enabled and cfg.intervention.forward:
        make_judge(cfg.intervention.judge, cfg.intervention.judge_options)
        if cfg.intervention.fluency != "perplexity":  # made with the model's own replies
            options = cfg.intervention.fluency_options
            make_judge(cfg.intervention.fluency, options, "intervention.fluency")
