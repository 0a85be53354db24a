"""What tells harmful from harmless: either half of an input alone, the whole, and the contrast.

Bars start at the chance line, so what tells nothing has no bar. Beside them stand four examples,
one for each way of putting the two halves together.
"""

from dataclasses import dataclass
from typing import Literal
from unicodedata import east_asian_width

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes

from saefty.metrics.intervals import Interval
from saefty.plots.base import (
    FOUND,
    HARMFUL,
    HARMLESS,
    NEUTRAL,
    PLOTS,
    Canvas,
    say_nothing_to_draw,
    shortened,
)

Kind = Literal["alone", "off", "on", "delta", "latents"]

COLOURS: dict[Kind, str] = {
    "alone": NEUTRAL,
    "off": NEUTRAL,
    "on": HARMLESS,
    "delta": HARMFUL,
    "latents": FOUND,
}
CHANCE = 0.5
LOWEST = 0.4
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind words on the chance line
HEADING = 0.85  # of a row's height: the room a group's heading takes
MOST_LETTERS, MOST_OF_A_CELL = 34, 10


@dataclass(frozen=True)
class Bar:
    """How well one input tells the labels."""

    kind: Kind
    """What it is: its colour."""
    group: str
    """The heading it stands under; bars of one group follow each other."""
    name: str
    auroc: Interval


@dataclass(frozen=True)
class Cell:
    """An example: a picture, the words beside it, and what is said of both together."""

    image: UInt8[np.ndarray, "height width 3"]
    words: str
    harmful: bool


@dataclass(frozen=True)
class ContrastBars:
    """What the picture shows."""

    title: str
    bars: tuple[Bar, ...]
    cells: tuple[Cell, ...] = ()
    """Up to four, in rows of two."""
    tested: int = 0
    """Examples the detectors were judged on."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every row room."""
        groups = len({bar.group for bar in self.bars})
        height = 1.5 + 0.3 * (len(self.bars) + HEADING * groups)
        return 7.4 + 3.0 * bool(self.cells), max(height, 3.4)


@PLOTS.register("contrast_bars")
def draw(data: ContrastBars, figure: Canvas) -> None:
    """Draw the bars, and the examples on their left."""
    if not data.bars:
        say_nothing_to_draw(figure.add_subplot(), "Nothing was measured.")
        return
    if not data.cells:
        _draw_bars(figure.add_subplot(), data)
        return
    # The examples stand together in the middle of their column, beside the bars.
    grid = figure.add_gridspec(4, 3, width_ratios=(1, 1, 4.4))
    for place, cell in enumerate(data.cells[:4]):
        _draw_cell(figure.add_subplot(grid[1 + place // 2, place % 2]), cell)
    _draw_bars(figure.add_subplot(grid[:, 2]), data)


def _draw_cell(ax: Axes, cell: Cell) -> None:
    ax.set_axis_off()
    ax.imshow(cell.image, interpolation="nearest")
    ax.set_title(
        f"“{_fitting(cell.words, MOST_OF_A_CELL)}”", fontsize=8, fontweight="normal", loc="center"
    )
    said, colour = ("harmful", HARMFUL) if cell.harmful else ("harmless", HARMLESS)
    ax.text(
        0.5, -0.06, said, color=colour, fontsize=9, fontweight="bold", ha="center", va="top",
        transform=ax.transAxes,
    )  # fmt: skip


def _draw_bars(ax: Axes, data: ContrastBars) -> None:
    place, places, group = 0.0, [], None
    for bar in data.bars:
        if bar.group != group:
            group = bar.group
            heading = place + (HEADING - 1) / 2
            ax.text(
                0.008, heading, group, fontsize=9, fontweight="bold", va="center", ha="left",
                transform=ax.get_yaxis_transform(), bbox=PAPER,
            )  # fmt: skip
            place += HEADING
        _draw_bar(ax, place, bar)
        places.append(place)
        place += 1.0
    ax.axvline(CHANCE, color="black", linestyle="--", linewidth=1)
    lows = [bar.auroc.low for bar in data.bars if np.isfinite(bar.auroc.low)]
    ax.set_xlim(max(0.0, min([LOWEST, *(low - 0.02 for low in lows)])), 1.09)
    ax.set_ylim(place - 0.4, -0.6)
    ax.set_xticks(np.arange(np.ceil(ax.get_xlim()[0] * 10), 11) / 10)
    ax.set_yticks(places, [_fitting(bar.name, MOST_LETTERS) for bar in data.bars])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_ylabel("what a linear probe reads")
    ax.set_xlabel(f"AUROC on {data.tested} held-out examples, 95 % interval", loc="right")
    ax.set_title(data.title)


def _fitting(name: str, most: int) -> str:
    """Return a name cut to a width; letters of East Asian scripts are twice as wide as others."""
    width = sum(2 if east_asian_width(letter) in "WF" else 1 for letter in name)
    return shortened(name, most * len(name) // max(width, most))


def _draw_bar(ax: Axes, place: float, bar: Bar) -> None:
    value, colour = bar.auroc, COLOURS[bar.kind]
    ax.barh(place, value.estimate - CHANCE, left=CHANCE, height=0.62, color=colour, alpha=0.85)
    ax.hlines(place, value.low, value.high, color="black", linewidth=1.4)
    ax.text(1.02, place, f"{value.estimate:.3f}", fontsize=8.5, va="center", ha="left")
