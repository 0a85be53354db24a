"""steer sweep: what a vector does to behaviour and fluency, at many strengths, by both methods."""

import logging
from collections.abc import Sequence
from typing import Any

from saefty.baselines import names_to_codes
from saefty.config import Config, config_tree
from saefty.data.base import DataSection
from saefty.engine import ThreadsSection
from saefty.interventions.vectors import SteeringVector
from saefty.judges.base import judge_record
from saefty.models.base import ModelAdapter, ModelSection
from saefty.records import Example
from saefty.runs import Run, RunSection, run_folder
from saefty.stages.base import (
    Outcome,
    data_inputs,
    existing_folder,
    model_inputs,
    open_data,
    open_model,
    settle_arithmetic,
)
from saefty.steering import Arm, Sampling, check_prompts, gather, replies_under
from saefty.steering_inputs import Given, norms_of_one, off_scale, tell_requests
from saefty.steering_report import BROKE, SweepResult, write_sweep
from saefty.steering_scores import check_judges, compares, points_of, reasons, scores_of
from saefty.steering_settings import SweepSection, alpha_grid

log = logging.getLogger(__name__)


class SweepConfig(Config):
    """Configuration of `saefty steer sweep`."""

    model: ModelSection | None = None
    """Which model to steer; None takes the one that the vector was made on."""

    data: DataSection
    """The prompts to reply to."""

    steer: SweepSection
    """With which vector, how strongly, and how to judge the replies."""

    engine: ThreadsSection = ThreadsSection()
    """How the process uses this machine."""

    run: RunSection = RunSection()
    """Where the run's folder lies."""


def run(
    cfg: SweepConfig,
    *,
    model: ModelAdapter | None = None,
    examples: Sequence[Example] | None = None,
) -> Outcome:
    """Steer, judge and write the report; a complete run is not done again.

    Args:
        cfg: The configuration.
        model: A model that is loaded already; None loads it.
        examples: Prompts that are read already; None reads `cfg.data`.

    Raises:
        ConfigError: If the grid has no spread, or a judge cannot be made.
        InputError: If a prompt is empty or longer than the context, or no reply could be scored.
        NumericError: If every strength turns the logits to NaN.
        SaeftyError: As the loaders of vector, model and data.
    """
    settings = cfg.steer
    alphas = alpha_grid(settings)
    check_judges(settings, "steer")
    given = Given(settings)
    prompts = open_data(cfg.data, examples)
    check_prompts(prompts)
    threads = settle_arithmetic(cfg.engine, existing_folder(cfg.run, "steer"))
    model = model or open_model(given.model_section(cfg.model), [given.vector.site])
    given.vector.check_model(model)
    inputs = {
        "model": model_inputs(model),
        "data": data_inputs(prompts),
        "vector": given.record(),
        "judges": {
            "behaviour": judge_record(settings.judge, settings.judge_options),
            "fluency": judge_record(settings.fluency, settings.fluency_options),
        },
        "threads": threads,
    }
    folder = run_folder(cfg.run, "steer")
    with Run(folder, "steer sweep", config_tree(cfg), inputs) as current:
        if current.finished:
            log.info("%s is complete; set run.dir to a new folder to sweep again", folder)
            return Outcome("steer sweep", folder, current.figures)
        arms = _arms(settings, given.fitted(model, prompts))
        one = norms_of_one(arms[0].vector, settings.unit, model, prompts)
        caution = off_scale(alphas, one)
        if caution:  # before hours of replies, not after
            log.warning("%s", caution)
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.seed, settings.batch_size
        )
        doses = 1 + len(arms) * (len(alphas) - 1)  # all arms are the same at 0
        tell_requests(settings, len(prompts), doses, settings.max_new_tokens)
        steered = replies_under(model, prompts, arms, alphas, sampling, folder / "replies")
        gather(folder / "replies.jsonl", prompts, steered)
        scores = scores_of(settings, "steer", model, prompts, steered, folder / "scores")
        missing = {kind: reasons(kind, folder / "scores") for kind in scores}
        points = points_of(
            scores["behaviour"],
            scores["fluency"],
            names_to_codes([prompt.group for prompt in prompts]),
            boots=settings.boots,
            seed=settings.seed,
            relative=compares(settings.fluency),
            broken=steered.broken,
        )
        result = SweepResult(
            arms=tuple(arms),
            alphas=alphas,
            anchors=settings.anchors,
            points=tuple(points),
            missing=missing,
            behaviour=settings.behaviour,
            judges={"behaviour": settings.judge, "fluency": settings.fluency},
            prompts=len(prompts),
            coverage=settings.coverage,
            norms=one,
            caution=caution,
            facts=_facts(arms[0].vector, settings),
        )
        figures = write_sweep(folder, result)
        current.ledger.ok = sum(point.behaviour.told.judged for point in points)
        for why, n in missing["behaviour"].items():
            current.ledger.skipped[why] = n
        if steered.broken:
            current.ledger.failed[BROKE] = len(steered.broken) * len(prompts)
        current.finish(figures)
    return Outcome("steer sweep", folder, figures)


def _arms(settings: SweepSection, vector: SteeringVector) -> list[Arm]:
    return [
        Arm(
            f"method_{method}",
            vector,
            method,
            settings.unit,
            settings.where,
            settings.skip_special,
        )
        for method in dict.fromkeys(settings.methods)
    ]


def _facts(vector: SteeringVector, settings: SweepSection) -> dict[str, Any]:
    return {
        "vector": {
            "method": vector.method,
            "site": vector.site.name,
            "norm": vector.norm,
            "norms": dict(vector.norms),
        },
        "unit": settings.unit,
    }
