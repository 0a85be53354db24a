"""What else changed: attributes of the replies that nobody asked to change, way by way."""

from dataclasses import dataclass

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.base import (
    NEUTRAL,
    PLOTS,
    SERIES,
    Canvas,
    heading,
    letters,
    say_nothing_to_draw,
    shortened,
)

CLEAR = 0.05
MARKERS = ("o", "s", "^", "D", "v", "P")
LONGEST = 36
"""Letters of a way's name, at most."""
LEAST_SPAN = 0.1
SPREAD = 0.5
"""How much of a way's row its attributes share."""


@dataclass(frozen=True)
class OffTarget:
    """What the picture shows.

    Attributes:
        ways: Names of the ways to steer, best first.
        attributes: Names of the attributes.
        changes: For each attribute each way's change, steered less unsteered, from -1 to 1.
        p: Their p, corrected for all of them.
    """

    ways: tuple[str, ...]
    attributes: tuple[str, ...]
    changes: tuple[tuple[Interval, ...], ...]
    p: tuple[tuple[float, ...], ...]


@PLOTS.register("off_target")
def draw(data: OffTarget, figure: Canvas) -> None:
    """Draw a row a way: each attribute's change with its interval."""
    ax = figure.add_subplot()
    if not data.attributes or not data.ways:
        say_nothing_to_draw(ax, "No further attribute was judged.")
        return
    rows = np.arange(len(data.ways))[::-1]
    several = len(data.attributes)
    offsets = [0.0] if several == 1 else np.linspace(SPREAD / 2, -SPREAD / 2, several)
    clear: list[tuple[Interval, str, str]] = []
    for n, (name, changes, p) in enumerate(zip(data.attributes, data.changes, data.p, strict=True)):
        colour, marker = SERIES[n % 6], MARKERS[n % len(MARKERS)]
        ax.plot([], [], color=colour, marker=marker, linestyle="none", label=name)
        for row, way, one, q in zip(rows, data.ways, changes, p, strict=True):
            sure = bool(q <= CLEAR)
            if sure:
                clear.append((one, way, name))
            ends = [[max(one.estimate - one.low, 0.0)], [max(one.high - one.estimate, 0.0)]]
            ax.errorbar(
                one.estimate, row + offsets[n], xerr=ends, fmt=marker, color=colour,
                markerfacecolor=colour if sure else "white", capsize=2.5, markersize=6,
            )  # fmt: skip
    ax.axvline(0.0, color=NEUTRAL, linewidth=0.9)
    span = _span(data)
    ax.set_xlim(-span, span)
    names = [shortened(way, LONGEST) for way in data.ways]
    ax.set_yticks(rows, names)
    ax.set_ylim(-0.6, len(data.ways) - 0.4)
    ax.set_ylabel("way to steer")
    ax.set_xlabel("change of the attribute's mean (which is from 0 to 1)")
    text = _headline(clear, several * len(data.ways))
    ax.set_title(heading(text, figure, beside=max(map(letters, names)) + 4))
    figure.legend(loc="outside upper right", ncols=min(several, 3))
    figure.supxlabel(
        "steered less unsteered replies; bars: 95% intervals; filled: p ≤ 0.05 after Holm",
        fontsize=8,
        color=NEUTRAL,
    )


def _span(data: OffTarget) -> float:
    """Return how far the axis goes to either side: a little beyond the furthest interval."""
    ends = np.array([(one.low, one.estimate, one.high) for row in data.changes for one in row])
    furthest = float(np.nanmax(np.abs(ends))) if np.isfinite(ends).any() else 1.0
    return min(max(LEAST_SPAN, 1.12 * furthest), 1.05)


def _headline(clear: list[tuple[Interval, str, str]], tests: int) -> str:
    """Say how many changes are clear, and which is the largest."""
    what = "change of another attribute is" if tests == 1 else "changes of other attributes are"
    text = f"{len(clear) or 'None'} of {tests} {what} clear"
    if clear:
        one, way, name = max(clear, key=lambda found: abs(found[0].estimate))
        change = f"{one.estimate:+.2f}".replace("-", "−")
        text += f"; the largest: {shortened(way, LONGEST)}, {name} {change}"
    return text
