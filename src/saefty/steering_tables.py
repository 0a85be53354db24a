"""The tables of a comparison of ways to steer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saefty.off_target import AttributeShift, HarmlessCost, LatentMap
from saefty.report import Column, Table
from saefty.steering_comparison import Comparison

CLEAR = 0.05


@dataclass(frozen=True)
class OffTargets:
    """What else each way does, at its chosen strength, by the way's name.

    Attributes:
        latents: Which latents of the replies moved.
        attributes: How other attributes of the replies changed.
        costs: What it costs on harmless text.
    """

    latents: Mapping[str, LatentMap] = field(default_factory=dict)
    attributes: Mapping[str, Sequence[AttributeShift]] = field(default_factory=dict)
    costs: Mapping[str, HarmlessCost] = field(default_factory=dict)


def ways_table(result: Comparison, off: OffTargets) -> Table:
    """Return each way at its chosen strength, with what else it does."""
    columns = [
        Column("way", "way"),
        Column("alpha", "alpha", ".4g"),
        Column("score", "score", ".3f"),
        Column("low", "low", ".3f"),
        Column("high", "high", ".3f"),
        Column("behaviour", "behaviour", ".3f"),
        Column("coherence", "coherence", ".3f"),
        Column("missing", "not scored", ""),
    ]
    if off.latents:
        columns += [
            Column("on_target", "share of change on target, as wanted", ".2f"),
            Column("against_target", "the other way", ".2f"),
            Column("moved", "latents that moved", ""),
        ]
    if off.costs:
        columns += [
            Column("kl", "KL on harmless text, nats", ".3f"),
            Column("perplexity", "perplexity there", ".2f"),
            Column("perplexity_plain", "without steering", ".2f"),
        ]
    rows = []
    for way in result.ways:
        best = way.best
        row: dict[str, Any] = {
            "way": way.name,
            "alpha": best.alpha,
            "score": best.score.estimate,
            "low": best.score.low,
            "high": best.score.high,
            "behaviour": best.behaviour.estimate,
            "coherence": best.coherence.estimate,
            "missing": best.missing,
        }
        if way.name in off.latents:
            found = off.latents[way.name]
            any_target = any(one.target for one in found.shifts)
            row["moved"] = found.moved
            if any_target:
                row |= {"on_target": found.on_target, "against_target": found.against_target}
        if way.name in off.costs:
            cost = off.costs[way.name]
            row |= {"kl": cost.kl.estimate, "perplexity": cost.perplexity,
                    "perplexity_plain": cost.plain}  # fmt: skip
        rows.append(row)
    return Table(tuple(columns), tuple(rows))


def strengths_table(result: Comparison) -> Table:
    """Return what every way did at every strength."""
    rows = []
    for way in result.ways:
        for one in way.strengths:
            row: dict[str, Any] = {"way": way.name, "alpha": one.alpha}
            for name, value in (("score", one.score), ("behaviour", one.behaviour),
                                ("coherence", one.coherence)):  # fmt: skip
                row |= {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
            row |= {"score_where_chosen": one.chosen_on, "missing": one.missing,
                    "chosen": one == way.best}  # fmt: skip
            rows.append(row)
    return Table.of(rows)


def differences_table(result: Comparison) -> Table:
    """Return every pair of ways, and whether their difference holds."""
    columns = (
        Column("first", "way"),
        Column("second", "against"),
        Column("difference", "difference in score", "+.3f"),
        Column("low", "low", "+.3f"),
        Column("high", "high", "+.3f"),
        Column("p", "p", ".3g"),
        Column("p_holm", "p (Holm)", ".3g"),
        Column("holds", "holds"),
    )
    rows = [
        {
            "first": one.first,
            "second": one.second,
            "difference": one.difference.estimate,
            "low": one.difference.low,
            "high": one.difference.high,
            "p": one.p,
            "p_holm": one.p_holm,
            "holds": one.p_holm <= CLEAR,
        }
        for one in result.differences
    ]
    return Table(columns, tuple(rows))


def attributes_table(off: OffTargets) -> Table:
    """Return how every other attribute changed under every way."""
    columns = (
        Column("way", "way"),
        Column("attribute", "attribute"),
        Column("before", "without steering", ".3f"),
        Column("change", "change", "+.3f"),
        Column("low", "low", "+.3f"),
        Column("high", "high", "+.3f"),
        Column("p_holm", "p (Holm)", ".3g"),
    )
    rows = [
        {
            "way": way,
            "attribute": one.name,
            "before": one.before,
            "change": one.change.estimate,
            "low": one.change.low,
            "high": one.change.high,
            "p_holm": one.p_holm,
        }
        for way, shifts in off.attributes.items()
        for one in shifts
    ]
    return Table(columns, tuple(rows))


def latents_table(off: OffTargets) -> Table:
    """Return the latents that moved most under every way."""
    return Table.of(
        [
            {"way": way, **{key: getattr(one, key) for key in
             ("latent", "before", "after", "share", "q", "target")}}
            for way, found in off.latents.items()
            for one in found.shifts
        ]
    )  # fmt: skip


def top_latents_table(off: OffTargets) -> Table:
    """Return the same in one line a way."""
    columns = (Column("way", "way"), Column("latents", "latents, by share of the change"))
    rows = [
        {
            "way": way,
            "latents": ", ".join(
                f"{one.latent}{' (target)' if one.target else ''} {one.share:.0%}"
                for one in found.shifts[:6]
            ),
        }
        for way, found in off.latents.items()
    ]
    return Table(columns, tuple(rows))
