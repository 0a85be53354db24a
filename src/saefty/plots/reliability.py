"""Do probabilities mean what they say: predicted against observed, one panel a detector.

Dots on the diagonal mean what they say. A bin holds as many examples as the others, equal
probabilities never parted; a dot's area is the number of its examples.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from matplotlib.axes import Axes

from saefty.metrics.calibration import Calibration
from saefty.plots.base import HARMLESS, NEUTRAL, PLOTS, Canvas, say_nothing_to_draw

COLUMNS = 3


@dataclass(frozen=True)
class Reliability:
    """What the picture shows.

    Attributes:
        names: The detectors, one panel each.
        measured: The calibration of each.
    """

    names: tuple[str, ...]
    measured: tuple[Calibration, ...]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every panel room."""
        columns = min(COLUMNS, max(len(self.names), 1))
        return 1.0 + 2.7 * columns, 1.0 + 2.75 * max(1, ceil(len(self.names) / COLUMNS))


@PLOTS.register("reliability")
def draw(data: Reliability, figure: Canvas) -> None:
    """Draw one panel a detector."""
    if not data.names:
        say_nothing_to_draw(figure.add_subplot(), "No detector was fitted.")
        return
    columns = min(COLUMNS, len(data.names))
    rows = ceil(len(data.names) / columns)
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for ax, name, measured in zip(axes, data.names, data.measured, strict=False):
        _panel(ax, name, measured)
    for i, ax in enumerate(axes):
        if i >= len(data.names):
            ax.set_axis_off()
            continue
        ax.set_xlabel("predicted probability")
        ax.set_ylabel("observed share harmful")
        ax.tick_params(labelbottom=True, labelleft=True)
        ax.xaxis.label.set_visible(i + columns >= len(data.names))
        ax.yaxis.label.set_visible(i % columns == 0)


def _panel(ax: Axes, name: str, measured: Calibration) -> None:
    predicted = np.array([one.predicted for one in measured.bins])
    observed = np.array([one.observed for one in measured.bins])
    counts = np.array([one.examples for one in measured.bins])
    ax.plot([0, 1], [0, 1], "--", color=NEUTRAL, linewidth=1)
    ax.plot(predicted, observed, "-", color=HARMLESS, linewidth=1.2, alpha=0.6)
    ax.scatter(predicted, observed, s=110 * counts / counts.max(), color=HARMLESS, zorder=3)
    least, most = int(counts.min()), int(counts.max())
    each = f"{least}" if least == most else f"{least}–{most}"
    bins = "1 bin" if len(counts) == 1 else f"{len(counts)} bins"
    ax.text(0.97, 0.03, f"{bins} of {each}", transform=ax.transAxes, ha="right", fontsize=8)
    ax.set_title(f"{name}\nECE {measured.ece:.3f} (luck {measured.ece_by_luck:.3f})", fontsize=9)
    ax.set_xlim(-0.05, 1.05)
    ax.set_ylim(-0.05, 1.05)
    ax.set_aspect("equal")
    ax.set_xticks([0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1])
