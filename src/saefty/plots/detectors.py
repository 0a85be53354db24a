"""Detectors side by side: the AUROC of each with its interval, the best on top."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from saefty.metrics.intervals import Interval
from saefty.plots.base import HARMLESS, NEUTRAL, PLOTS, SERIES, Canvas, say_nothing_to_draw

LOWEST = 0.45
OFFSET = 0.17


@dataclass(frozen=True)
class Detectors:
    """What the picture shows.

    Attributes:
        names: The detectors, the best first.
        auroc: Of each, trained on all examples.
        balanced: Of each, trained on a balanced subset; None where there is none.
        told_apart: Which of them are worse than the best beyond luck.
        tested: Examples they were judged on.
    """

    names: tuple[str, ...]
    auroc: tuple[Interval, ...]
    balanced: tuple[Interval, ...] | None
    told_apart: tuple[bool, ...]
    tested: int

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every row room."""
        return 7.6, 1.9 + 0.36 * len(self.names)


@PLOTS.register("detectors")
def draw(data: Detectors, figure: Canvas) -> None:
    """Draw one row a detector, with the interval of its AUROC."""
    ax = figure.add_subplot()
    if not data.names:
        say_nothing_to_draw(ax, "No detector was fitted.")
        return
    places = np.arange(len(data.names), dtype=float)
    shift = OFFSET if data.balanced is not None else 0.0
    _row(ax, places - shift, data.auroc, HARMLESS, "o", filled=True, label="trained on all")
    if data.balanced is not None:
        _row(
            ax, places + shift, data.balanced, SERIES[1], "s", filled=False,
            label="trained on a balanced subset",
        )  # fmt: skip
    ax.axvline(0.5, color=NEUTRAL, linestyle="--", linewidth=1)
    ends = [one.low for one in (*data.auroc, *(data.balanced or ())) if np.isfinite(one.low)]
    ax.set_xlim(max(0.0, min([LOWEST, *ends]) - 0.02), 1.015)
    names = [
        f"{name} *" if worse else name
        for name, worse in zip(data.names, data.told_apart, strict=True)
    ]
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_ylabel("detector")
    starred = "; *: worse than the first (Holm)" if any(data.told_apart) else ""
    ax.set_xlabel(f"AUROC on {data.tested} test examples, with 95 % interval{starred}", fontsize=9)
    ax.set_title("Detectors of harm on different inputs")
    if data.balanced is not None:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _row(
    ax: Axes,
    places: np.ndarray,
    values: Sequence[Interval],
    colour: str,
    marker: str,
    *,
    filled: bool,
    label: str,
) -> None:
    middle, low, high = (
        np.array([getattr(one, end) for one in values]) for end in ("estimate", "low", "high")
    )
    ax.hlines(places, low, high, color=colour, linewidth=2.2, alpha=0.55)
    face = colour if filled else "white"
    ax.plot(middle, places, marker, color=colour, markerfacecolor=face, markersize=6.5, label=label)
