"""The report of a comparison: scores, which differences hold, and what else each vector does."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saefty.interventions.steer import UNIT_WORDS, Unit
from saefty.plots.base import save_plot
from saefty.plots.off_target import OffTarget
from saefty.plots.steering_ways import SteeredWay, SteeredWays
from saefty.report import Section, plain, write_report
from saefty.steering import PLAIN, Dose
from saefty.steering_comparison import Comparison, Way
from saefty.steering_report import broken_section
from saefty.steering_scores import BY_DEFINITION, NONE_BETTER
from saefty.steering_tables import (
    CLEAR,
    OffTargets,
    WayFacts,
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
UNEQUAL = 1.2
"""How much longer one vector's alpha may be than another's before it is told."""


def write_comparison(
    folder: Path,
    result: Comparison,
    off: OffTargets,
    facts: Mapping[str, WayFacts],
    *,
    controls: Sequence[str],
    behaviour: str,
    judges: tuple[str, str],
    unit: Unit,
    coverage: float,
    broken: Mapping[Dose, str] | None = None,
) -> dict[str, Any]:
    """Write summary.md, summary.json, tables as CSV, and the pictures.

    Args:
        folder: The run's folder.
        result: The comparison.
        off: What else each way does.
        facts: What is known of each way before it is tried.
        controls: The ways that are random directions.
        behaviour: What the behaviour is called.
        judges: Who scored behaviour and coherence.
        unit: What one alpha is.
        coverage: Share of the replies that must have both scores for a strength to count.
        broken: Why a dose has no replies.

    Returns:
        The figures of summary.json, as JSON values.
    """
    tables = {
        "ways": ways_table(result, off, facts),
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
    broken = broken or {}
    left_out = _left_out(result, coverage, broken)
    if left_out:
        sections.append(Section("Strengths that were left out", left_out))
    if broken:
        sections.append(broken_section({dose.name: why for dose, why in broken.items()}))
    sections.append(Section("How it was measured", _how(result, judges, unit)))
    unequal = _unequal(facts, controls, unit)
    for told in filter(None, (left_out, unequal)):
        log.warning("%s", told.replace("\\", ""))  # a terminal is no Markdown
    figures = {
        "behaviour": behaviour,
        "judges": {"behaviour": judges[0], "coherence": judges[1]},
        "unit": unit,
        "facts": facts,
        "broken": {dose.name: why for dose, why in broken.items()},
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
        lead=" ".join(
            filter(None, [_lead(result, off, controls, behaviour), _badly_fitted(facts), unequal])
        ),
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
    ways = []
    for way in result.ways:
        drawn = [one for one in way.strengths if one.is_scored]
        ways.append(
            SteeredWay(
                way.name,
                tuple(one.alpha for one in drawn),
                tuple(one.behaviour for one in drawn),
                tuple(one.coherence for one in drawn),
                tuple(one.score for one in drawn),
                drawn.index(way.best) if way.steers else None,
                way.name in controls,
            )
        )
    data = SteeredWays(tuple(ways), behaviour, UNIT_WORDS[unit], result.reported_on)
    plots = folder / "plots"
    for name, file in (("steering_pareto", "pareto"), ("steering_scores", "scores")):
        save_plot(name, data, plots / f"{file}.png", size=WIDE)
    found = [
        Section("Behaviour against coherence", figure="plots/pareto.png",
                caption="Up and to the right is better; a line a way, a point a strength."),
        Section("Score over strength", figure="plots/scores.png",
                caption="Behaviour × coherence on prompts that had no part in choosing."),
    ]  # fmt: skip
    if off.attributes:
        names = [one.name for one in next(iter(off.attributes.values()))]
        shown = [way.name for way in result.ways if way.name in off.attributes]
        moved = OffTarget(
            tuple(shown),
            tuple(names),
            tuple(tuple(off.attributes[w][i].change for w in shown) for i in range(len(names))),
            tuple(tuple(off.attributes[w][i].p_holm for w in shown) for i in range(len(names))),
        )
        size = (7.2, 2.1 + (0.3 + 0.08 * len(names)) * len(shown))
        save_plot("off_target", moved, plots / "off_target.png", size=size)
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


def _left_out(result: Comparison, coverage: float, broken: Mapping[Dose, str]) -> str:
    """Return which strengths had too few scores to be chosen; nothing where all had enough."""
    lines = []
    for way in result.ways:
        few = [
            one
            for one in way.strengths
            if not one.is_scored and Dose(way.name, one.alpha) not in broken
        ]
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
    steering = [way for way in own if way.steers]
    if not steering:
        parts = [
            f"{NONE_BETTER.capitalize()}, for any vector, where strengths are chosen: "
            f"{behaviour} × coherence {result.unsteered.score}."
        ]
    else:
        best = steering[0]
        above = best.best.score.estimate > result.unsteered.score.estimate
        parts = [
            f"**{_plainly(best.name)}** scores highest: {behaviour} × coherence "
            f"{best.best.score} at alpha {best.best.alpha:g}; without steering "
            f"{result.unsteered.score}."
            if above
            else f"No vector scores above the unsteered model ({behaviour} × coherence "
            f"{result.unsteered.score}): **{_plainly(best.name)}**, the best of them, has "
            f"{best.best.score} at alpha {best.best.alpha:g}.",
            *_rivals(result, best, controls),
        ]
        idle = [way.name for way in own if not way.steers]
        if idle:
            parts.append(f"Of {_and(idle)}, {NONE_BETTER}, where strengths are chosen.")
    parts += _against_chance(result, steering, controls)
    leaks = [
        f"{_plainly(way)} moves {_plainly(one.name)} by {one.change.estimate:+.2f}"
        for way, shifts in off.attributes.items()
        for one in shifts
        if one.p_holm <= CLEAR and way not in controls
    ]
    if leaks:
        parts.append(f"Off target: {'; '.join(leaks)}.")
    return " ".join(parts)


def _rivals(result: Comparison, best: Way, controls: Sequence[str]) -> list[str]:
    """Say how the best way differs from the others; a difference holds in one direction."""
    rivals = {
        one.second if one.first == best.name else one.first: one
        for one in result.differences
        if best.name in (one.first, one.second)
    }
    ahead = {
        name: one.difference.estimate * (1 if one.first == best.name else -1)
        for name, one in rivals.items()
    }
    clear = [n for n, one in rivals.items() if one.p_holm <= CLEAR and n not in controls]
    even = [n for n, one in rivals.items() if one.p_holm > CLEAR and n not in controls]
    beaten = [name for name in clear if ahead[name] > 0]
    worse = [name for name in clear if ahead[name] <= 0]
    parts = []
    if worse:
        parts.append(f"It is worse than {_and(worse)} (p ≤ 0.05 after Holm).")
    if beaten:
        parts.append(f"It is better than {_and(beaten)} on these prompts (p ≤ 0.05 after Holm).")
    if even:
        parts.append(f"The data do not tell it from {_and(even)}.")
    return parts


def _against_chance(
    result: Comparison, steering: Sequence[Way], controls: Sequence[str]
) -> list[str]:
    """Say what random directions reach: the largest of several, which is more than one would."""
    if result.rival is None:
        return []
    rival, many = result.way(result.rival), len(controls)
    which = "the random direction" if many == 1 else f"any of {many} random directions"
    if not rival.steers:
        return [f"Of {which}, {NONE_BETTER}."]
    top = rival.best.score.estimate
    weak = [way.name for way in steering if way.best.score.estimate <= top]
    text = f"The random direction {_plainly(rival.name)} scores {top:.3f}"
    if many > 1:
        text += (
            f", the maximum over {many} random directions (and their strengths, where these are "
            "chosen), a stronger control than one random direction"
        )
    return [text + (f": {_and(weak)} {_does(weak)} not pass it." if weak else ".")]


def _does(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"


def _badly_fitted(facts: Mapping[str, WayFacts]) -> str:
    """Say of which vectors the effect they were fitted to is predicted badly."""
    badly = [
        f"{_plainly(way)} ({one.trust.correlation:.2f} [{one.trust.low:.2f}, "
        f"{one.trust.high:.2f}] over {one.trust.vectors} held-out vectors)"
        for way, one in facts.items()
        if one.trust and one.trust.is_low
    ]
    if not badly:
        return ""
    return (
        "The fit that made these vectors predicts the effect on their target badly, so that they "
        f"are guesswork: {'; '.join(badly)}."
    )


def _unequal(facts: Mapping[str, WayFacts], controls: Sequence[str], unit: Unit) -> str:
    """Say that vectors of very different lengths are pushed unequally far by one grid."""
    lengths = {way: one.length for way, one in facts.items() if way not in controls}
    shortest, longest = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    if unit == "residual" or lengths[longest] <= UNEQUAL * lengths[shortest]:
        return ""
    return (
        f"Not a fair comparison of directions: alpha counts {UNIT_WORDS[unit]}, and one alpha is "
        f"{lengths[shortest]:.3g} of the mean residual norm for {_plainly(shortest)} but "
        f"{lengths[longest]:.3g} for {_plainly(longest)}, so that the same grid pushes them "
        "unequally far. Set compare.unit=residual for one length."
    )


def _read_ways(result: Comparison, off: OffTargets) -> str:
    text = (
        f"The strength of each way was chosen on {result.chosen_on} prompts; all figures are of "
        f"the other {result.reported_on}, but for the score where it was chosen. Without steering "
        f"the score is {result.unsteered.chosen_on:.3f} where strengths were chosen and "
        f"{result.unsteered.score} where they are reported: the further apart, the less alike are "
        f"the halves. A dash: {NONE_BETTER}, so there is nothing to report."
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


def _how(result: Comparison, judges: tuple[str, str], unit: Unit) -> str:
    relative = (
        f" `{judges[1]}` is relative to the unsteered replies, whose coherence is 1 by definition "
        "and has no interval."
        if result.unsteered.coherence.method == BY_DEFINITION
        else ""
    )
    return (
        f"Behaviour was scored by `{judges[0]}`, coherence by `{judges[1]}`, both from 0 to 1; a "
        f"reply without a score is missing, never 0.{relative} Alpha counts "
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
