"""What a guard's scores of a file come to: how many are flagged and, with labels, how well."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.baselines import names_to_codes
from saefty.guards.card import sections
from saefty.guards.files import GuardFiles
from saefty.guards.record import facts_record, interval_record, model_record, spec_record
from saefty.guards.scoring import OK, Verdicts
from saefty.guards.spec import as_chance
from saefty.metrics.intervals import Bootstrap, Interval, ranking_measures
from saefty.records import Example

BOOTS, LEAST_BOOTS, DRAWN_VALUES = 1000, 200, 20_000_000
"""Draws of a bootstrap: fewer where there are many examples, whose intervals are narrow."""
BLOCK_VALUES = 4_000_000
"""Drawn values that are held at once."""
Values: TypeAlias = Float[np.ndarray, "examples"]
Codes: TypeAlias = Int[np.ndarray, "examples"]
Weights: TypeAlias = Float[np.ndarray, "draws examples"]
Draws: TypeAlias = Float[np.ndarray, "draws"]
SHOWN = 60
"""Characters of a text in a list."""


def score_row(
    example: Example, verdicts: Verdicts, place: int, least: float
) -> dict[str, float | bool | str | None]:
    """Return the line of one text: its score, or why it has none.

    Args:
        example: The text.
        verdicts: What the guard said.
        place: The text's place among them.
        least: The threshold in log-odds.
    """
    status = verdicts.statuses[place]
    log_odds = float(verdicts.log_odds[place])
    read = status == OK
    row: dict[str, float | bool | str | None] = {
        "id": example.id,
        "score": as_chance(log_odds) if read else None,
        "log_odds": log_odds if read else None,
        "flagged": log_odds >= least if read else None,
        "status": status,
    }
    if place in verdicts.reasons:
        row["reason"] = verdicts.reasons[place]
    if example.label is not None:
        row["label"] = example.label
    return row


def is_score_row(value: Any) -> bool:
    """Return whether a JSON value is a line that `score_row` makes."""
    keys = {"id", "score", "log_odds", "flagged", "status"}
    return isinstance(value, dict) and keys <= value.keys() <= keys | {"reason", "label"}


def measure(examples: Sequence[Example], verdicts: Verdicts, least: float) -> dict[str, Any]:
    """Return counts and, where both labels occur, how well the guard tells them apart.

    Args:
        examples: The texts.
        verdicts: What the guard said of them.
        least: The threshold in log-odds.

    Returns:
        JSON values; `auroc`, `recall` and `false_positive_rate` are intervals or None.
    """
    read = verdicts.read
    flagged = np.zeros(len(read), dtype=bool)
    flagged[read] = verdicts.log_odds[read] >= least
    unread = Counter(status for status in verdicts.statuses if status != OK)
    figures: dict[str, Any] = {
        "texts": len(examples),
        "scored": int(read.sum()),
        "flagged": int(flagged.sum()),
        "not_scored": dict(sorted(unread.items())),
        "threshold": as_chance(least),
        "threshold_log_odds": least,
    }
    rows = [i for i, example in enumerate(examples) if read[i] and example.label is not None]
    harmful = np.array([examples[i].label for i in rows], dtype=bool)
    figures |= {"labelled": len(rows), "harmful": int(harmful.sum())}
    figures |= dict.fromkeys(("auroc", "recall", "false_positive_rate"))
    if not rows:
        return figures
    codes = names_to_codes([examples[i].group for i in rows])
    hits = flagged[rows].astype(float)
    figures["recall"] = interval_record(_mean(np.where(harmful, hits, np.nan), codes))
    alarms = _mean(np.where(harmful, np.nan, hits), codes)
    figures["false_positive_rate"] = interval_record(alarms)
    if harmful.any() and not harmful.all():
        figures["auroc"] = interval_record(_auroc(verdicts.log_odds[rows], harmful, codes))
    return figures


def summary(figures: Mapping[str, Any]) -> str:
    """Return the figures of `measure` in words."""
    left = figures["texts"] - figures["scored"]
    reasons = ", ".join(f"{status} {n}" for status, n in figures["not_scored"].items())
    lines = [
        f"{figures['scored']} of {figures['texts']} texts scored"
        + (f" ({left} not: {reasons})" if left else "")
        + f"; {figures['flagged']} flagged from {figures['threshold']:.4g} on."
    ]
    if not figures["labelled"]:
        return lines[0]
    lines.append(
        f"{figures['labelled']} of them have a label, {figures['harmful']} harmful"
        + (":" if figures["auroc"] else "; an AUROC needs both kinds.")
    )
    names = {
        "auroc": "AUROC",
        "recall": "recall at the threshold",
        "false_positive_rate": "false-positive rate at the threshold",
    }
    for key, name in names.items():
        if figures[key]:
            lines.append(f"  {name} {_interval(figures[key])}")
    if "unseen" in figures:
        lines.append(f"Without the texts it was fitted on: {summary(figures['unseen'])}")
    return "\n".join(lines)


def listed(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """Return a few scored texts as a list, a line each."""
    width = max((len(str(row["id"])) for row in rows), default=0)
    lines = []
    for row, text in zip(rows, texts, strict=True):
        shown = " ".join(text.split())
        shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
        told = "" if row["score"] is None else f"{row['score']:.4f}"
        mark = row["status"] if row["flagged"] is None else ("flagged" if row["flagged"] else "")
        lines.append(f"{row['id']!s:>{width}}  {told:<6}  {mark:<8} {shown}".rstrip())
    return "\n".join(lines)


def describe(files: GuardFiles) -> dict[str, Any]:
    """Return what a guard is, as JSON values."""
    spec = files.spec
    return {
        "guard": str(files.folder),
        "reads": spec_record(spec),
        "model": model_record(spec.model),
        "sae": files.sae_record,
        "words": len(spec.vocabulary) or None,
        "columns": {"read": len(files.linear.columns), "of": files.linear.width},
        "thresholds": {name: as_chance(value) for name, value in spec.thresholds.items()},
        "facts": facts_record(files.facts),
        "saefty": files.saefty,
    }


def described(files: GuardFiles) -> str:
    """Return what a guard is, in words: what its card says."""
    told = sections(files.spec, files.linear, files.facts, files.sae_record)
    lines = [f"{files.folder}: {files.facts.probe}"]
    for title, content in told.items():
        lines += ["", title, *(f"  {line}" for line in content)]
    return "\n".join([*lines, "", f"Written by saefty {files.saefty}."])


def _mean(values: Values, codes: Codes | None) -> Interval:
    """Return the mean of the values that are not NaN, with its interval."""
    kept = ~np.isnan(values)
    filled = np.where(kept, values, 0.0)

    def means(weights: Weights) -> Draws:
        counts = weights @ kept
        return (weights @ filled)[counts > 0] / counts[counts > 0]

    return _in_blocks(lambda one: one.mean(values), means, codes, len(values))


def _auroc(scores: Values, harmful: Bool[np.ndarray, "examples"], codes: Codes | None) -> Interval:
    """Return the area under the ROC curve, with its interval."""

    def areas(weights: Weights) -> Draws:
        both = (weights @ harmful > 0) & (weights @ ~harmful > 0)
        return ranking_measures(scores, harmful, weights[both])["auroc"]

    return _in_blocks(lambda one: one.ranking(scores, harmful)["auroc"], areas, codes, len(scores))


def _in_blocks(
    interval_of: Callable[[Bootstrap], Interval],
    draws_of: Callable[[Weights], Draws],
    codes: Codes | None,
    examples: int,
) -> Interval:
    """Return a bootstrap's interval; of many examples a block of draws is held at a time."""
    boots = min(BOOTS, max(LEAST_BOOTS, DRAWN_VALUES // examples))
    block = min(boots, max(1, BLOCK_VALUES // examples))
    bootstrap = Bootstrap(examples, codes, boots=block)
    interval = interval_of(bootstrap)
    exact = interval.method.startswith(("Wilson", "Newcombe", "no values"))
    if block == boots or exact or interval.clusters < 2:
        return interval
    draws = [draws_of(bootstrap.weights)]
    for number in range(1, -(-boots // block)):
        bootstrap = Bootstrap(examples, codes, boots=block, seed=number)
        draws.append(draws_of(bootstrap.weights))
    ends = [(1 - interval.level) / 2, (1 + interval.level) / 2]
    low, high = np.quantile(np.concatenate(draws), ends)
    method = f"bootstrap over {interval.clusters} clusters"
    return replace(interval, low=float(low), high=float(high), method=method)


def _interval(record: Mapping[str, Any]) -> str:
    low, high = (float("nan") if record[key] is None else record[key] for key in ("low", "high"))
    return str(
        Interval(
            record["estimate"], low, high, record["method"], record["clusters"], record["level"]
        )
    )
