"""Layers beside each other: where harm can be told, by what, and what gating the latents hides."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from saefty.metrics.intervals import Interval
from saefty.plots.base import (
    HARMFUL,
    NEUTRAL,
    PLOTS,
    SERIES,
    Canvas,
    say_nothing_to_draw,
    shortened,
)

LONGEST_NAME = 18
MARKERS = "osD^vP*"
WIDEST = 18.0
"""Inches: more layers than fit into it stand closer together."""


@dataclass(frozen=True)
class Layers:
    """What the picture shows; a value is None where it was not measured.

    Attributes:
        names: The layers, in order.
        auroc: For each detector its held-out AUROC on every layer.
        safety: Of the harmful examples that a probe caught, the share that it no longer catches
            with the chosen latents gated, and with the controls.
        count: At how many gated latents, at most.
        fvu: Fraction of variance that the SAE leaves unexplained.
    """

    names: tuple[str, ...]
    auroc: Mapping[str, tuple[Interval | None, ...]]
    safety: Mapping[str, tuple[Interval | None, ...]]
    count: int
    fvu: tuple[float | None, ...]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every layer and panel room."""
        return float(np.clip(2.4 + 0.62 * len(self.names), 7.2, WIDEST)), 3.4 + 1.7 * (
            len(self.panels()) - 1
        )

    def panels(self) -> list[str]:
        """Return what there is to draw, from above."""
        panels = ["auroc"]
        if any(one is not None for values in self.safety.values() for one in values):
            panels.append("safety")
        if any(value is not None for value in self.fvu):
            panels.append("fvu")
        return panels


@PLOTS.register("layers")
def draw(data: Layers, figure: Canvas) -> None:
    """Draw AUROC, safety and FVU over the layers, one panel each."""
    if not data.names or not any(one is not None for row in data.auroc.values() for one in row):
        say_nothing_to_draw(figure.add_subplot(), "No layer was evaluated.")
        return
    panels = data.panels()
    heights = [2.0 if panel == "auroc" else 1.0 for panel in panels]
    found = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    axes = dict(zip(panels, found[:, 0], strict=True))
    _detectors(axes["auroc"], data)
    if "safety" in axes:
        for i, (name, values) in enumerate(data.safety.items()):
            shift = 0.1 * (i - (len(data.safety) - 1) / 2)
            _series(axes["safety"], values, HARMFUL, "os"[i % 2], name, shift, 100.0, hollow=i > 0)
        axes["safety"].set_ylim(-4, 104)
        axes["safety"].set_ylabel(f"no longer caught\n(%), up to {data.count}\nlatents gated")
        axes["safety"].legend(loc="best", fontsize=8)
    if "fvu" in axes:
        places = [i for i, value in enumerate(data.fvu) if value is not None]
        heights = [value for value in data.fvu if value is not None]
        bars = axes["fvu"].bar(places, heights, width=0.5, color=NEUTRAL)
        axes["fvu"].bar_label(bars, [_fvu(value) for value in heights], padding=2, fontsize=8)
        axes["fvu"].set_ylim(0, max(1.0, *heights) * 1.25)  # room for the numbers
        axes["fvu"].set_ylabel("variance\nunexplained\n(FVU)")
    last = axes[panels[-1]]
    names = [shortened(name, LONGEST_NAME) for name in data.names]
    turned = 30 if max(map(len, names)) > 6 else 0
    last.set_xticks(range(len(names)), names, rotation=turned, ha="right" if turned else "center")
    last.set_xlim(-0.6, len(names) - 0.4)
    last.set_xlabel("layer")


def _detectors(ax: Axes, data: Layers) -> None:
    """Draw the AUROC of every detector, moved a little apart so that intervals do not cover."""
    lowest = 0.5
    for i, (name, values) in enumerate(data.auroc.items()):
        shift = 0.08 * (i - (len(data.auroc) - 1) / 2)
        _series(ax, values, SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], name, shift, 1.0)
        ends = [end for one in values if one is not None for end in (one.low, one.estimate)]
        lowest = float(np.nanmin([lowest, *ends]))
    ax.axhline(0.5, color=NEUTRAL, linestyle="--", linewidth=1)
    ax.set_ylim(lowest - 0.03, 1.02)
    ax.set_ylabel("held-out AUROC")
    ax.set_title("Telling harmful from harmless, layer by layer\n(bars: 95 % interval)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5)


def _fvu(value: float) -> str:
    """Return an FVU as it is written at its bar, which is too low to be seen where it is small."""
    return "<.001" if value < 0.0005 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _series(
    ax: Axes,
    values: tuple[Interval | None, ...],
    colour: str,
    marker: str,
    name: str,
    shift: float,
    scale: float,
    *,
    hollow: bool = False,
) -> None:
    if all(one is None for one in values):
        return
    heights = [np.nan if one is None else scale * one.estimate for one in values]
    places = np.arange(len(values)) + shift
    for place, one in zip(places, values, strict=True):
        if one is not None:
            ends = [scale * one.low, scale * one.high]
            ax.plot([place, place], ends, color=colour, linewidth=1.6, alpha=0.55)
    ax.plot(
        places, heights, linestyle=":" if hollow else "-", marker=marker, color=colour,
        markerfacecolor="white" if hollow else colour, markersize=5.5, linewidth=1.4, label=name,
    )  # fmt: skip
