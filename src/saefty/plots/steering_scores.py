"""Each way's score over strength: behaviour × coherence on prompts that had no say in choosing."""

from dataclasses import dataclass

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.base import NEUTRAL, PLOTS, SERIES, Canvas, say_nothing_to_draw

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class ScoreCurve:
    """One way to steer.

    Attributes:
        name: Its name.
        alphas: The strengths, ascending.
        scores: Behaviour × coherence at each.
        chosen: Which of them was chosen.
        control: Whether it is a random direction, drawn in grey.
    """

    name: str
    alphas: tuple[float, ...]
    scores: tuple[Interval, ...]
    chosen: int
    control: bool = False


@dataclass(frozen=True)
class ScoreCurves:
    """What the picture shows.

    Attributes:
        ways: The ways to steer, best first.
        behaviour: What the behaviour is called.
        unit: What one alpha is, in words.
        prompts: How many prompts the means are over.
    """

    ways: tuple[ScoreCurve, ...]
    behaviour: str
    unit: str
    prompts: int


@PLOTS.register("steering_scores")
def draw(data: ScoreCurves, figure: Canvas) -> None:
    """Draw the score over alpha, a line a way with its band."""
    ax = figure.add_subplot()
    if not data.ways:
        say_nothing_to_draw(ax, "Nothing was steered.")
        return
    coloured, labelled = 0, False
    for way in data.ways:
        middle, low, high = (
            np.array([getattr(one, end) for one in way.scores])
            for end in ("estimate", "low", "high")
        )
        if way.control:
            label = None if labelled else "random directions"
            ax.plot(way.alphas, middle, color=NEUTRAL, linewidth=0.9, alpha=0.7, label=label)
            labelled = True
            continue
        colour, marker = SERIES[coloured % 6], MARKERS[coloured % len(MARKERS)]
        coloured += 1
        ax.fill_between(way.alphas, low, high, color=colour, alpha=0.10, linewidth=0)
        ax.plot(way.alphas, middle, color=colour, marker=marker, markersize=4, label=way.name)
        at = way.chosen
        ax.plot(
            way.alphas[at], middle[at], marker=marker, markersize=11, color=colour,
            markerfacecolor="none", markeredgewidth=2.0, linestyle="none",
        )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"alpha, {data.unit}")
    ax.set_ylabel(f"{data.behaviour} × coherence")
    ax.set_title("Score over strength")
    figure.legend(loc="outside right upper")
    figure.supxlabel(
        f"{data.prompts} prompts; ringed: the strength chosen on other prompts; "
        "bands: 95% intervals",
        fontsize=8,
        color=NEUTRAL,
    )
