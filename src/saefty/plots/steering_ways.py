"""Ways to steer, compared: behaviour against coherence, and their product over strength.

A line a way, a point a strength. The ring is the strength that was chosen on other prompts, with
its interval; a way that no strength of which beats not steering has none. All figures are of
prompts that had no say in choosing. In the first picture the grey curves join points of equal
behaviour × coherence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from saefty.metrics.intervals import Interval
from saefty.plots.base import (
    FAINT,
    NEUTRAL,
    PLOTS,
    SERIES,
    Canvas,
    heading,
    letters,
    say_nothing_to_draw,
    shortened,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONGEST, IN_HEADING = 60, 40
"""Letters of a way's name in the legend and in the heading, at most."""
RING: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2.0,
                        "clip_on": False, "zorder": 5}  # fmt: skip


@dataclass(frozen=True)
class SteeredWay:
    """One way to steer.

    Attributes:
        name: Its name.
        alphas: The strengths, ascending.
        behaviour: Mean behaviour at each, from 0 to 1.
        coherence: Mean coherence at each.
        scores: Behaviour × coherence at each.
        chosen: Which of them was chosen; None if none beats not steering.
        control: Whether it is a random direction, drawn in grey.
    """

    name: str
    alphas: tuple[float, ...]
    behaviour: tuple[Interval, ...]
    coherence: tuple[Interval, ...]
    scores: tuple[Interval, ...]
    chosen: int | None
    control: bool = False


@dataclass(frozen=True)
class SteeredWays:
    """What the pictures show.

    Attributes:
        ways: The ways to steer, best first.
        behaviour: What the behaviour is called.
        unit: What one alpha is, in words.
        prompts: How many prompts the means are over.
    """

    ways: tuple[SteeredWay, ...]
    behaviour: str
    unit: str
    prompts: int


@PLOTS.register("steering_pareto")
def draw_pareto(data: SteeredWays, figure: Canvas) -> None:
    """Draw coherence over behaviour, a line a way."""
    ax = figure.add_subplot()
    if not data.ways:
        say_nothing_to_draw(ax, "Nothing was steered.")
        return
    _contours(ax)
    for way, look, label in reversed(_looks(data.ways)):
        x, y = _middles(way.behaviour), _middles(way.coherence)
        ax.plot(x, y, label=label, **look)
        if way.control or way.chosen is None:
            continue
        across, up = way.behaviour[way.chosen], way.coherence[way.chosen]
        ax.errorbar(
            across.estimate, up.estimate, xerr=_arms(across), yerr=_arms(up), fmt=look["marker"],
            color=look["color"], elinewidth=1.4, capsize=3, **RING,
        )  # fmt: skip
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.03, 1.06)
    ax.set_xlabel(f"{data.behaviour} (mean, 0 to 1)")
    ax.set_ylabel("coherence (mean, 0 to 1)")
    _around(ax, data, figure, "a point a strength; ringed, with 95% intervals: the one chosen on "
            "other prompts", backwards=True)  # fmt: skip


@PLOTS.register("steering_scores")
def draw_scores(data: SteeredWays, figure: Canvas) -> None:
    """Draw the score over alpha, a line a way with its band."""
    ax = figure.add_subplot()
    if not data.ways:
        say_nothing_to_draw(ax, "Nothing was steered.")
        return
    for way, look, label in _looks(data.ways):
        middle = _middles(way.scores)
        ax.plot(way.alphas, middle, label=label, **look)
        if way.control:
            continue
        low, high = ([getattr(one, end) for one in way.scores] for end in ("low", "high"))
        ax.fill_between(way.alphas, low, high, color=look["color"], alpha=0.10, linewidth=0)
        if way.chosen is not None:
            ax.plot(way.alphas[way.chosen], middle[way.chosen], color=look["color"],
                    marker=look["marker"], linestyle="none", **RING)  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"alpha, {data.unit}")
    ax.set_ylabel(f"{data.behaviour} × coherence")
    _around(ax, data, figure, "ringed: the strength chosen on other prompts; bands: 95% intervals")


def _looks(ways: Sequence[SteeredWay]) -> list[tuple[SteeredWay, dict[str, Any], str | None]]:
    """Return each way with its look and its name; random directions share one of each."""
    found: list[tuple[SteeredWay, dict[str, Any], str | None]] = []
    first = next((way for way in ways if way.control), None)
    own = [way for way in ways if not way.control]
    for way in ways:
        if way.control:
            look = {"color": NEUTRAL, "marker": ".", "markersize": 3, "linewidth": 0.8,
                    "alpha": 0.6, "zorder": 2}  # fmt: skip
            found.append((way, look, "random directions" if way is first else None))
        else:
            at = own.index(way)
            look = {"color": SERIES[at % 6], "marker": MARKERS[at % len(MARKERS)],
                    "markersize": 4.5, "linewidth": 1.5, "alpha": 0.9, "zorder": 3}  # fmt: skip
            found.append((way, look, shortened(way.name, LONGEST)))
    return found


def _around(
    ax: Axes, data: SteeredWays, figure: Canvas, note: str, *, backwards: bool = False
) -> None:
    """Write heading, legend and the line below."""
    handles, labels = ax.get_legend_handles_labels()
    ax.set_title(heading(_headline(data), figure, beside=max(map(letters, labels)) + 8))
    step = -1 if backwards else 1
    figure.legend(handles[::step], labels[::step], loc="outside right upper")
    figure.supxlabel(f"{data.prompts} prompts; {note}", fontsize=8, color=NEUTRAL)


def _headline(data: SteeredWays) -> str:
    """Say which way is the best, at which strength, and what is had without steering."""
    own = [way for way in data.ways if not way.control]
    best = next((way for way in own if way.chosen is not None), None)
    if best is None:
        return "No strength of any vector beats not steering" if own else "Random directions"
    assert best.chosen is not None
    parts = [one[best.chosen].estimate for one in (best.scores, best.behaviour, best.coherence)]
    text = (
        f"Highest: {shortened(best.name, IN_HEADING)} at α = {best.alphas[best.chosen]:.4g}, "
        f"{data.behaviour} × coherence = {parts[1]:.2f} × {parts[2]:.2f} = {parts[0]:.2f}"
    )
    if 0.0 in best.alphas:
        text += f"; unsteered {best.scores[best.alphas.index(0.0)].estimate:.2f}"
    return text


def _middles(several: Sequence[Interval]) -> Float[np.ndarray, "strengths"]:
    return np.array([one.estimate for one in several], dtype=float)


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
