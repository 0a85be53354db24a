"""An SAE as it is and after each repair, by how many latents fire and how much is unexplained.

A repair that mends the SAE moves it into the shaded region, left of the limit on L0 and below a
poor FVU. An SAE may lie there and still be sick: it may be much worse than its record, or misread.
A repair that only trades the one for the other moves it along a slope. Names stand in a column
beside the axes, so that none covers another.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from saefty.plots.base import FOUND, HARMFUL, HARMLESS, NEUTRAL, PLOTS, Canvas, say_nothing_to_draw

KINDS = {
    "as it is": (HARMFUL, "X", 90),
    "reading": (HARMLESS, "o", 42),
    "truncation": ("#CC79A7", "D", 42),
    "cause": (FOUND, "*", 170),
}
"""Colour, marker and size of each kind of point."""
COLUMN = 1.04
LINE = 0.082  # height of a name in the column, two lines
LETTERS = 36
WORSE = 10.0
"""How many times worse than the SAE as it is what is not shown is; it would squeeze the rest."""


@dataclass(frozen=True)
class RepairPoint:
    """One point of the picture.

    Attributes:
        name: What is written beside it; empty for points that are only shown.
        l0: Mean number of firing latents.
        fvu: Fraction of variance unexplained.
        kind: One of `KINDS`.
    """

    name: str
    l0: float
    fvu: float
    kind: str


@dataclass(frozen=True)
class RepairPlane:
    """What the picture shows.

    Attributes:
        points: The SAE as it is first, then the repairs.
        curve: (L0, FVU) of truncations, by L0.
        limit: L0 above which the code is dense.
        poor: FVU above which the reconstruction is poor.
        title: The heading.
        recorded: FVU that is recorded for the SAE.
    """

    points: tuple[RepairPoint, ...]
    curve: tuple[tuple[float, float], ...]
    limit: float
    poor: float
    title: str
    recorded: float | None = None


@PLOTS.register("repair_plane")
def draw(data: RepairPlane, figure: Canvas) -> None:
    """Draw L0 against FVU, both logarithmic, with what is neither dense nor poor shaded."""
    ax = figure.add_subplot()
    points = [one for one in data.points if _drawable(one.l0, one.fvu)]
    worst = WORSE * max([one.fvu for one in points if one.kind == "as it is"] + [data.poor])
    points = [one for one in points if one.fvu <= worst]
    if not points:
        say_nothing_to_draw(ax, "No latent fires, or FVU is not a number.")
        return
    curve = [pair for pair in data.curve if _drawable(*pair) and pair[1] <= worst]
    l0 = [*(one.l0 for one in points), *(pair[0] for pair in curve), data.limit]
    recorded = [data.recorded] if data.recorded else []
    fvu = [*(one.fvu for one in points), *(pair[1] for pair in curve), data.poor, *recorded]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(min(l0) / 1.4, max(l0) * 1.4)
    ax.set_ylim(min(fvu) / 1.5, max(fvu) * 1.5)
    left, bottom = ax.get_xlim()[0], ax.get_ylim()[0]
    ax.fill_between([left, data.limit], bottom, data.poor, color=FOUND, alpha=0.08, linewidth=0)
    ax.text(
        left * 1.05, bottom * 1.04, "neither dense nor poor", color=FOUND, ha="left", va="bottom",
        fontsize=9,
    )  # fmt: skip
    for value in recorded:
        ax.axhline(value, color=NEUTRAL, linewidth=1.0, linestyle="--")
        ax.text(
            left * 1.05, value * 1.02, "recorded FVU", color=NEUTRAL, ha="left",
            va="bottom", fontsize=8,
        )  # fmt: skip
    if curve:
        ax.plot(*zip(*curve, strict=True), color=KINDS["truncation"][0], linewidth=1.2, alpha=0.7)
    for one in reversed(points):
        colour, marker, size = KINDS[one.kind]
        faint = not one.name
        ax.scatter(
            one.l0, one.fvu, color=colour, marker=marker, s=size / (2.5 if faint else 1),
            alpha=0.35 if faint else 1.0, zorder=2 if faint else 3, linewidths=0,
        )  # fmt: skip
    _write_names(ax, [one for one in points if one.name])
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_formatter(_plainly)
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_minor_formatter(FuncFormatter(_plainly) if high < 100 * low else NullFormatter())
    ax.set_xlabel("L0: latents that fire on a token (log scale)")
    ax.set_ylabel("FVU: variance unexplained (log scale)")
    ax.set_title(data.title)


def _plainly(value: float, _: float = 0.0) -> str:
    return f"{value:g}"


def _drawable(l0: float, fvu: float) -> bool:
    return bool(np.isfinite([l0, fvu]).all()) and l0 > 0 and fvu > 0


def _write_names(ax: Axes, points: list[RepairPoint]) -> None:
    """Write names in a column right of the axes, in the order of height, a line to each point."""
    to_axes = ax.transScale + ax.transLimits
    heights = [float(to_axes.transform((one.l0, one.fvu))[1]) for one in points]
    order = np.argsort(heights)[::-1]
    places = spread([heights[i] for i in order], LINE)
    for i, place in zip(order, places, strict=True):
        one = points[i]
        colour = KINDS[one.kind][0]
        ax.annotate(
            wrapped(one.name),
            xy=(one.l0, one.fvu),
            xytext=(COLUMN, place),
            textcoords="axes fraction",
            ha="left",
            va="center",
            fontsize=8,
            color=colour if one.kind != "reading" else NEUTRAL,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.45,
                "linewidth": 0.8,
                "relpos": (0.0, 0.5),
                "shrinkA": 1.0,
            },
        )


def spread(heights: list[float], least: float) -> list[float]:
    """Return heights, given falling, moved as little as needed to lie `least` apart within 0 to 1.

    Args:
        heights: Where the names would stand, from 0 (bottom) to 1.
        least: The distance they need.
    """
    places: list[float] = []
    for height in heights:
        top = places[-1] - least if places else 1.0
        places.append(min(height, top))
    floor = 0.0
    for i in reversed(range(len(places))):
        places[i] = max(places[i], floor)
        floor = places[i] + least
    return places


def wrapped(name: str) -> str:
    """Return a name on at most two lines of `LETTERS` letters.

    Of a longer one the words before its last number are left out, so that the number stays.
    """
    words = name.split()
    numbers = [i for i, word in enumerate(words) if any(letter.isdigit() for letter in word)]
    end = max(numbers[-1] - 1, 1) if numbers else len(words)
    tail = words[end:]
    for kept in range(end, 0, -1):
        lines = _lines([*words[:kept], *(["…"] if kept < end else []), *tail])
        if len(lines) <= 2:
            return "\n".join(lines)
    lines = _lines(words)
    return f"{lines[0]}\n{lines[1][: LETTERS - 1]}…" if len(lines) > 1 else lines[0]


def _lines(words: list[str]) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 1 > LETTERS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
