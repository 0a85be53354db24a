"""How the scores of latents are spread: where the chosen ones lie among all that fire."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from saefty.plots.base import FAINT, FOUND, NEUTRAL, PLOTS, Canvas, say_nothing_to_draw

BINS = 40
COLUMNS = 2
MARKED = 0.05
"""Height of the marks of chosen latents, of the axes'."""


@dataclass(frozen=True)
class ScoreHistograms:
    """What the picture shows.

    Attributes:
        scores: For each score its values on the latents that fire.
        chosen: Which of these latents are reported.
        found: Which of them are findings.
    """

    scores: Mapping[str, Float[np.ndarray, "firing"]]
    chosen: Bool[np.ndarray, "firing"]
    found: Bool[np.ndarray, "firing"]


@PLOTS.register("score_histograms")
def draw(data: ScoreHistograms, figure: Canvas) -> None:
    """Draw one histogram a score, with a mark for each chosen latent below."""
    if not data.scores or len(data.chosen) == 0:
        say_nothing_to_draw(figure.add_subplot(), "No latent fires.")
        return
    columns = min(COLUMNS, len(data.scores))
    rows = -(-len(data.scores) // columns)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (name, values) in zip(axes, data.scores.items(), strict=False):
        finite = values[np.isfinite(values)]
        if len(finite) == 0:
            say_nothing_to_draw(ax, f"{name}: no latent has a value.")
            continue
        ax.hist(finite, bins=_edges(finite), color=FAINT, edgecolor=NEUTRAL, linewidth=0.4)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(bottom=0)
        rest = data.chosen & ~data.found
        for mask, colour, label in (
            (rest, NEUTRAL, "chosen"),
            (data.found, FOUND, "finding"),
        ):
            if mask.any():
                ax.plot(
                    values[mask], np.full(int(mask.sum()), MARKED), "|", color=colour,
                    markersize=13, markeredgewidth=1.8, transform=ax.get_xaxis_transform(),
                    label=label, clip_on=False,
                )  # fmt: skip
        ax.set_xlabel(name)
        ax.set_ylabel("latents (log scale)")
    for ax in axes[len(data.scores) :]:
        ax.set_axis_off()
    figure.suptitle(
        f"Scores of {len(data.chosen):,} firing latent{'s'[: len(data.chosen) - 1]} on the "
        f"selection half; {int(data.chosen.sum())} chosen, {int(data.found.sum())} findings",
        fontsize=11.5,
        fontweight="bold",
    )
    entries = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=len(entries)
        )


def _edges(values: Float[np.ndarray, "values"]) -> list[float]:
    low, high = float(values.min()), float(values.max())
    room = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-9)
    return np.linspace(low - 1e-3 * room, low + room * 1.001, BINS + 1).tolist()
