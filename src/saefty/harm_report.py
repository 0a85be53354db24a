"""The report of an evaluation: what was found, how sure it is, and what does not follow from it.

The evidence stands in the order of its strength: first what silencing the latents does to
behaviour, then what else could tell the labels, then how well single latents tell them, beside
controls.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.baselines import Labelled
from saefty.harm_evaluation import LayerResult
from saefty.harm_tables import LATENT_COLUMNS, latent_table, probe_table
from saefty.layers_report import layer_tables, layers_section, spread_sections
from saefty.metrics.intervals import Interval
from saefty.plots.base import save_plot
from saefty.plots.latent_ranking import LatentRanking
from saefty.plots.loss_curve import TrainingCurve
from saefty.report import Section, Table, plain, write_report
from saefty.silencing_report import (
    percent,
    silenced_figures,
    silenced_sections,
    silenced_sentences,
    silenced_tables,
    titled,
)

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
    if len(results) > 1:
        sections.append(layers_section(folder, results))
    for result in results:
        sections += _sections(folder, result, data, several=len(results) > 1)
    sections.append(Section("How it was measured", _method(results, data, pooling)))
    tables = {f"layer_{result.layer}": latent_table(result) for result in results}
    tables |= layer_tables(results, data)
    for result in results:
        tables |= silenced_tables(result)
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


def _lead(result: LayerResult) -> str:
    evaluation = result.evaluation
    found = [one for one in evaluation.latents if one.found]
    best = evaluation.best
    words = [f"**{_named(result)}** (`{result.site}`)."]
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
    if result.silenced is not None:
        words += silenced_sentences(result.silenced)
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


def _named(result: LayerResult) -> str:
    """Return what an SAE is called: its layer, and its name where it is not the layer's first."""
    if isinstance(result.layer, int):
        return f"Layer {result.layer}"
    layer, _, name = result.layer.partition("__")
    return f"Layer {layer}, SAE {name}"


def _sections(folder: Path, result: LayerResult, data: Labelled, *, several: bool) -> list[Section]:
    prefix = f"{_named(result)}: " if several else ""
    found = silenced_sections(folder, result, prefix)
    found.append(
        Section(
            titled(prefix, "what else could tell the labels"),
            "Every detector learnt on the half that chose the latents and is judged on the other.",
            probe_table(result),
        )
    )
    found += _latent_sections(folder, result, prefix)
    found += spread_sections(folder, result, data, prefix)
    if result.leaks:
        lines = "\n".join(f"- **{leak.name}**: {leak.message}" for leak in result.leaks)
        found.append(Section(titled(prefix, "warnings"), lines))
    return found


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
            titled(prefix, "latents"),
            f"Ranked by {result.evaluation.ranked_by} on the selection half; AUROC and dfreq are "
            f"of the report half. All latents are in `layer_{result.layer}.csv`.",
            Table(columns, rows),
            str(ranking.relative_to(folder)),
            "Held-out AUROC of the chosen latents, beside the best latent of each control.",
        ),
        Section(
            titled(prefix, "activity"),
            f"Mean L0 {result.firing.mean_l0:.1f}; "
            f"{percent(result.firing.dead_share)} of the latents fire on no token here, "
            f"{percent(result.firing.always_on_share)} on at least 99 % of them.",
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
                titled(prefix, "training of the SAE"),
                figure=str(path.relative_to(folder)),
                caption="Variance unexplained against training step.",
            )
        )
    return found


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
        "fvu": result.fvu,
        **silenced_figures(result.silenced),
    }
