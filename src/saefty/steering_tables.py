"""The tables of a comparison of ways to steer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saefty.metrics.intervals import Interval
from saefty.off_target import AttributeShift, HarmlessCost, LatentMap
from saefty.report import Column, Table
from saefty.sae_ts.fit import HeldOut
from saefty.steering_comparison import Comparison
from saefty.steering_scores import NONE_BETTER

CLEAR = 0.05


@dataclass(frozen=True)
class WayFacts:
    """What is known of a way before it is tried.

    Attributes:
        length: How long one alpha of its vector is, in mean residual norms on these prompts.
        trust: How well the effect that the vector was fitted to was predicted, if it was.
    """

    length: float
    trust: HeldOut | None = None


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


def ways_table(result: Comparison, off: OffTargets, facts: Mapping[str, WayFacts]) -> Table:
    """Return each way at its chosen strength, with what else it does.

    A way that no strength of which beats not steering has no figures: it is the model as it is.
    """
    columns = [
        Column("way", "way"),
        Column("alpha", "alpha", ".4g"),
        Column("length", "length of one alpha, residual norms", ".3g"),
        *_with_ends("score", "score"),
        Column("score_where_chosen", "score where it was chosen"),
        Column("behaviour", "behaviour"),
        Column("coherence", "coherence"),
        Column("missing", "not scored", ""),
    ]
    if any(one.trust for one in facts.values()):
        columns += _with_ends("held_out", "held-out correlation of the fit", ".2f")
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
        best, notes = way.best, []
        known = facts[way.name]
        row: dict[str, Any] = {"way": way.name, "length": known.length}
        if known.trust:
            row |= {"held_out": known.trust.correlation, "held_out_low": known.trust.low,
                    "held_out_high": known.trust.high}  # fmt: skip
            notes += ["the fit predicts its target badly"] if known.trust.is_low else []
        if not way.steers:
            notes.append(NONE_BETTER)
        else:
            row |= {
                "alpha": best.alpha,
                **_ends("score", best.score),
                "score_where_chosen": best.chosen_on,
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
        rows.append({**row, "note": "; ".join(notes)})
    return Table((*columns, Column("note", "note")), tuple(rows))


def _with_ends(key: str, heading: str, form: str = ".3f") -> tuple[Column, ...]:
    """Return the columns of an estimate and its interval; `_ends` fills them."""
    return (
        Column(key, heading, form),
        Column(f"{key}_low", "low", form),
        Column(f"{key}_high", "high", form),
    )


def _ends(key: str, one: Interval) -> dict[str, float]:
    return {key: one.estimate, f"{key}_low": one.low, f"{key}_high": one.high}


def strengths_table(result: Comparison) -> Table:
    """Return what every way did at every strength."""
    rows = []
    for way in result.ways:
        for one in way.strengths:
            row: dict[str, Any] = {"way": way.name, "alpha": one.alpha}
            for name, value in (("score", one.score), ("behaviour", one.behaviour),
                                ("coherence", one.coherence)):  # fmt: skip
                row |= _ends(name, value)
            row |= {"score_where_chosen": one.chosen_on, "missing": one.missing,
                    "chosen": one == way.best}  # fmt: skip
            rows.append(row)
    return Table.of(rows)


def differences_table(result: Comparison) -> Table:
    """Return every pair of ways, and whether their difference holds."""
    columns = (
        Column("first", "way"),
        Column("second", "against"),
        *_with_ends("difference", "difference in score", "+.3f"),
        Column("p", "p", ".3g"),
        Column("p_holm", "p (Holm)", ".3g"),
        Column("holds", "holds"),
    )
    rows = [
        {
            "first": one.first,
            "second": one.second,
            **_ends("difference", one.difference),
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
        *_with_ends("change", "change", "+.3f"),
        Column("p_holm", "p (Holm)", ".3g"),
    )
    rows = [
        {
            "way": way,
            "attribute": one.name,
            "before": one.before,
            **_ends("change", one.change),
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
