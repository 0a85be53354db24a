"""Layers beside each other, and how scores and latents are spread: tables and pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saefty.baselines import Labelled
from saefty.harm_evaluation import LayerResult
from saefty.harm_tables import (
    SPOKEN_OF,
    detectors_of,
    layers_table,
    percentile_table,
    shown_layers,
    stored_at,
    strongest_count,
)
from saefty.metrics.intervals import Interval
from saefty.plots.base import save_plot
from saefty.plots.layers import Layers
from saefty.plots.pooled_latents import PooledLatents
from saefty.plots.score_histograms import ScoreHistograms
from saefty.report import Section, Table
from saefty.silencing_report import titled

SHOWN_SCORES = ("dfreq", "dmag", "auroc", "consensus")
SHOWN_LATENTS = 6
DRAWN = ("dense probe", "SAE latents", "5 latents", "2 latents", "1 latent", "bag of words")
"""The detectors that the picture of layers shows, those of them that there are."""
SCORES_SIZE = (8.2, 5.6)


def layer_tables(results: Sequence[LayerResult], data: Labelled) -> dict[str, Table]:
    """Return the tables of all layers and of the spread in each, by file name without suffix."""
    spread = {
        f"layer_{one.layer}_percentiles": percentile_table(one, data.harmful) for one in results
    }
    return {"layers": layers_table(results), **spread}


def layers_section(folder: Path, results: Sequence[LayerResult]) -> Section:
    """Return the section that compares the layers, with its picture."""
    picture = _picture(results)
    path = save_plot("layers", picture, folder / "figures" / "layers.png", size=picture.size)
    return Section(
        "Layers beside each other",
        "All columns and intervals are in `layers.csv`. The best latent of each layer was chosen "
        "on the selection half and its AUROC is of the report half, as are those of the detectors; "
        "so the layers can be compared with each other, but the best of many layers is flattered "
        "by having been picked: choose a layer here, and confirm it on other prompts. *No longer "
        f"caught* is what a probe misses with up to {SPOKEN_OF} latents taken out of the stored "
        "activations.",
        shown_layers(layers_table(results)),
        str(path.relative_to(folder)),
        "Held-out AUROC, what gating hides from a probe, and FVU, layer by layer.",
    )


def spread_sections(
    folder: Path, result: LayerResult, data: Labelled, prefix: str
) -> list[Section]:
    """Return the section on how scores and values are spread, with its two pictures."""
    evaluation = result.evaluation
    fires = np.flatnonzero(evaluation.scores["fires"] > 0)
    reported = {one.latent: one.found for one in evaluation.latents}
    shown = dict.fromkeys((*SHOWN_SCORES, evaluation.ranked_by))
    scores = save_plot(
        "score_histograms",
        ScoreHistograms(
            {name: evaluation.scores[name][fires] for name in shown},
            np.array([int(i) in reported for i in fires], dtype=bool),
            np.array([reported.get(int(i), False) for i in fires], dtype=bool),
        ),
        folder / "figures" / f"layer_{result.layer}_scores.png",
        size=SCORES_SIZE,
    )
    latents = tuple(one.latent for one in evaluation.latents[:SHOWN_LATENTS])
    values = result.pooled[np.flatnonzero(evaluation.report)][:, list(latents)].toarray()
    picture = PooledLatents(latents, values, data.harmful[evaluation.report])
    pooled = save_plot(
        "pooled_latents",
        picture,
        folder / "figures" / f"layer_{result.layer}_pooled.png",
        size=picture.size,
    )
    return [
        Section(
            titled(prefix, "how scores are spread"),
            f"Percentiles of every score and of every chosen latent are in "
            f"`layer_{result.layer}_percentiles.csv`.",
            figure=str(scores.relative_to(folder)),
            caption="Scores of all latents that fire, on the selection half; marks: chosen ones.",
        ),
        Section(
            titled(prefix, "the best latents on harmful and harmless examples"),
            figure=str(pooled.relative_to(folder)),
            caption="Pooled values on the examples of the report half on which the latent fires.",
        ),
    ]


def _picture(results: Sequence[LayerResult]) -> Layers:
    detectors = [detectors_of(one) for one in results]
    bests = (one.evaluation.best for one in results)
    auroc: dict[str, tuple[Interval | None, ...]] = {
        "best latent": tuple(None if one is None else one.auroc for one in bests)
    }
    for name in DRAWN:
        if any(name in one for one in detectors):
            auroc[name] = tuple(one.get(name) for one in detectors)
    return Layers(
        names=tuple(str(one.layer) for one in results),
        auroc=auroc,
        safety={
            name: tuple(_safety(one, arm) for one in results)
            for name, arm in (("chosen latents", "target"), ("equally active others", "control"))
        },
        count=SPOKEN_OF,
        fvu=tuple(one.fvu for one in results),
    )


def _safety(result: LayerResult, arm: str) -> Interval | None:
    stored = None if result.silenced is None else result.silenced.stored
    if stored is None:
        return None
    point = stored_at(stored, arm, strongest_count(stored.points))
    return None if point is None else point.safety
