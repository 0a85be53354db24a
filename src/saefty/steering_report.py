"""The report of a sweep: a table of every dose, pictures over alpha, and what does not follow."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saefty.interventions.steer import UNIT_WORDS
from saefty.metrics.intervals import Interval
from saefty.plots.base import save_plot
from saefty.plots.steer_curve import SteerCurve
from saefty.report import Column, Section, Table, plain, write_report
from saefty.steering import PLAIN, Arm
from saefty.steering_scores import (
    BY_DEFINITION,
    NONE_BETTER,
    DosePoint,
    Kind,
    Score,
    share_scored,
    ten_points,
)

log = logging.getLogger(__name__)

ASSETS = "assets"
METHOD_WORDS = {1: "Method 1 (h + αe)", 2: "Method 2 (norm kept)"}
FILES: Mapping[Kind, str] = {"behaviour": "behavioral_score", "fluency": "fluency_score"}
KINDS: tuple[Kind, ...] = ("behaviour", "fluency")
COLUMNS = (
    Column("method", "method"),
    Column("alpha", "alpha", ".6g"),
    *(
        Column(f"{kind}{key}", f"{kind}{words}", form)
        for kind in KINDS
        for key, words, form in (
            ("", "", ".3f"),
            ("_low", ", low", ".3f"),
            ("_high", ", high", ".3f"),
            ("_1_10", ", 1 to 10", ".2f"),
            ("_n", ", scored", ""),
            ("_missing", ", missing", ""),
            ("_least", ", if the missing were 0", ".3f"),
            ("_most", ", if the missing were 1", ".3f"),
        )
    ),
    Column("change", "behaviour less unsteered", "+.3f"),
    Column("change_low", "low", "+.3f"),
    Column("change_high", "high", "+.3f"),
    Column("product", "behaviour × fluency", ".3f"),
    Column("product_low", "low", ".3f"),
    Column("product_high", "high", ".3f"),
    Column("note", "note"),
)
FEW = "too few scored"
BROKE = "broke the model"
SHORT = ("method", "alpha", "behaviour", "behaviour_1_10", "behaviour_missing", "fluency",
         "fluency_1_10", "fluency_missing", "product", "product_low", "product_high",
         "note")  # fmt: skip


@dataclass(frozen=True)
class SweepResult:
    """A sweep and how it was made.

    Attributes:
        arms: The ways to steer.
        alphas: The grid, ascending; 0 is in it.
        anchors: The alphas to mark.
        points: What every dose did; the unsteered one first.
        missing: Why scores are missing, by kind.
        behaviour: What the behaviour is called.
        judges: The judges' names by kind.
        prompts: How many prompts there are.
        coverage: Share of a curve's replies that must have a score for its picture, and of a dose's
            replies for it to be the best.
        norms: How many mean residual norms one alpha is, on these prompts.
        facts: Further figures for summary.json.
        caution: What to know of the grid before anything is read from it.
    """

    arms: tuple[Arm, ...]
    alphas: tuple[float, ...]
    anchors: tuple[float, ...]
    points: tuple[DosePoint, ...]
    missing: Mapping[Kind, Mapping[str, int]]
    behaviour: str
    judges: Mapping[Kind, str]
    prompts: int
    coverage: float
    norms: float
    facts: Mapping[str, Any]
    caution: str = ""

    def curve(self, arm: Arm) -> list[DosePoint]:
        """Return an arm's points in order of alpha, the unsteered one at 0."""
        own = {point.dose.alpha: point for point in self.points if point.dose.arm == arm.name}
        own[0.0] = next(point for point in self.points if point.dose == PLAIN)
        return [own[alpha] for alpha in self.alphas]

    def best(self, arm: Arm) -> DosePoint | None:
        """Return the dose with the largest behaviour times fluency; None if none has both.

        A dose of whose replies too few have a score is none: a strength that breaks the model may
        leave a handful that can be judged, and these the best of all. Of several that are equal
        the weakest is the best, and not steering where it does as well.
        """
        there = [
            one
            for one in self.curve(arm)
            if one.covered(self.coverage) and not np.isnan(one.product.estimate)
        ]
        there.sort(key=lambda one: abs(one.dose.alpha))
        return max(there, key=lambda one: one.product.estimate, default=None)


def write_sweep(folder: Path, result: SweepResult) -> dict[str, Any]:
    """Write summary.md, summary.json, sweep.csv and the pictures.

    Args:
        folder: The run's folder.
        result: What was found.

    Returns:
        The figures of summary.json, as JSON values.
    """
    rows = tuple(_row(result, arm, point) for arm in result.arms for point in result.curve(arm))
    table = Table(COLUMNS, rows)
    short = tuple(column for column in COLUMNS if column.key in SHORT)
    sections: list[Section] = []
    drawn: list[str] = []
    left_out: dict[str, str] = {}
    for arm in result.arms:
        for kind in KINDS:
            name, why = _draw(folder, result, arm, kind)
            if why:
                left_out[name] = why
                log.warning("%s is not drawn: %s", name, why)
                sections.append(Section(_title(result, arm, kind), f"Not drawn: {why}."))
            else:
                drawn.append(name)
                caption = f"{_what(result, kind)} against alpha, {METHOD_WORDS[arm.method]}."
                sections.append(
                    Section(_title(result, arm, kind), figure=f"{ASSETS}/{name}", caption=caption)
                )
    figures = _figures(result, drawn, left_out)
    sections.append(Section("Every dose", table=Table(short, rows)))
    if figures["broken"]:
        sections.append(broken_section(figures["broken"]))
    sections.append(Section("How it was measured", _method(result)))
    write_report(
        folder,
        title=f"Steering towards {result.behaviour}",
        lead=_lead(result),
        sections=sections,
        figures=figures,
        tables={"sweep": table},
    )
    values = plain(figures)
    assert isinstance(values, dict)
    return values


def broken_section(broken: Mapping[str, str]) -> Section:
    """Return the part of a report on strengths without replies: which, and why."""
    columns = (Column("dose", "way and alpha"), Column("why", "why"))
    rows = tuple({"dose": dose, "why": why} for dose, why in broken.items())
    text = "They have no replies, so they have no score and cannot be chosen."
    return Section("Strengths that broke the model", text, Table(columns, rows))


def _draw(folder: Path, result: SweepResult, arm: Arm, kind: Kind) -> tuple[str, str]:
    """Draw one curve; return its file's name, and why it was left out, if it was."""
    name = f"{FILES[kind]}_vs_alpha_{arm.name}.png"
    curve = result.curve(arm)
    share = share_scored(curve, kind)
    if share < result.coverage:
        told = ", ".join(f"{why} {n}" for why, n in result.missing[kind].items())
        return name, (
            f"{share:.1%} of the replies have a score, less than {result.coverage:.0%}"
            + (f" (missing in the whole sweep: {told})" if told else "")
        )
    scores = [getattr(point, kind) for point in curve]
    other: Kind = "fluency" if kind == "behaviour" else "behaviour"
    data = SteerCurve(
        result.alphas,
        tuple(_on_ten(one.mean) for one in scores),
        _what(result, kind),
        METHOD_WORDS[arm.method],
        _unit(result, arm),
        result.anchors,
        tuple(
            alpha
            for alpha, one in zip(result.alphas, scores, strict=True)
            if one.told.share < result.coverage
        ),
        result.prompts,
        _what(result, other),
        tuple(ten_points(getattr(point, other).mean.estimate) for point in curve),
    )
    save_plot("steer_curve", data, folder / ASSETS / name)
    return name, ""


def _unit(result: SweepResult, arm: Arm) -> str:
    """Say what alpha counts, and how much that is: a curve may be flat as all of it is weak."""
    words = UNIT_WORDS[arm.unit]
    if arm.unit == "residual":
        return words
    return f"{words} (one is {result.norms:.3g} mean residual norms)"


def _on_ten(one: Interval) -> Interval:
    if one.method == BY_DEFINITION:
        one = replace(one, low=one.estimate, high=one.estimate)
    middle, low, high = map(ten_points, (one.estimate, one.low, one.high))
    return replace(one, estimate=middle, low=low, high=high)


def _what(result: SweepResult, kind: Kind) -> str:
    return result.behaviour if kind == "behaviour" else "fluency"


def _title(result: SweepResult, arm: Arm, kind: Kind) -> str:
    return f"{_what(result, kind)}, {METHOD_WORDS[arm.method].lower()}"


def _row(result: SweepResult, arm: Arm, point: DosePoint) -> dict[str, Any]:
    row: dict[str, Any] = {"method": arm.method, "alpha": point.dose.alpha}
    row["note"] = BROKE if point.broken else "" if point.covered(result.coverage) else FEW
    for kind in KINDS:
        row |= {f"{kind}{key}": value for key, value in _cells(getattr(point, kind)).items()}
    for name, one in (("change", point.change), ("product", point.product)):
        row |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
    return row


def _cells(score: Score) -> dict[str, Any]:
    return {
        "": score.mean.estimate,
        "_low": score.mean.low,
        "_high": score.mean.high,
        "_1_10": ten_points(score.mean.estimate),
        "_n": score.told.judged,
        "_missing": score.told.missing,
        "_least": score.told.low,
        "_most": score.told.high,
    }


def _figures(
    result: SweepResult, drawn: Sequence[str], left_out: Mapping[str, str]
) -> dict[str, Any]:
    unsteered = next(point for point in result.points if point.dose == PLAIN)
    best = {arm.name: result.best(arm) for arm in result.arms}
    return {
        **result.facts,
        "prompts": result.prompts,
        "alphas": list(result.alphas),
        "norms_of_one_alpha": result.norms,
        "unsteered": {kind: getattr(unsteered, kind).mean.estimate for kind in KINDS},
        "best": {
            name: None
            if point is None or point.dose == PLAIN
            else {
                "alpha": point.dose.alpha,
                "behaviour": point.behaviour.mean.estimate,
                "fluency": point.fluency.mean.estimate,
                "product": point.product.estimate,
            }
            for name, point in best.items()
        },
        "no_better": [
            name for name, point in best.items() if point is not None and point.dose == PLAIN
        ],
        "broken": {point.dose.name: point.broken for point in result.points if point.broken},
        "missing": result.missing,
        "plots": list(drawn),
        "plots_left_out": dict(left_out),
    }


def _lead(result: SweepResult) -> str:
    base = next(point for point in result.points if point.dose == PLAIN)
    words = [
        f"Unsteered, {result.behaviour} is {base.behaviour.mean} (0 to 1) and fluency "
        f"{_fluency(result, base)}, over {_scored(result, base)}."
    ]
    for arm in result.arms:
        best = result.best(arm)
        if best is None:
            words.append(
                f"{METHOD_WORDS[arm.method]}: no dose has both scores of {result.coverage:.0%} of "
                "its replies."
            )
        elif best.dose == PLAIN:
            words.append(
                f"{METHOD_WORDS[arm.method]}: {NONE_BETTER}: no alpha of the grid has a larger "
                f"product of both than the unsteered model's {base.product.estimate:.3f}."
            )
        else:
            words.append(
                f"{METHOD_WORDS[arm.method]}: the product of both is largest at alpha = "
                f"{best.dose.alpha:.6g}, with {result.behaviour} {best.behaviour.mean}, fluency "
                f"{best.fluency.mean} and product {best.product}."
            )
        broke = [point.dose.alpha for point in result.curve(arm) if point.broken]
        if broke:
            told = ", ".join(f"{alpha:.6g}" for alpha in broke)
            words.append(f"At alpha = {told} the model broke: no reply, no score.")
        few = sum(
            not point.broken and not point.covered(result.coverage) for point in result.curve(arm)
        )
        if best is not None and few:
            words.append(
                f"{few} of its {len(result.alphas)} alphas could not be chosen: {FEW} of their "
                f"replies (less than {result.coverage:.0%})."
            )
    if any(best and best.dose != PLAIN for best in map(result.best, result.arms)):
        words.append(
            "That alpha was chosen on the prompts it is reported on, which flatters it: use "
            "`saefty steer compare` for a method's score."
        )
    return " ".join(filter(None, [*words, result.caution]))


def _scored(result: SweepResult, base: DosePoint) -> str:
    """Say over how many prompts, and how many of them the unsteered figures rest on."""
    few = [
        f"{getattr(base, kind).told.judged} have a score of {_what(result, kind)}"
        for kind in KINDS
        if getattr(base, kind).told.missing
    ]
    told = f"{result.prompts} prompts"
    return f"{told}, of whose replies only {' and '.join(few)}" if few else told


def _fluency(result: SweepResult, base: DosePoint) -> str:
    """Say how fluent unsteered replies are, which some judges measure all others by."""
    if base.fluency.mean.method == BY_DEFINITION:
        return f"1 by definition (`{result.judges['fluency']}` is relative to these replies)"
    return str(base.fluency.mean)


def _method(result: SweepResult) -> str:
    arm = result.arms[0]
    where = arm.where if isinstance(arm.where, str) else f"places {list(arm.where)}"
    parts = [
        f"The vector ({arm.vector.method}, norm {arm.vector.norm:.4g}) is added at "
        f"`{arm.vector.site}`, tokens: {where}"
        + (", special tokens left alone" if arm.skip_special else "")
        + f"; alpha is {_unit(result, arm)}.",
        "All methods and alphas get the same prompts, the same length and the same random numbers; "
        "alpha 0 is the model as it is, generated once for all.",
        f"Behaviour is scored by `{result.judges['behaviour']}`, fluency by "
        f"`{result.judges['fluency']}`, from 0 to 1; 1 to 10 is 1 + 9 times that. A reply that "
        "could not be scored is missing, never 0.",
        _missing(result),
        "Intervals are of 95 %, from a bootstrap over prompts (Wilson's where a score is 0 or 1).",
    ]
    return " ".join(parts)


def _missing(result: SweepResult) -> str:
    """Say how many scores are missing and why."""
    told = []
    for kind in KINDS:
        reasons = result.missing[kind]
        why = ", ".join(f"{reason} {n}" for reason, n in reasons.items())
        total = result.prompts * sum(not point.broken for point in result.points)
        told.append(f"{sum(reasons.values())} of {total} of {kind}" + (f" ({why})" if why else ""))
    return f"Missing are {' and '.join(told)}."
