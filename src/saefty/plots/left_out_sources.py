"""What a detector loses on a source that it did not learn from: one group of rows a source."""

from dataclasses import dataclass

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.base import NEUTRAL, PLOTS, SERIES, Canvas, say_nothing_to_draw, shortened

LONGEST_NAME = 26
MARKERS = "osD^vP"


@dataclass(frozen=True)
class LeftOutSources:
    """What the picture shows; None where a source has one label only.

    Attributes:
        sources: The rows.
        families: The detectors.
        left_out: For each family, AUROC on each source when it was left out of training.
        within: For each family, AUROC on each source's test examples when it was not.
    """

    sources: tuple[str, ...]
    families: tuple[str, ...]
    left_out: tuple[tuple[Interval | None, ...], ...]
    within: tuple[tuple[Interval | None, ...], ...]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every row room."""
        return 7.6, 2.3 + len(self.sources) * (0.3 + 0.2 * len(self.families))


@PLOTS.register("left_out_sources")
def draw(data: LeftOutSources, figure: Canvas) -> None:
    """Draw AUROC on each source, left out of training (filled) and not (hollow)."""
    ax = figure.add_subplot()
    if not any(one is not None for row in data.left_out for one in row):
        say_nothing_to_draw(ax, "No source has both labels: nothing to draw.")
        return
    spread = np.linspace(-0.3, 0.3, len(data.families)) if len(data.families) > 1 else [0.0]
    lowest = 0.5
    for i, family in enumerate(data.families):
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        label: str | None = family
        for place, (out, within) in enumerate(zip(data.left_out[i], data.within[i], strict=True)):
            if out is None:
                continue
            y = place + float(spread[i])
            lowest = float(np.nanmin([lowest, out.low, out.estimate]))
            ax.hlines(y, out.low, out.high, color=colour, linewidth=2.0, alpha=0.5)
            if within is not None:
                # Larger, so that it is seen round a filled one at the same place.
                ax.plot(within.estimate, y, marker, color=colour, mfc="white", markersize=9)
                lowest = min(lowest, within.estimate)
            ax.plot(out.estimate, y, marker, color=colour, markersize=5, label=label)
            label = None
    names = [shortened(name, LONGEST_NAME) for name in data.sources]
    for place, source in enumerate(names):
        if all(row[place] is None for row in data.left_out):
            ax.text(0.75, place, f"{source}: one label", va="center", ha="center",
                    color=NEUTRAL, fontsize=8.5)  # fmt: skip
    ax.axvline(0.5, color=NEUTRAL, linestyle="--", linewidth=1)
    ax.set_xlim(lowest - 0.03, 1.015)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(data.sources) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    for edge in range(1, len(data.sources)):
        ax.axhline(edge - 0.5, color="#ECECEC", linewidth=1)
    ax.set_ylabel("source")
    ax.set_xlabel(
        "AUROC with 95 % interval\n(filled: left out of training; hollow: not left out, test side)",
        fontsize=9,
    )
    ax.set_title("Sources left out of training")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
