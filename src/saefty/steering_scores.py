"""What steered replies are worth: behaviour and fluency under each dose, with intervals.

A judge of fluency that compares replies with the model's own scores these 1 by definition: that is
no measurement, and has no interval.

A reply that a judge could not score is missing: means are over those that it could, and how many
they are is told beside them. Where fewer than a set share of a curve's replies have a score, the
curve is not drawn: what is left may be a choice of the judge's, not the model's.
"""

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from saefty import fsio
from saefty.errors import ConfigError, ExternalError, InputError, IntegrityError
from saefty.judges.base import JUDGES, Judge, make_judge
from saefty.judges.coverage import Coverage, coverage
from saefty.log import progress
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.steering import product_interval
from saefty.models.base import ModelAdapter
from saefty.records import Example
from saefty.steering import PLAIN, Dose, Replies, Steered
from saefty.steering_settings import JudgedSection

log = logging.getLogger(__name__)

Kind = Literal["behaviour", "fluency"]
Scores = Mapping[Dose, Float[np.ndarray, "prompts"]]
"""A score from 0 to 1 for each prompt under each dose, NaN where there is none."""
PAIRED = (-1.0, 1.0)
BY_DEFINITION = "1 by definition"
NO_CHANGE = "0 by definition"
"""How the fluency of the model's own replies is found where it is what others are compared with."""
NONE_BETTER = "no strength beats not steering"
FAILED = "failed"
"""Why a judge that asks someone else has no score where it had no answer: it may come yet."""


@dataclass(frozen=True)
class Score:
    """One score under one dose.

    Attributes:
        mean: Over the replies that were scored, from 0 to 1.
        told: How many these are, and what the missing ones could change.
    """

    mean: Interval
    told: Coverage


@dataclass(frozen=True)
class DosePoint:
    """What one dose did.

    Attributes:
        dose: The arm and alpha.
        behaviour: How far the replies show the behaviour.
        fluency: How fluent they are.
        change: Behaviour less that of the unsteered replies to the same prompts.
        product: Mean behaviour times mean fluency.
        broken: Why there are no replies, where the dose broke the model.
    """

    dose: Dose
    behaviour: Score
    fluency: Score
    change: Interval
    product: Interval
    broken: str = ""

    def covered(self, least: float) -> bool:
        """Return whether a share of the replies has a score of behaviour, and of fluency too."""
        return all(one.told.share >= least for one in (self.behaviour, self.fluency))


def ten_points(score: float) -> float:
    """Return a score from 0 to 1 on the scale from 1 to 10."""
    return 1.0 + 9.0 * score


def judge_of(
    name: str,
    options: Mapping[str, Any],
    key: str,
    model: ModelAdapter,
    unsteered: Sequence[str],
) -> Judge:
    """Return a judge; one that compares replies with the model's own gets these.

    Args:
        name: Its name in `JUDGES`.
        options: Its settings.
        key: The configuration key that names it, for messages.
        model: The model, without intervention.
        unsteered: Its own replies to the prompts, in order.

    Raises:
        ConfigError: If the judge does not take these settings.
        UnknownNameError: If there is no such judge.
    """
    if compares(name):
        return JUDGES[name](model, unsteered, **options)
    return make_judge(name, options, key)


def check_judges(
    section: JudgedSection,
    name: str,
    more: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
) -> None:
    """Make the judges before the work that would be lost on one that cannot be made.

    Args:
        section: Which judges.
        name: Its name in the configuration, for messages.
        more: Further judges of behaviour with their settings, by key.

    Raises:
        ConfigError: If a judge does not take its settings, or one of fluency is to tell behaviour.
        UnknownNameError: If there is no such judge.
    """
    for key, (judge, options) in {
        f"{name}.judge": (section.judge, section.judge_options),
        **(more or {}),
    }.items():
        if compares(judge):
            raise ConfigError(
                f"{key}={judge}: this judge compares replies with the model's own, so it tells "
                "fluency and not behaviour.",
                then=f"Set {name}.fluency={judge}, and {key} to another judge.",
            )
        make_judge(judge, options, key)
    if not compares(section.fluency):
        make_judge(section.fluency, section.fluency_options, f"{name}.fluency")


def scores_of(
    section: JudgedSection,
    name: str,
    model: ModelAdapter,
    prompts: Sequence[Example],
    steered: Steered,
    folder: Path,
) -> dict[Kind, Scores]:
    """Return the scores of behaviour and of fluency of all replies; see `judged`.

    Args:
        section: Who judges.
        name: Its name in the configuration, for messages.
        model: The model, without intervention.
        prompts: What was replied to.
        steered: The replies; a dose without any has no scores.
        folder: Where scores are kept.

    Raises:
        ExternalError: If a judge that asks someone else had no answer for a reply.
        InputError: If a judge could score none of the replies.
        IntegrityError: If a file holds the scores of other prompts.
    """
    asked: dict[Kind, tuple[str, Mapping[str, Any], str]] = {
        "behaviour": (section.judge, section.judge_options, f"{name}.judge"),
        "fluency": (section.fluency, section.fluency_options, f"{name}.fluency"),
    }
    none = np.full(len(prompts), np.nan)
    found: dict[Kind, Scores] = {}
    for kind, (judge, options, key) in asked.items():
        own = judge_of(judge, options, key, model, steered.replies[PLAIN])
        scores = judged(own, kind, prompts, steered.replies, folder)
        _require_some(kind, scores, folder, key)
        found[kind] = {**scores, **dict.fromkeys(steered.broken, none)}
    return found


def compares(name: str) -> bool:
    """Return whether a judge compares replies with the model's own.

    Raises:
        UnknownNameError: If there is no such judge.
    """
    return "unsteered" in inspect.signature(JUDGES[name]).parameters


def judged(
    judge: Judge, kind: str, prompts: Sequence[Example], replies: Replies, folder: Path
) -> dict[Dose, Float[np.ndarray, "prompts"]]:
    """Return the scores of all replies; those on disk are not judged again.

    A score belongs to one reply: where the reply under it is another by now, the dose is judged
    anew. A dose that a judge had no answer for is not kept, and asked for again the next time.

    Args:
        judge: Scores replies.
        kind: What it scores, for the names of the files.
        prompts: What was replied to.
        replies: The replies by dose.
        folder: Where scores are kept, one file a dose, with the reason where there is none.

    Raises:
        ExternalError: If a judge that asks someone else had no answer for a reply.
        IntegrityError: If a file holds the scores of other prompts.
    """
    compared = getattr(judge, "unsteered", ("",) * len(prompts))
    unanswered: dict[str, int] = {}
    found: dict[Dose, Float[np.ndarray, "prompts"]] = {}
    with progress(f"judging {kind}", len(replies) * len(prompts), "replies") as bar:
        for dose, texts in replies.items():
            path = folder / kind / f"{dose.name}.jsonl"
            digests = [
                fsio.digest_bytes(fsio.dump_json_line([own, text]).encode())
                for own, text in zip(compared, texts, strict=True)
            ]
            records = _kept(path, prompts, digests)
            if records is None:
                records = _judge_one(judge, prompts, texts, digests)
                failed = sum(one["why"] == FAILED for one in records)
                if failed:
                    unanswered[dose.name] = failed
                else:
                    fsio.commit_text(path, "".join(map(fsio.dump_json_line, records)))
            found[dose] = np.array(
                [np.nan if one["score"] is None else one["score"] for one in records], dtype=float
            )
            bar.advance(len(prompts))
    if unanswered:
        told = ", ".join(f"{name} {n}" for name, n in list(unanswered.items())[:10])
        raise ExternalError(
            f"the judge of {kind} had no answer for {sum(unanswered.values())} of "
            f"{len(replies) * len(prompts)} replies, in {len(unanswered)} of {len(replies)} doses "
            f"({told}).",
            safe="All replies and the scores of the other doses are kept.",
            then="Run the same command again; it asks only what is missing. A reply that the "
            "judge will never answer for needs another judge, or to leave its prompt out.",
        )
    return found


def _kept(
    path: Path, prompts: Sequence[Example], digests: Sequence[str]
) -> list[dict[str, Any]] | None:
    """Return the scores in a file; None if there are none, or not of these replies.

    Raises:
        IntegrityError: If they are of other prompts.
    """
    if not path.exists():
        return None
    records = list(fsio.read_lines(path))
    if [one["example_id"] for one in records] != [prompt.id for prompt in prompts]:
        raise IntegrityError(
            f"{path} holds the scores of other prompts.",
            then="Remove it and run the same command again; it continues.",
        )
    same = [one.get("judged_xxh3_128") for one in records] == list(digests)
    if not same:
        log.warning("%s holds the scores of other replies; these are judged anew", path)
    return records if same else None


def reasons(kind: Kind, folder: Path) -> dict[str, int]:
    """Return why scores are missing, and how many for each reason."""
    counts: dict[str, int] = {}
    for path in sorted((folder / kind).glob("*.jsonl")):
        for one in fsio.read_lines(path):
            if one["score"] is None:
                counts[one["why"]] = counts.get(one["why"], 0) + 1
    return dict(sorted(counts.items()))


def _require_some(kind: Kind, scores: Scores, folder: Path, key: str) -> None:
    """Refuse a judge that could score no reply at all.

    Raises:
        InputError: If there is no score; it tells how many replies there were, and why.
    """
    if not all(np.isnan(one).all() for one in scores.values()):
        return
    why = ", ".join(f"{reason} {n}" for reason, n in reasons(kind, folder).items())
    raise InputError(
        f"none of the {sum(map(len, scores.values()))} replies has a score of {kind}: {why}.",
        safe="The replies are kept, and the reason for each lies in scores/ beside them.",
        then=f"Look at replies.jsonl in the run's folder; take another judge ({key}) or other "
        "prompts, with run.dir on a new folder.",
    )


def points_of(
    behaviour: Scores,
    fluency: Scores,
    clusters: Int[np.ndarray, "prompts"] | None,
    *,
    boots: int,
    seed: int,
    relative: bool = False,
    broken: Mapping[Dose, str] | None = None,
) -> list[DosePoint]:
    """Return what every dose did, with intervals from a bootstrap over prompts.

    Args:
        behaviour: Scores of behaviour; the unsteered dose is among them.
        fluency: Scores of fluency.
        clusters: A code a prompt, equal for prompts that belong together.
        boots: Draws of the bootstrap; the same prompts are drawn for all doses.
        seed: Fixes them.
        relative: Fluency compares with the unsteered replies, whose own is 1 by definition.
        broken: Why a dose has no replies.
    """
    base, why = behaviour[PLAIN], broken or {}
    draws = Bootstrap(len(base), clusters, boots=boots, seed=seed)
    return [
        DosePoint(
            dose,
            _score(draws, behaviour[dose]),
            _score(draws, fluency[dose], relative and dose == PLAIN),
            _change(draws, behaviour[dose] - base, dose == PLAIN),
            product_interval(draws, behaviour[dose], fluency[dose]),
            why.get(dose, ""),
        )
        for dose in behaviour
    ]


def share_scored(points: Sequence[DosePoint], kind: Kind) -> float:
    """Return the share of replies under several doses that have a score."""
    told: list[Coverage] = [getattr(point, kind).told for point in points if not point.broken]
    replies = sum(one.total for one in told)
    return sum(one.judged for one in told) / replies if replies else 0.0


def by_definition(values: Float[np.ndarray, "prompts"], found: Interval) -> Interval:
    """Return the mean of scores that are all 1 because they are compared with themselves."""
    if found.estimate != 1.0 or not (values[~np.isnan(values)] == 1.0).all():
        return found
    return replace(found, low=np.nan, high=np.nan, method=BY_DEFINITION)


def _score(draws: Bootstrap, values: Float[np.ndarray, "prompts"], itself: bool = False) -> Score:
    found = draws.mean(values)
    return Score(by_definition(values, found) if itself else found, coverage(values))


def _change(draws: Bootstrap, change: Float[np.ndarray, "prompts"], itself: bool) -> Interval:
    """Return the mean change; that of the unsteered replies from themselves is 0 by definition."""
    found = draws.mean(change, bounds=PAIRED)
    return replace(found, low=np.nan, high=np.nan, method=NO_CHANGE) if itself else found


def _judge_one(
    judge: Judge, prompts: Sequence[Example], texts: Sequence[str], digests: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the scores of one dose's replies as records, and why there is none."""
    scores = judge.score(prompts, texts)
    ratings = getattr(judge, "ratings", ())
    known = len(ratings) == len(texts)
    told = [one.status for one in ratings] if known else [None] * len(texts)
    return [
        {
            "example_id": prompt.id,
            "score": None if np.isnan(score) else float(score),
            "why": None if not np.isnan(score) else status or _why(text),
            "judged_xxh3_128": digest,
        }
        for prompt, text, score, status, digest in zip(
            prompts, texts, scores, told, digests, strict=True
        )
    ]


def _why(text: str) -> str:
    if not text.strip():
        return "empty"
    return "no score" if re.search(r"\w", text) else "no words"
