"""Examples, or their mean length, by source and category: a matrix with its numbers."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

from saefty.plots.base import (
    FAINT,
    HARMLESS,
    NEUTRAL,
    PLOTS,
    Canvas,
    say_nothing_to_draw,
    shortened,
)

SHOWN = 20
"""Rows and columns that are drawn; the rest are named in a line."""
LONGEST_NAME = 34
DARK = 0.68
"""From which shade on the numbers are white."""
SHADES = LinearSegmentedColormap.from_list("saefty_blue", ["#F4F8FB", HARMLESS])


@dataclass(frozen=True)
class DataMatrix:
    """What the picture shows.

    Attributes:
        title: One line.
        sources: The rows, the most important first.
        categories: The columns, the most important first.
        values: Of each source and category; NaN where there is none.
        meaning: What a value is, such as `examples` or `mean length in characters`.
        form: How values are written: whole, or with one decimal.
        scale: Shades by the value, or by its logarithm.
    """

    title: str
    sources: tuple[str, ...]
    categories: tuple[str, ...]
    values: Float[np.ndarray, "sources categories"]
    meaning: str
    form: Literal["whole", "decimal"] = "whole"
    scale: Literal["linear", "log"] = "log"

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every cell room."""
        rows, columns = (min(n, SHOWN) for n in self.values.shape)
        names = max(
            (len(shortened(name, LONGEST_NAME)) for name in self.sources[:SHOWN]), default=0
        )
        return max(6.0, 2.4 + 0.085 * names + 0.8 * columns), max(3.6, 2.9 + 0.36 * rows)


@PLOTS.register("data_matrix")
def draw(data: DataMatrix, figure: Canvas) -> None:
    """Draw the matrix; cells without examples stay grey."""
    ax = figure.add_subplot()
    values = data.values[:SHOWN, :SHOWN]
    known = values[np.isfinite(values) & (values > 0)]
    if not known.size:
        say_nothing_to_draw(ax, f"{data.title}: no example.")
        return
    norm = _norm(known, data.scale)
    masked = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
    ax.pcolormesh(masked, cmap=SHADES, norm=norm, edgecolors="white", linewidth=1.5)
    ax.set_facecolor(FAINT)
    _write(ax, values, norm, data.form)
    rows, columns = values.shape
    ax.set_xticks(
        np.arange(columns) + 0.5,
        [shortened(name, LONGEST_NAME) for name in data.categories[:SHOWN]],
    )
    ax.tick_params(axis="x", rotation=35)
    for label in ax.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    ax.set_yticks(
        np.arange(rows) + 0.5, [shortened(name, LONGEST_NAME) for name in data.sources[:SHOWN]]
    )
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_ylabel("source")
    left = zip((n - SHOWN for n in data.values.shape), ("sources", "categories"), strict=True)
    more = " and ".join(f"{n} more {what}" for n, what in left if n > 0)
    ax.set_xlabel("category" + (f" ({more} are not shown)" if more else ""))
    ax.set_title(f"{data.title}\n{data.meaning} by source and category (darker: more)")


def _norm(known: Float[np.ndarray, "cells"], scale: str) -> Normalize:
    low, high = float(known.min()), float(known.max())
    if scale == "log" and high > low:
        return LogNorm(min(low, high / 10), high)  # 7 beside 8 must not look like nothing
    return Normalize(0, high)


def _write(ax: Axes, values: Float[np.ndarray, "rows columns"], norm: Normalize, form: str) -> None:
    for (row, column), value in np.ndenumerate(values):
        has = bool(np.isfinite(value)) and value > 0
        text = "–" if not np.isfinite(value) else f"{value:,.0f}"
        if form == "decimal" and np.isfinite(value):
            text = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        dark = has and float(norm(value)) > DARK
        colour = "white" if dark else "#1A1A1A" if has else NEUTRAL
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8.5)
