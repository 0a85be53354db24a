"""What the pictures share: the registry, the style, and the one way to a file.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; a colour means
the same in every picture, and no difference is told by colour alone. Each text is drawn in fonts
that hold its letters, of those that are installed.
"""

import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from saefty import fsio
from saefty.fonts import FIRST, MissingLetters, fit_figure, quiet
from saefty.metrics.intervals import Interval
from saefty.registry import Registry

Canvas: TypeAlias = Figure | SubFigure

PLOTS: Registry[Callable[[Any, Canvas], None]] = Registry("plot", "saefty.plots")
"""A plot is `draw(data, figure)`: it adds axes to an empty figure and writes no file."""

HARMFUL = "#D55E00"
HARMLESS = "#0072B2"
FOUND = "#009E73"
NEUTRAL = "#6B6B6B"
FAINT = "#D9D9D9"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B6B6B")

DARK = "#0E1117"
LIGHT = "#E6E6E6"
"""Background and writing of the dark pictures, in whose colours the ones above are too dim."""
DARK_SERIES = ("#56B4E9", "#E69F00", "#3ECFA0", "#E69CC6", "#F0E442", "#FF7A45", "#A8A8A8")

DPI = 160
SIZE = (7.2, 4.5)
LETTERS_AN_INCH = 9.8
"""Of a heading."""
MISSING = MissingLetters()
"""What was said of letters that no font holds, so that it is said once and not for each picture."""


def save_plot(
    name: str,
    data: Any,
    path: Path | str,
    *,
    size: tuple[float, float] = SIZE,
    dpi: int = DPI,
    tight: bool = False,
) -> Path:
    """Draw a registered plot and write it to a file, whose suffix chooses the format.

    Args:
        name: The plot's name in `PLOTS`.
        data: What it draws.
        path: The file, such as `plots/gate_curve.png`.
        size: Width and height in inches.
        dpi: Dots an inch.
        tight: Cut the empty border off.

    Returns:
        The path.
    """
    final, draw = Path(path), PLOTS[name]
    with mpl.rc_context({**style(), **getattr(draw, "style", {})}):
        figure = Figure(figsize=size, layout="constrained")
        draw(data, figure)
        MISSING.say(fit_figure(figure))
        # Without version and date two runs of the same data write the same bytes.
        metadata = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
        with fsio.staged(final) as temporary, quiet():
            figure.savefig(
                temporary,
                dpi=dpi,
                metadata=metadata.get(final.suffix),
                bbox_inches="tight" if tight else None,
            )
    return final


def dark(draw: Callable[[Any, Canvas], None]) -> Callable[[Any, Canvas], None]:
    """Mark a plot as one on a dark background."""
    draw.style = {  # type: ignore[attr-defined]  # read by `save_plot`
        "figure.facecolor": DARK,
        "savefig.facecolor": DARK,
        "axes.facecolor": DARK,
        "axes.edgecolor": "#8A8F98",
        "axes.labelcolor": LIGHT,
        "axes.titlecolor": LIGHT,
        "text.color": LIGHT,
        "xtick.color": LIGHT,
        "ytick.color": LIGHT,
        "grid.color": "#2A2F3A",
        "axes.prop_cycle": cycler(color=DARK_SERIES),
    }
    return draw


def style() -> dict[Any, Any]:
    """Return matplotlib's settings for every picture."""
    return {
        "font.family": [FIRST],
        "font.size": 10.0,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": NEUTRAL,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=SERIES),
        "grid.color": "#ECECEC",
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "xtick.color": "#404040",
        "ytick.color": "#404040",
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "axes.unicode_minus": True,
        "svg.hashsalt": "saefty",
    }


def draw_intervals(
    ax: Axes,
    places: np.ndarray,
    values: Sequence[Interval],
    colour: str,
    marker: str,
    line: str,
    label: str,
    scale: float = 1.0,
) -> None:
    """Draw a curve with a band of its intervals: filled marks where the line is solid, else hollow.

    Args:
        ax: Where to draw.
        places: Place of each value on the x axis; where there are more, the first ones.
        values: The intervals; without any nothing is drawn.
        colour: Of line, marks and band.
        marker: matplotlib's sign of a mark.
        line: matplotlib's sign of a line.
        label: In the legend.
        scale: What values are multiplied by, 100 for percent.
    """
    if not values:
        return
    places = places[: len(values)]
    middle, low, high = (
        scale * np.array([getattr(one, end) for one in values])
        for end in ("estimate", "low", "high")
    )
    solid = line == "-"
    ax.fill_between(places, low, high, color=colour, alpha=0.16 if solid else 0.07, linewidth=0)
    face = colour if solid else "white"
    ax.plot(
        places,
        middle,
        linestyle=line,
        marker=marker,
        color=colour,
        markerfacecolor=face,
        markersize=5.5,
        linewidth=1.9,
        label=label,
    )


def say_nothing_to_draw(ax: Axes, why: str) -> None:
    """Write on empty axes why there is nothing on them."""
    ax.set_axis_off()
    colour = LIGHT if mpl.rcParams["axes.facecolor"] == DARK else NEUTRAL
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color=colour)


def shortened(name: str, most: int) -> str:
    """Return a name with its end left out if it is longer than so many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def letters(text: str) -> int:
    """Return how many Latin letters a text is as wide as; an East Asian one is as wide as two."""
    return len(text) + sum(unicodedata.east_asian_width(one) in "WF" for one in text)


def heading(text: str, figure: Canvas, beside: int = 0) -> str:
    """Return the heading of a picture with one pair of axes, in lines that have room above them.

    Args:
        text: What to say.
        figure: Where.
        beside: Letters of the longest label that stands beside the axes.
    """
    room = LETTERS_AN_INCH * figure.get_figure(root=True).get_figwidth() - 5 - 0.65 * beside
    return textwrap.fill(text, max(20, int(room * len(text) / max(letters(text), 1))))
