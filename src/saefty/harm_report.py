"""The report of an evaluation: what was found, how sure it is, and what does not follow from it.

The evidence stands in the order of its strength: first what silencing the latents does to
behaviour, then what else could tell the labels, then how well single latents tell them, beside
controls.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.baselines import Labelled
from saefty.errors import InputError
from saefty.gating import GatePoint
from saefty.harm_evaluation import GateResult, LayerResult
from saefty.harm_tables import LATENT_COLUMNS, gate_table, latent_table, probe_table
from saefty.judges.coverage import require_coverage
from saefty.metrics.intervals import Interval
from saefty.plots.base import save_plot
from saefty.plots.gate_curve import GateCurve
from saefty.plots.latent_ranking import LatentRanking
from saefty.plots.loss_curve import TrainingCurve
from saefty.report import Section, Table, plain, write_report

log = logging.getLogger(__name__)

LISTED_LATENTS = 10
TRAIN_LOG = "train_log.jsonl"
TALL = (7.2, 5.6)


def write_harm_report(
    folder: Path, results: Sequence[LayerResult], data: Labelled, pooling: str
) -> dict[str, Any]:
    """Write summary.md, summary.json, a CSV a layer and the pictures.

    Args:
        folder: The run's folder.
        results: What was found, layer by layer.
        data: The labelled examples.
        pooling: How latents were pooled over an example's tokens.

    Returns:
        The figures of summary.json, as JSON values.
    """
    figures = {
        "examples": len(data.harmful),
        "harmful": int(data.harmful.sum()),
        "pooling": pooling,
        "layers": {str(result.layer): _figures(result) for result in results},
    }
    sections: list[Section] = []
    for result in results:
        sections += _sections(folder, result, several=len(results) > 1)
    sections.append(Section("How it was measured", _method(results, data, pooling)))
    tables = {f"layer_{result.layer}": latent_table(result) for result in results}
    for result in results:
        if result.gating is not None:
            tables[f"intervention/layer_{result.layer}"] = gate_table(result.gating)
    lead = "\n\n".join(_lead(result) for result in results)
    write_report(
        folder,
        title="Which latents track harm",
        lead=lead,
        sections=sections,
        figures=figures,
        tables=tables,
    )
    values = plain(figures)
    assert isinstance(values, dict)
    return values


def point_at(gating: GateResult, arm: str, count: int) -> GatePoint | None:
    """Return the condition of one arm that silences so many latents; 0 is the ungated one."""
    for point in gating.points:
        if point.count == count and (count == 0 or point.condition.arm == arm):
            return point
    return None


def strongest_count(gating: GateResult) -> int:
    """Return the number of silenced latents that is read out in words: 8, or the nearest below."""
    counts = {point.count for point in gating.points if point.condition.arm == "target"}
    return max((count for count in counts if count <= 8), default=0)


def _lead(result: LayerResult) -> str:
    evaluation, gating = result.evaluation, result.gating
    found = [one for one in evaluation.latents if one.found]
    best = evaluation.best
    words = [f"**Layer {result.layer}** (`{result.site}`)."]
    if found and best is not None:
        words.append(
            f"{len(found)} of the {len(evaluation.latents)} latents that were chosen on one half "
            f"of the prompts track harm on the other half beyond luck; the best, latent "
            f"{best.latent}, tells harmful from harmless there with AUROC {best.auroc}."
        )
    else:
        words.append(
            "**No latent tracks harm beyond luck**: none passed all three tests (false-discovery "
            "rate and maximum over all latents on one half, Holm on the other)."
        )
    if gating is not None:
        words.append(_causal_sentence(gating))
    if best is not None and result.controls:
        words.append(_beside_controls(best.auroc, result.controls))
    words.append(
        "What does not follow: that these latents mean harm to a person, that they act alone, or "
        "that other prompts, models or layers behave alike."
    )
    if result.leaks:
        names = ", ".join(leak.name.replace("_", " ") for leak in result.leaks)
        words.append(f"**The labels can be told by shortcuts** ({names}); see the warnings below.")
    return " ".join(words)


def _beside_controls(best: Interval, controls: Mapping[str, Interval]) -> str:
    """Say how far the best latent stands out from the best a control reaches."""
    name, control = max(controls.items(), key=lambda item: item[1].estimate)
    if best.low > control.high:
        return f"The best control ({name}) reaches {control}, clearly less."
    return (
        f"The AUROC alone is weak evidence: the best control ({name}), found by the same "
        f"procedure, reaches {control}."
    )


def _first(count: int) -> str:
    return "the first of them" if count == 1 else f"the first {count} of them"


def _causal_sentence(gating: GateResult) -> str:
    count = strongest_count(gating)
    target, control = (point_at(gating, arm, count) for arm in ("target", "control"))
    base = point_at(gating, "target", 0)
    if target is None or base is None or not count:
        return "No latent leans towards harm, so nothing was silenced."
    change, on_harmless = target.harmful.change, target.harmless.change
    assert change is not None  # only the ungated replies have nothing to be compared with
    assert on_harmless is not None
    sentence = (
        f"Silencing {_first(count)} changes {gating.behaviour} of harmful prompts from "
        f"{_percent(base.harmful.rate.estimate)} by {_points(change)}"
    )
    other = control.harmful.change if control is not None else None
    if other is not None:
        sentence += (
            f"; silencing {count} equally active other latents changes it by {_points(other)}"
        )
    sentence += (
        f". On harmless prompts {gating.behaviour} changes by {_points(on_harmless)} "
        f"(from {_percent(base.harmless.rate.estimate)})"
    )
    fluency = target.harmful.fluency
    sentence += f"; fluency is {fluency.estimate:.2f} [{fluency.low:.2f}, {fluency.high:.2f}]."
    clear = change.high < 0 or change.low > 0
    if clear and other is not None:
        apart = change.high < other.low or change.low > other.high
        sentence += (
            " The intervals are apart: these latents carry the behaviour here."
            if apart
            else " The intervals overlap with the control's: the effect is not specific to them."
        )
    elif not clear:
        sentence += " The interval holds 0: no effect was shown."
    return sentence


def _sections(folder: Path, result: LayerResult, *, several: bool) -> list[Section]:
    prefix = f"Layer {result.layer}: " if several else ""
    found: list[Section] = []
    if result.gating is not None:
        found.append(_gate_section(folder, result, result.gating, prefix))
    found.append(
        Section(
            _title(prefix, "what else could tell the labels"),
            "Every detector learnt on the half that chose the latents and is judged on the other.",
            probe_table(result),
        )
    )
    found += _latent_sections(folder, result, prefix)
    if result.leaks:
        lines = "\n".join(f"- **{leak.name}**: {leak.message}" for leak in result.leaks)
        found.append(Section(_title(prefix, "warnings"), lines))
    return found


def _gate_section(folder: Path, result: LayerResult, gating: GateResult, prefix: str) -> Section:
    title = _title(prefix, "what silencing latents does")
    text = (
        "Replies of the model with latents silenced in its forward pass, to prompts of the half "
        "that had no part in choosing them. `target` are the chosen latents, `control` equally "
        "active ones that do not track harm; a change is paired with the ungated reply."
    )
    sparse = _too_few_scores(gating)
    if sparse:
        log.warning("layer %d: %s", result.layer, sparse)
        return Section(title, f"{text}\n\n**No picture:** {sparse}", gate_table(gating))
    path = save_plot(
        "gate_curve",
        _curve(gating),
        folder / "figures" / f"layer_{result.layer}_gate_curve.png",
        size=TALL,
    )
    return Section(
        title,
        text,
        gate_table(gating),
        str(path.relative_to(folder)),
        f"{gating.behaviour.capitalize()} and fluency against the number of silenced latents.",
    )


def _latent_sections(folder: Path, result: LayerResult, prefix: str) -> list[Section]:
    ranking = save_plot(
        "latent_ranking",
        LatentRanking.of(result.evaluation, result.controls, top=LISTED_LATENTS),
        folder / "figures" / f"layer_{result.layer}_latents.png",
        size=TALL,
    )
    firing = save_plot(
        "firing_rate", result.firing, folder / "figures" / f"layer_{result.layer}_firing.png"
    )
    shown = latent_table(result)
    columns = tuple(c for c in shown.columns if c.key in LATENT_COLUMNS)
    rows = tuple(row for row in shown.rows if row.get("reported"))[:LISTED_LATENTS]
    found = [
        Section(
            _title(prefix, "latents"),
            f"Ranked by {result.evaluation.ranked_by} on the selection half; AUROC and dfreq are "
            f"of the report half. All latents are in `layer_{result.layer}.csv`.",
            Table(columns, rows),
            str(ranking.relative_to(folder)),
            "Held-out AUROC of the chosen latents, beside the best latent of each control.",
        ),
        Section(
            _title(prefix, "activity"),
            f"Mean L0 {result.firing.mean_l0:.1f}; "
            f"{_percent(result.firing.dead_share)} of the latents fire on no token here, "
            f"{_percent(result.firing.always_on_share)} on at least 99 % of them.",
            figure=str(firing.relative_to(folder)),
            caption="How many latents fire how often.",
        ),
    ]
    log = Path(result.sae_folder or "") / TRAIN_LOG
    if result.sae_folder and log.is_file():
        curve = {f"layer {result.layer}": TrainingCurve.of(fsio.read_lines(log))}
        name = folder / "figures" / f"layer_{result.layer}_training.png"
        path = save_plot("loss_curve", curve, name)
        found.append(
            Section(
                _title(prefix, "training of the SAE"),
                figure=str(path.relative_to(folder)),
                caption="Variance unexplained against training step.",
            )
        )
    return found


def _too_few_scores(gating: GateResult) -> str:
    """Return why the curve is not drawn, or nothing."""
    for point in gating.points:
        for label in ("harmful", "harmless"):
            group = getattr(point, label)
            for what, found in (
                (gating.behaviour, group.coverage),
                ("fluency", group.fluency_coverage),
            ):
                try:
                    where = f"the curve ({what} on {label} prompts, {point.count} latents silenced)"
                    require_coverage(found.judged, found.total, what=where)
                except InputError as error:
                    return error.message
    return ""


def _curve(gating: GateResult) -> GateCurve:
    counts = [0, *sorted({point.count for point in gating.points if point.count})]

    def series(arm: str, label: str, what: str) -> tuple[Interval, ...]:
        points = [point_at(gating, arm, count) for count in counts]
        return tuple(getattr(getattr(p, label), what) for p in points if p is not None)

    return GateCurve(
        counts=tuple(counts),
        target_harmful=series("target", "harmful", "rate"),
        target_harmless=series("target", "harmless", "rate"),
        control_harmful=series("control", "harmful", "rate"),
        control_harmless=series("control", "harmless", "rate"),
        target_fluency=series("target", "harmful", "fluency"),
        control_fluency=series("control", "harmful", "fluency"),
        behaviour=gating.behaviour,
    )


def _method(results: Sequence[LayerResult], data: Labelled, pooling: str) -> str:
    counts = results[0].evaluation.counts
    grouped = (
        "whole prompt groups are kept together"
        if data.clusters is not None
        else "every example stands alone (set data.group to keep variants of a prompt together)"
    )
    return (
        f"{counts['examples']} labelled examples, {counts['harmful']} of them harmful, were split "
        f"into a selection half ({counts['selection_examples']}) and a report half "
        f"({counts['report_examples']}); {grouped}. An example's latents are the {pooling} over "
        f"its tokens. On the selection half every latent was tested by a two-sided Mann–Whitney "
        f"test (q: Benjamini–Hochberg over all firing latents) and against the best latent under "
        f"permuted labels (p, maximum); on the report half the chosen ones were tested again "
        f"({results[0].evaluation.test}), corrected by Holm. A finding passes all three at 0.05. "
        "Intervals are 95 %."
    )


def _figures(result: LayerResult) -> Mapping[str, Any]:
    evaluation = result.evaluation
    gating = result.gating
    return {
        "site": result.site,
        "finding": evaluation.finding,
        "counts": evaluation.counts,
        "test": evaluation.test,
        "latents": evaluation.latents,
        "probes": {
            probe.name: {
                "auroc": probe.auroc,
                "average_precision": probe.average_precision,
                "recall_at_1pct_fpr": probe.recall_at_1pct_fpr,
                "converged": probe.converged,
            }
            for probe in result.probes
        },
        "controls": dict(result.controls),
        "leaks": result.leaks,
        "l0_mean": result.firing.mean_l0,
        "gating": None
        if gating is None
        else {
            "behaviour": gating.behaviour,
            "fluency": gating.fluency,
            "targets": gating.targets,
            "controls": gating.controls,
            "points": gating.points,
        },
    }


def _title(prefix: str, title: str) -> str:
    return prefix + title if prefix else title[0].upper() + title[1:]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(change: Interval) -> str:
    """Return a change of a share in percentage points, with its interval."""
    ends = (change.estimate, change.low, change.high)
    middle, low, high = (f"{100 * end:+.0f}".replace("-", "−") for end in ends)
    return f"{middle} points [{low}, {high}]"
