"""The report of a comparison: scores, which differences hold, and what else each vector does."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saefty.interventions.steer import UNIT_WORDS, Unit
from saefty.plots.base import save_plot
from saefty.plots.off_target import OffTarget
from saefty.plots.steering_pareto import Pareto, WayPoints
from saefty.plots.steering_scores import ScoreCurve, ScoreCurves
from saefty.report import Section, plain, write_report
from saefty.steering import PLAIN
from saefty.steering_comparison import Comparison
from saefty.steering_tables import (
    CLEAR,
    OffTargets,
    attributes_table,
    differences_table,
    latents_table,
    strengths_table,
    top_latents_table,
    ways_table,
)

log = logging.getLogger(__name__)

WIDE = (8.6, 4.9)
NAMED = 5
"""Ways listed by name in a sentence, at most."""


def write_comparison(
    folder: Path,
    result: Comparison,
    off: OffTargets,
    *,
    controls: Sequence[str],
    behaviour: str,
    judges: tuple[str, str],
    unit: Unit,
    coverage: float,
) -> dict[str, Any]:
    """Write summary.md, summary.json, tables as CSV, and the pictures.

    Args:
        folder: The run's folder.
        result: The comparison.
        off: What else each way does.
        controls: The ways that are random directions.
        behaviour: What the behaviour is called.
        judges: Who scored behaviour and coherence.
        unit: What one alpha is.
        coverage: Share of the replies that must have both scores for a strength to count.

    Returns:
        The figures of summary.json, as JSON values.
    """
    tables = {
        "ways": ways_table(result, off),
        "strengths": strengths_table(result),
        "differences": differences_table(result),
    }
    if off.latents:
        tables["latents"] = latents_table(off)
    if off.attributes:
        tables["attributes"] = attributes_table(off)
    sections = [
        Section("Each way at its own strength", _read_ways(result, off), tables["ways"]),
        *_pictures(folder, result, off, controls, behaviour, unit),
        Section("Which differences hold", _read_differences(result), tables["differences"]),
    ]
    if off.attributes:
        text = "Attributes of the replies that nobody asked to change."
        sections.append(Section("Other attributes", text, tables["attributes"]))
    if off.latents:
        sections.append(Section("Latents that moved", _read_latents(off), top_latents_table(off)))
    left_out = _left_out(result, coverage)
    if left_out:
        log.warning("%s", left_out)
        sections.append(Section("Strengths that were left out", left_out))
    sections.append(Section("How it was measured", _how(judges, unit)))
    figures = {
        "behaviour": behaviour,
        "judges": {"behaviour": judges[0], "coherence": judges[1]},
        "unit": unit,
        "chosen_on": result.chosen_on,
        "reported_on": result.reported_on,
        "coverage": _coverage(result),
        "unsteered": result.unsteered,
        "rival": result.rival,
        "controls": list(controls),
        "ways": {way.name: {"best": way.best, "strengths": way.strengths} for way in result.ways},
        "differences": result.differences,
        "latents": off.latents,
        "attributes": off.attributes,
        "harmless": off.costs,
    }
    write_report(
        folder,
        title=f"Ways to steer towards {behaviour}",
        lead=_lead(result, off, controls, behaviour),
        sections=sections,
        figures=figures,
        tables=tables,
    )
    values = plain(figures)
    assert isinstance(values, dict)
    return values


def _pictures(
    folder: Path,
    result: Comparison,
    off: OffTargets,
    controls: Sequence[str],
    behaviour: str,
    unit: Unit,
) -> list[Section]:
    """Draw what was scored; a strength with too few scores leaves a gap."""
    points, curves = [], []
    for way in result.ways:
        drawn = [one for one in way.strengths if one.is_scored]
        alphas = tuple(one.alpha for one in drawn)
        at, control = drawn.index(way.best), way.name in controls
        points.append(
            WayPoints(
                way.name,
                alphas,
                tuple(one.behaviour for one in drawn),
                tuple(one.coherence for one in drawn),
                at,
                control,
            )
        )
        scores = tuple(one.score for one in drawn)
        curves.append(ScoreCurve(way.name, alphas, scores, at, control))
    prompts, words = result.reported_on, UNIT_WORDS[unit]
    plots = folder / "plots"
    save_plot(
        "steering_pareto", Pareto(tuple(points), behaviour, prompts), plots / "pareto.png",
        size=WIDE,
    )  # fmt: skip
    save_plot(
        "steering_scores", ScoreCurves(tuple(curves), behaviour, words, prompts),
        plots / "scores.png", size=WIDE,
    )  # fmt: skip
    found = [
        Section("Behaviour against coherence", figure="plots/pareto.png",
                caption="Up and to the right is better; a line a way, a point a strength."),
        Section("Score over strength", figure="plots/scores.png",
                caption="Behaviour × coherence on prompts that had no part in choosing."),
    ]  # fmt: skip
    if off.attributes:
        names = [one.name for one in next(iter(off.attributes.values()))]
        ways = [way.name for way in result.ways]
        data = OffTarget(
            tuple(ways),
            tuple(names),
            tuple(tuple(off.attributes[w][i].change for w in ways) for i in range(len(names))),
            tuple(tuple(off.attributes[w][i].p_holm for w in ways) for i in range(len(names))),
        )
        size = (7.2, 1.9 + (0.3 + 0.08 * len(names)) * len(ways))
        save_plot("off_target", data, plots / "off_target.png", size=size)
        found.append(
            Section("What else changed", figure="plots/off_target.png",
                    caption="Steered less unsteered replies to the same prompts.")
        )  # fmt: skip
    return found


def _coverage(result: Comparison) -> dict[str, float]:
    """Return the share of the reported replies that have both scores, way by way.

    Those of the unsteered model, which all ways share, are counted apart.
    """
    found = {PLAIN.arm: result.unsteered.scored}
    for way in result.ways:
        shares = [one.scored for one in way.strengths if one.alpha]
        found[way.name] = sum(shares) / len(shares)
    return found


def _left_out(result: Comparison, coverage: float) -> str:
    """Return which strengths had too few scores to be chosen; nothing where all had enough."""
    lines = []
    for way in result.ways:
        few = [one for one in way.strengths if not one.is_scored]
        if few:
            told = ", ".join(f"{one.alpha:g} ({one.scored:.0%} of those reported)" for one in few)
            lines.append(f"{_plainly(way.name)}: alpha {told}")
    if not lines:
        return ""
    return (
        f"A strength is chosen, and drawn, only where {coverage:.0%} of the replies have both "
        "scores, on the prompts for choosing and on the others: a model that is broken leaves few, "
        "and these are no fair sample. Left out: " + "; ".join(lines) + "."
    )


def _lead(result: Comparison, off: OffTargets, controls: Sequence[str], behaviour: str) -> str:
    own = [way for way in result.ways if way.name not in controls]
    best = own[0]
    if all(way.best.alpha == 0 for way in own):
        parts = [
            "No alpha of any vector beats the unsteered model where it may be chosen: "
            f"{behaviour} × coherence {result.unsteered.score}."
        ]
    else:
        best = next(way for way in own if way.best.alpha != 0)
        above = best.best.score.estimate > result.unsteered.score.estimate
        parts = [
            f"**{_plainly(best.name)}** scores highest: {behaviour} × coherence "
            f"{best.best.score} at alpha {best.best.alpha:g}; without steering "
            f"{result.unsteered.score}."
            if above
            else f"No vector scores above the unsteered model ({behaviour} × coherence "
            f"{result.unsteered.score}): **{_plainly(best.name)}**, the best of them, has "
            f"{best.best.score} at alpha {best.best.alpha:g}."
        ]
        idle = [way.name for way in own if way.best.alpha == 0]
        if idle:
            parts.append(
                f"No alpha of {_and(idle)} beats the unsteered model where it may be chosen."
            )
    rivals = {
        one.second if one.first == best.name else one.first: one
        for one in result.differences
        if best.name in (one.first, one.second)
    }
    if best.best.alpha == 0:
        rivals = {}
    # A difference holds in one direction: a rival may be the better one.
    ahead = {
        name: one.difference.estimate * (1 if one.first == best.name else -1)
        for name, one in rivals.items()
    }
    clear = [n for n, one in rivals.items() if one.p_holm <= CLEAR and n not in controls]
    even = [n for n, one in rivals.items() if one.p_holm > CLEAR and n not in controls]
    beaten = [name for name in clear if ahead[name] > 0]
    worse = [name for name in clear if ahead[name] <= 0]
    if worse:
        parts.append(f"It is worse than {_and(worse)} (p ≤ 0.05 after Holm).")
    if beaten:
        parts.append(f"It is better than {_and(beaten)} on these prompts (p ≤ 0.05 after Holm).")
    if even:
        parts.append(f"The data do not tell it from {_and(even)}.")
    if result.rival is not None:
        top = result.way(result.rival).best.score.estimate
        weak = [way.name for way in own if way.best.score.estimate <= top]
        parts.append(
            f"Of {len(controls)} random directions {_plainly(result.rival)} is the best where it "
            f"may be chosen; it scores {top:.3f}"
            + (f"; {_and(weak)} {'does' if len(weak) == 1 else 'do'} not pass it." if weak else ".")
        )
    leaks = [
        f"{_plainly(way)} moves {_plainly(one.name)} by {one.change.estimate:+.2f}"
        for way, shifts in off.attributes.items()
        for one in shifts
        if one.p_holm <= CLEAR and way not in controls
    ]
    if leaks:
        parts.append(f"Off target: {'; '.join(leaks)}.")
    return " ".join(parts)


def _read_ways(result: Comparison, off: OffTargets) -> str:
    text = (
        f"The strength of each way was chosen on {result.chosen_on} prompts; all figures are of "
        f"the other {result.reported_on}."
    )
    if off.latents:
        text += (
            " A latent's change counts by what it writes (its change times its decoder row's "
            "norm); the share on target is that of the latents the vector was made to move, in the "
            "direction in which it was to move them."
        )
    if any(cost.as_reply for cost in off.costs.values()):
        text += (
            " The vectors act on replies alone, so harmless text was read as if it were a reply."
        )
    return text


def _read_differences(result: Comparison) -> str:
    held = sum(one.p_holm <= CLEAR for one in result.differences)
    return (
        f"Of {len(result.differences)} pairs {held} differ at p ≤ 0.05 after Holm's correction. "
        "Intervals are bootstraps over prompts that both ways share (MOVER where all draws are "
        "alike); p is from exchanging the two ways' outcomes, cluster by cluster."
    )


def _read_latents(off: OffTargets) -> str:
    lines = [
        f"{_plainly(way)}: {found.moved} of {found.fired} latents moved (q ≤ 0.05)"
        for way, found in off.latents.items()
    ]
    units = min(found.clusters for found in off.latents.values())
    return (
        f"Latents of the replies, read without the vector; tests over {units} clusters of prompts. "
        + "; ".join(lines)
        + "."
    )


def _how(judges: tuple[str, str], unit: Unit) -> str:
    return (
        f"Behaviour was scored by `{judges[0]}`, coherence by `{judges[1]}`, both from 0 to 1; a "
        "reply without a score is missing, never 0. Alpha counts "
        f"{UNIT_WORDS[unit]}. All ways answered the same prompts with the same random numbers. "
        "How small a difference these prompts can tell is seen in the intervals of the differences."
    )


def _and(names: Sequence[str]) -> str:
    plainly = [_plainly(name) for name in names]
    if len(plainly) > NAMED:
        plainly = [*plainly[: NAMED - 1], f"{len(plainly) - NAMED + 1} others"]
    return plainly[0] if len(plainly) == 1 else f"{', '.join(plainly[:-1])} and {plainly[-1]}"


def _plainly(name: str) -> str:
    return name.replace("_", r"\_").replace("*", r"\*")
