"""The tables of an evaluation: latents, detectors, what silencing did, layers beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from saefty.gating import GatePoint
from saefty.harm_evaluation import LayerResult
from saefty.latent_gating import LatentGating, LatentPoint
from saefty.metrics.intervals import Interval
from saefty.report import Column, Table
from saefty.silencing import GateResult

SCORES = ("consensus", "auroc", "dfreq", "dmag", "kl", "fires", "p", "q", "max_p")
"""What every evaluation has, in the order of the columns; other packages' scores follow."""

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SPOKEN_OF = 8
"""How many silenced latents are spoken of in words and compared between layers, at most."""

LATENT_COLUMNS = (
    "latent", "found", "report_auroc", "report_auroc_low", "report_auroc_high", "report_dfreq",
    "p_holm", "q", "max_p",
)  # fmt: skip


def latent_table(result: LayerResult) -> Table:
    """Return every latent that fires: its scores where it was chosen, and where it was reported."""
    evaluation = result.evaluation
    reported = {one.latent: one for one in evaluation.latents}
    firing = [int(i) for i in (evaluation.scores["fires"] > 0).nonzero()[0]]
    order = [*reported, *(latent for latent in firing if latent not in reported)]
    names = [*SCORES, *sorted(set(evaluation.scores) - set(SCORES))]
    rows = []
    for latent in order:
        row: dict[str, Any] = {"latent": latent, "reported": latent in reported}
        row.update({name: float(evaluation.scores[name][latent]) for name in names})
        if latent in reported:
            one = reported[latent]
            row.update(
                found=one.found,
                report_auroc=one.auroc.estimate,
                report_auroc_low=one.auroc.low,
                report_auroc_high=one.auroc.high,
                report_dfreq=one.dfreq.estimate,
                report_dfreq_low=one.dfreq.low,
                report_dfreq_high=one.dfreq.high,
                p_report=one.p,
                p_holm=one.p_holm,
            )
        rows.append(row)
    headings = {
        "latent": ("latent", "d"),
        "reported": ("reported", ""),
        "found": ("finding", ""),
        "report_auroc": ("AUROC", ".3f"),
        "report_auroc_low": ("from", ".3f"),
        "report_auroc_high": ("to", ".3f"),
        "report_dfreq": ("dfreq", ".2f"),
        "report_dfreq_low": ("from", ".2f"),
        "report_dfreq_high": ("to", ".2f"),
        "p_report": ("p", ".2g"),
        "p_holm": ("p (Holm)", ".2g"),
        "q": ("q (selection)", ".2g"),
        "max_p": ("p (maximum)", ".2g"),
        **{name: (name, ".3g") for name in names if name not in ("q", "max_p")},
    }
    columns = tuple(Column(key, heading, form) for key, (heading, form) in headings.items())
    return Table(columns, tuple(rows))


def probe_table(result: LayerResult) -> Table:
    """Return how every detector did on the report half."""
    columns = (
        Column("name", "detector"),
        Column("inputs", "inputs", "d"),
        Column("auroc", "AUROC"),
        Column("low", "from"),
        Column("high", "to"),
        Column("ap", "average precision"),
        Column("recall", "recall at 1 % FPR"),
    )
    rows = [
        {
            "name": probe.name,
            "inputs": probe.inputs,
            "auroc": probe.auroc.estimate,
            "low": probe.auroc.low,
            "high": probe.auroc.high,
            "ap": probe.average_precision.estimate,
            "recall": probe.recall_at_1pct_fpr.estimate,
        }
        for probe in result.probes
    ]
    return Table(columns, tuple(rows))


def gate_table(gating: GateResult) -> Table:
    """Return what each condition did to behaviour and fluency."""
    columns = (
        Column("silenced", "silenced", "d"),
        Column("arm", "which"),
        Column("harmful", f"{gating.behaviour}, harmful", ".2f"),
        Column("harmful_change", "change", "+.2f"),
        Column("harmful_change_low", "from", "+.2f"),
        Column("harmful_change_high", "to", "+.2f"),
        Column("harmless", f"{gating.behaviour}, harmless", ".2f"),
        Column("harmless_change", "change", "+.2f"),
        Column("fluency_harmful", "fluency, harmful", ".2f"),
        Column("fluency_harmless", "fluency, harmless", ".2f"),
        Column("judged", "judged", "d"),
        Column("replies", "of", "d"),
    )
    rows = []
    for point in gating.points:
        harmful, harmless = point.harmful, point.harmless
        row: dict[str, Any] = {
            "silenced": point.count,
            "arm": point.condition.arm if point.count else "none",
            "harmful": harmful.rate.estimate,
            "harmless": harmless.rate.estimate,
            "fluency_harmful": harmful.fluency.estimate,
            "fluency_harmless": harmless.fluency.estimate,
            "judged": harmful.judged + harmless.judged,
            "replies": harmful.prompts + harmless.prompts,
        }
        if harmful.change is not None and harmless.change is not None:
            row.update(
                harmful_change=harmful.change.estimate,
                harmful_change_low=harmful.change.low,
                harmful_change_high=harmful.change.high,
                harmless_change=harmless.change.estimate,
            )
        rows.append(row)
    return Table(columns, tuple(rows))


def stored_table(stored: LatentGating) -> Table:
    """Return what each condition left of the evidence in stored activations."""
    columns = (
        Column("gated", "gated", "d"),
        Column("arm", "which"),
        *_columns("safety", "harmful, no longer caught", ".2f"),
        *_columns("changed", "harmless, call changed", ".2f"),
        *_columns("auroc", "AUROC left", ".3f"),
        *_columns("relearnt", "AUROC, learnt anew", ".3f"),
        *(
            column
            for label in ("harmful", "harmless")
            for column in (
                *_columns(f"called_{label}", f"called harmful, {label}", ".2f"),
                *_columns(f"relative_{label}", f"‖Δ‖/‖x‖, {label}", ".3f"),
                *_columns(f"cosine_{label}", f"cosine, {label}", ".3f"),
            )
        ),
    )
    rows = []
    for point in stored.points:
        row: dict[str, Any] = {
            "gated": point.count,
            "arm": point.condition.arm if point.count else "none",
            **_ends("safety", point.safety),
            **_ends("changed", point.changed),
            **_ends("auroc", point.auroc),
            **_ends("relearnt", point.relearnt),
        }
        for label, change in (("harmful", point.harmful), ("harmless", point.harmless)):
            row |= _ends(f"called_{label}", change.called)
            row |= _ends(f"relative_{label}", change.relative)
            row |= _ends(f"cosine_{label}", change.cosine)
        rows.append(row)
    return Table(columns, tuple(rows))


def percentile_table(result: LayerResult, harmful: Bool[np.ndarray, "examples"]) -> Table:
    """Return percentiles of every score over latents, and of the reported latents over examples.

    Scores are those of the latents that fire on the selection half; the values of a latent are
    pooled, of the examples of one label of the report half, those on which it is silent included.
    """
    evaluation = result.evaluation
    fires = evaluation.scores["fires"] > 0
    rows = [
        {"of": name, "over": "firing latents", **_spread(values[fires])}
        for name, values in evaluation.scores.items()
    ]
    report = np.flatnonzero(evaluation.report)
    latents = [one.latent for one in evaluation.latents]
    values = result.pooled[report][:, latents].toarray() if latents else np.zeros((len(report), 0))
    for label, mask in (("harmful", harmful[report]), ("harmless", ~harmful[report])):
        for place, latent in enumerate(latents):
            spread = _spread(values[mask, place])
            rows.append({"of": "latent", "latent": latent, "over": label, **spread})
    columns = (
        Column("of", "of"),
        Column("latent", "latent", "d"),
        Column("over", "over"),
        Column("n", "n", "d"),
        Column("mean", "mean", ".4g"),
        Column("zeros", "share of zeros", ".3f"),
        Column("min", "min", ".4g"),
        *(Column(f"p{p}", f"{p} %", ".4g") for p in PERCENTILES),
        Column("max", "max", ".4g"),
    )
    return Table(columns, tuple(rows))


def layers_table(results: Sequence[LayerResult]) -> Table:
    """Return one row a layer: its best latent, the detectors, the SAE, and what silencing did."""
    detectors = list(dict.fromkeys(key for one in results for key in detectors_of(one)))
    columns = (
        Column("layer", "layer"),
        Column("site", "site"),
        Column("significant", "findings", "d"),
        Column("best_latent", "best latent", "d"),
        *_columns("best_auroc", "its AUROC", ".3f"),
        *(column for name in detectors for column in _columns(_key(name), name, ".3f")),
        Column("fvu", "FVU"),
        Column("l0", "L0", ".1f"),
        Column("gated", "gated", "d"),
        *_columns("safety", "no longer caught", ".2f"),
        *_columns("safety_control", "control", ".2f"),
        Column("silenced", "silenced", "d"),
        *_columns("change", "behaviour, harmful", "+.2f"),
        *_columns("change_control", "control", "+.2f"),
    )
    return Table(columns, tuple(_layer_row(one) for one in results))


def shown_layers(table: Table) -> Table:
    """Return the columns of `layers_table` that a page has room for, where any layer has them."""
    wanted = ("layer", "significant", "best_latent", "best_auroc", "dense_probe", "sae_latents",
              "1_latent", "2_latents", "5_latents", "fvu", "l0", "safety", "safety_control",
              "change", "change_control")  # fmt: skip
    there = {key for row in table.rows for key, value in row.items() if value is not None}
    kept = (column for column in table.columns if column.key in wanted and column.key in there)
    return Table(tuple(kept), table.rows)


def detectors_of(result: LayerResult) -> dict[str, Interval]:
    """Return the AUROC of a layer's detectors by names that are the same in every layer."""
    found = {}
    for probe in result.probes:
        name = probe.name
        if name.startswith("dense probe"):
            _, where, tokens = name.split(", ")
            at = "embedding, " if where == "embedding" else ""
            name = f"dense probe, {at}{tokens}".removesuffix(", mean over tokens")
        found[name] = probe.auroc
    return found


def stored_at(stored: LatentGating, arm: str, count: int) -> LatentPoint | None:
    """Return the condition of one arm that gates so many latents; 0 is the ungated one."""
    for point in stored.points:
        if point.count == count and (count == 0 or point.condition.arm == arm):
            return point
    return None


def point_at(gating: GateResult, arm: str, count: int) -> GatePoint | None:
    """Return the condition of one arm that silences so many latents; 0 is the ungated one."""
    for point in gating.points:
        if point.count == count and (count == 0 or point.condition.arm == arm):
            return point
    return None


def strongest_count(points: Sequence[GatePoint] | Sequence[LatentPoint]) -> int:
    """Return the number of silenced latents that is read out in words: 8, or the nearest below."""
    counts = {point.count for point in points if point.condition.arm == "target"}
    return max((count for count in counts if count <= SPOKEN_OF), default=0)


def _layer_row(result: LayerResult) -> Mapping[str, Any]:
    best, silenced = result.evaluation.best, result.silenced
    row: dict[str, Any] = {
        "layer": str(result.layer),
        "site": result.site,
        "significant": result.significant,
        "fvu": result.fvu,
        "l0": result.firing.mean_l0,
    }
    if best is not None:
        row |= {"best_latent": best.latent, **_ends("best_auroc", best.auroc)}
    for name, area in detectors_of(result).items():
        row |= _ends(_key(name), area)
    stored = None if silenced is None else silenced.stored
    if stored is not None:
        row["gated"] = count = strongest_count(stored.points)
        for arm, key in (("target", "safety"), ("control", "safety_control")):
            left = stored_at(stored, arm, count)
            row |= {} if left is None else _ends(key, left.safety)
    gating = None if silenced is None else silenced.gating
    if gating is not None:
        row["silenced"] = count = strongest_count(gating.points)
        for arm, key in (("target", "change"), ("control", "change_control")):
            point = point_at(gating, arm, count) if count else None
            if point is not None and point.harmful.change is not None:
                row |= _ends(key, point.harmful.change)
    return row


def _key(name: str) -> str:
    return name.lower().replace(", ", "_").replace(" ", "_")


def _columns(key: str, heading: str, form: str) -> tuple[Column, ...]:
    """Return the columns of an interval: the estimate and its two ends."""
    return (
        Column(key, heading, form),
        Column(f"{key}_low", "from", form),
        Column(f"{key}_high", "to", form),
    )


def _ends(key: str, one: Interval) -> dict[str, float]:
    return {key: one.estimate, f"{key}_low": one.low, f"{key}_high": one.high}


def _spread(values: Float[np.ndarray, "values"]) -> dict[str, Any]:
    """Return the percentiles of some values, linear between neighbours; NaN is left out."""
    known = values[~np.isnan(values)].astype(np.float64)
    if len(known) == 0:
        return {"n": 0}
    return {
        "n": len(known),
        "mean": float(known.mean()),
        "zeros": float((known == 0).mean()),
        "min": float(known.min()),
        **{f"p{p}": float(np.percentile(known, p)) for p in PERCENTILES},
        "max": float(known.max()),
    }
