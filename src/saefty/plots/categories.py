"""Each category against all other examples: a matrix of AUROC, categories by detectors."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap

from saefty.plots.base import (
    FAINT,
    HARMFUL,
    HARMLESS,
    PLOTS,
    Canvas,
    say_nothing_to_draw,
    shortened,
)

LONGEST_NAME = 34
SHADES = LinearSegmentedColormap.from_list("saefty_auroc", [HARMFUL, "#F7F7F7", HARMLESS])
DARK = 0.36
"""How far from ½ an AUROC has to be for its number to be white."""


@dataclass(frozen=True)
class Categories:
    """What the picture shows.

    Attributes:
        categories: The rows.
        families: The columns.
        auroc: Of each; NaN where it was not measured.
        examples: How many of each category were judged.
    """

    categories: tuple[str, ...]
    families: tuple[str, ...]
    auroc: Float[np.ndarray, "categories families"]
    examples: tuple[int, ...]

    @property
    def rows(self) -> list[str]:
        """What stands beside each row: the category, and how many examples it rests on."""
        pairs = zip(self.categories, self.examples, strict=True)
        return [f"{shortened(name, LONGEST_NAME)} (n = {n})" for name, n in pairs]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every cell room."""
        names = max(map(len, self.rows), default=0)
        width = 2.6 + 0.075 * names + 0.72 * max(len(self.families), 3)
        return width, 2.6 + 0.36 * len(self.categories)


@PLOTS.register("categories")
def draw(data: Categories, figure: Canvas) -> None:
    """Draw the matrix with its numbers; ½, which is chance, is white."""
    ax = figure.add_subplot()
    if not data.categories:
        say_nothing_to_draw(ax, "No category has enough examples.")
        return
    masked = np.ma.masked_invalid(data.auroc)
    mesh = ax.pcolormesh(masked, cmap=SHADES, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    ax.set_facecolor(FAINT)
    for (row, column), value in np.ndenumerate(data.auroc):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        colour = "white" if abs(value - 0.5) > DARK else "#1A1A1A"
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=9)
    rows, columns = data.auroc.shape
    ax.set_xticks(np.arange(columns) + 0.5, data.families)
    ax.tick_params(axis="x", rotation=35)
    for label in ax.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    ax.set_yticks(np.arange(rows) + 0.5, data.rows)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=ax, shrink=0.9, ticks=[0, 0.5, 1])
    bar.set_label("AUROC (½: chance)")
    bar.outline.set_visible(False)
    ax.set_ylabel("category (n: its test examples)")
    ax.set_xlabel("detector")
    ax.set_title("Each category against the rest")
