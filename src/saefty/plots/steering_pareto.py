"""Behaviour against coherence: what each way to steer pays for what it gets.

A line a way, a point a strength; the ring is the strength that was chosen on other prompts, with
its interval in both directions. The grey curves join points of equal behaviour × coherence.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from saefty.metrics.intervals import Interval
from saefty.plots.base import FAINT, NEUTRAL, PLOTS, SERIES, Canvas, say_nothing_to_draw

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class WayPoints:
    """One way to steer.

    Attributes:
        name: Its name.
        alphas: The strengths, ascending.
        behaviour: Mean behaviour at each, from 0 to 1.
        coherence: Mean coherence at each.
        chosen: Which of them was chosen.
        control: Whether it is a random direction, drawn in grey.
    """

    name: str
    alphas: tuple[float, ...]
    behaviour: tuple[Interval, ...]
    coherence: tuple[Interval, ...]
    chosen: int
    control: bool = False


@dataclass(frozen=True)
class Pareto:
    """What the picture shows.

    Attributes:
        ways: The ways to steer, best first.
        behaviour: What the behaviour is called.
        prompts: How many prompts the means are over.
    """

    ways: tuple[WayPoints, ...]
    behaviour: str
    prompts: int


def looks(ways: tuple[tuple[str, bool], ...]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each way, by name; random directions share one look."""
    found: dict[str, tuple[str, str]] = {}
    coloured = 0
    for name, control in ways:
        if control:
            found[name] = (NEUTRAL, ".")
        else:
            found[name] = (SERIES[coloured % 6], MARKERS[coloured % len(MARKERS)])
            coloured += 1
    return found


@PLOTS.register("steering_pareto")
def draw(data: Pareto, figure: Canvas) -> None:
    """Draw coherence over behaviour, a line a way."""
    ax = figure.add_subplot()
    if not data.ways:
        say_nothing_to_draw(ax, "Nothing was steered.")
        return
    _contours(ax)
    style = looks(tuple((way.name, way.control) for way in data.ways))
    labelled = False
    for way in reversed(data.ways):
        colour, marker = style[way.name]
        x, y = (np.array([one.estimate for one in side]) for side in (way.behaviour, way.coherence))
        quiet = way.control
        label = None if quiet and labelled else "random directions" if quiet else way.name
        labelled |= quiet
        ax.plot(
            x, y, color=colour, marker=marker, markersize=3 if quiet else 4.5,
            linewidth=0.8 if quiet else 1.5, alpha=0.6 if quiet else 0.9, label=label,
            zorder=2 if quiet else 3,
        )  # fmt: skip
        if quiet:
            continue
        across, up = way.behaviour[way.chosen], way.coherence[way.chosen]
        ax.errorbar(
            across.estimate, up.estimate,
            xerr=_arms(across), yerr=_arms(up),
            fmt=marker, markersize=11, markerfacecolor="none", markeredgecolor=colour,
            markeredgewidth=2.0, ecolor=colour, elinewidth=1.4, capsize=3, zorder=4,
        )  # fmt: skip
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlabel(f"{data.behaviour} (mean, 0 to 1)")
    ax.set_ylabel("coherence (mean, 0 to 1)")
    first = next((way for way in data.ways if not way.control), data.ways[0])
    product = first.behaviour[first.chosen].estimate * first.coherence[first.chosen].estimate
    ax.set_title(f"Best: {first.name}, {product:.2f}")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")
    figure.supxlabel(
        f"{data.prompts} prompts; a point a strength, ringed the one chosen on other prompts, "
        "bars: 95% intervals",
        fontsize=8, color=NEUTRAL,
    )  # fmt: skip


def _arms(one: Interval) -> list[list[float]]:
    low, high = one.estimate - one.low, one.high - one.estimate
    return [[max(low, 0.0) if np.isfinite(low) else 0.0],
            [max(high, 0.0) if np.isfinite(high) else 0.0]]  # fmt: skip


def _contours(ax: Axes) -> None:
    x = np.linspace(0.01, 1.02, 200)
    for level in (0.1, 0.2, 0.4, 0.6, 0.8):
        inside = level / x <= 1.03
        ax.plot(x[inside], level / x[inside], color=FAINT, linewidth=1.0, zorder=1)
        middle = level**0.5
        ax.text(
            middle, middle, f"{level:.1f}", fontsize=8, color=NEUTRAL, ha="center", va="center",
            zorder=1, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
