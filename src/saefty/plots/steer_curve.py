"""A score of steered replies against alpha: the mean on the scale from 1 to 10, with its interval.

What the model does unsteered is a line across, so that one sees what steering adds; named alphas
are marked. A point of whose replies too few could be scored is hollow, one without any is a gap.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from saefty.metrics.intervals import Interval
from saefty.plots.base import FOUND, HARMLESS, NEUTRAL, PLOTS, Canvas, heading, say_nothing_to_draw

LOWEST, HIGHEST = 1.0, 10.0
SAME = 0.05
"""Scores nearer than this read the same in a heading."""


@dataclass(frozen=True)
class SteerCurve:
    """What the picture shows.

    Attributes:
        alphas: The strengths, ascending; 0 is among them.
        scores: The mean score at each, on the scale from 1 to 10; NaN where none could be scored.
        what: The score's name, for the axis.
        method: How the vector was added, in words.
        unit: What alpha counts, in words.
        marked: Alphas to mark.
        thin: Alphas of whose replies too few have a score.
        replies: Replies at each alpha; 0 does not tell.
        beside: The name of the other score, which the heading tells at the same alpha.
        others: The other score at each alpha, on the same scale.
    """

    alphas: tuple[float, ...]
    scores: tuple[Interval, ...]
    what: str
    method: str
    unit: str = ""
    marked: tuple[float, ...] = ()
    thin: tuple[float, ...] = ()
    replies: int = 0
    beside: str = ""
    others: tuple[float, ...] = ()


@PLOTS.register("steer_curve")
def draw(data: SteerCurve, figure: Canvas) -> None:
    """Draw one score over alpha."""
    ax = figure.add_subplot()
    x = np.array(data.alphas)
    middle, low, high = (
        np.array([getattr(one, end) for one in data.scores]) for end in ("estimate", "low", "high")
    )
    if not len(x) or np.isnan(middle).all():
        say_nothing_to_draw(ax, "No reply could be scored.")
        return
    ax.fill_between(x, low, high, color=HARMLESS, alpha=0.16, linewidth=0, label="95% interval")
    ax.plot(x, middle, color=HARMLESS, linewidth=1.9)
    thin = np.isin(x, data.thin)
    look: dict[str, Any] = {
        "linestyle": "none",
        "marker": "o",
        "markersize": 5.5,
        "color": HARMLESS,
    }
    many = f"up to {data.replies}" if data.replies else "the"
    ax.plot(x[~thin], middle[~thin], **look, label=f"mean of {many} replies")
    if (thin & ~np.isnan(middle)).any():
        ax.plot(
            x[thin], middle[thin], **look, markerfacecolor="white", label="too few replies scored"
        )
    _references(ax, data, middle)
    ax.set_ylim(LOWEST - 0.3, HIGHEST + 0.3)
    ax.set_yticks(range(1, 11))
    ax.set_ylabel(f"{data.what} (1 to 10)")
    ax.set_xlabel(f"alpha, {data.unit}" if data.unit else "alpha")
    ax.set_title(heading(_headline(data, middle), figure))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _references(ax: Axes, data: SteerCurve, middle: np.ndarray) -> None:
    """Draw what the unsteered model does, and the alphas that have a name."""
    plain = [value for alpha, value in zip(data.alphas, middle, strict=True) if alpha == 0]
    if plain and not np.isnan(plain[0]):
        ax.axhline(plain[0], color=NEUTRAL, linestyle="--", linewidth=1.2, label="unsteered")
    for number, alpha in enumerate(data.marked):
        label = f"α = {', '.join(f'{one:g}' for one in data.marked)}" if number == 0 else None
        ax.axvline(alpha, color=FOUND, linestyle=":", linewidth=1.6, label=label)


def _headline(data: SteerCurve, middle: np.ndarray) -> str:
    """Say what the model does unsteered, and where steering takes it furthest from that.

    With the other score there, as much of a behaviour may be had at the price of all fluency. Where
    too few replies have a score, how far is not known.
    """
    plain = [value for alpha, value in zip(data.alphas, middle, strict=True) if alpha == 0]
    base = plain[0] if plain and not np.isnan(plain[0]) else float(np.nanmin(middle))
    gap = np.where(np.isin(data.alphas, data.thin), np.nan, np.abs(middle - base))
    if np.isnan(gap).all():
        return f"{data.method}: {data.what}, too few replies scored at every α"
    far = int(np.nanargmax(gap))
    if abs(middle[far] - base) < SAME:
        return f"{data.method}: {data.what} is {base:.1f} at every α"
    alpha = f"{data.alphas[far]:.4g}".replace("-", "−")
    from_where = f"{base:.1f} unsteered, " if plain else ""
    text = f"{data.method}: {data.what} {from_where}{middle[far]:.1f} at α = {alpha}"
    if data.others and not np.isnan(data.others[far]):
        text += f", with {data.beside} {data.others[far]:.1f}"
    return text
