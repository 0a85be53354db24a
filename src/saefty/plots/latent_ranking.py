"""How well the chosen latents tell harmful from harmless on held-out examples, beside controls.

The claim of a latent's AUROC is only as strong as its distance from what a random SAE, a raw neuron
or shuffled labels reach by the same procedure; so they are drawn on the same axis, below.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from saefty.evaluation import LatentEvaluation
from saefty.metrics.intervals import Interval
from saefty.plots.base import FOUND, HARMLESS, NEUTRAL, PLOTS, Canvas, say_nothing_to_draw


@dataclass(frozen=True)
class LatentRanking:
    """What the picture shows.

    Attributes:
        latents: Index, held-out AUROC, and whether it is a finding, best first.
        controls: Name and held-out AUROC of the best latent of each control.
        examples: How many held-out examples.
    """

    latents: tuple[tuple[int, Interval, bool], ...]
    controls: tuple[tuple[str, Interval], ...] = ()
    examples: int = 0

    @classmethod
    def of(
        cls,
        evaluation: LatentEvaluation,
        controls: Mapping[str, Interval] | None = None,
        *,
        top: int = 15,
    ) -> "LatentRanking":
        """Return the picture's data from an evaluation and the controls' best latents."""
        chosen = evaluation.latents[:top]
        return cls(
            tuple((one.latent, one.auroc, one.found) for one in chosen),
            tuple((controls or {}).items()),
            evaluation.counts["report_examples"],
        )


@PLOTS.register("latent_ranking")
def draw(data: LatentRanking, figure: Canvas) -> None:
    """Draw each latent's AUROC with its interval, and the controls beneath."""
    ax = figure.add_subplot()
    if not data.latents:
        say_nothing_to_draw(ax, "No latent leans towards harmful examples.")
        return
    rows = [(f"latent {latent}", interval) for latent, interval, _ in data.latents]
    rows += list(data.controls)
    gap = len(data.latents)
    places = np.arange(len(rows)) + np.where(np.arange(len(rows)) >= gap, 0.7, 0.0)
    found = [is_found for _, _, is_found in data.latents]
    for place, (_, interval), colour, marker in zip(
        places, rows, _colours(found, len(rows)), _markers(found, len(rows)), strict=True
    ):
        _interval(ax, place, interval, colour, marker)
    _mark(ax, 0.5, "chance", "--")
    ax.set_yticks(places, [name for name, _ in rows])
    ax.set_ylim(places[-1] + 1.2, -0.8)
    ends = np.array([value for _, one in rows for value in (one.estimate, one.low, one.high)])
    ax.set_xlim(min(0.4, np.nanmin(ends) - 0.02), 1.01)
    ax.grid(axis="y", visible=False)
    held_out = f", {data.examples:,} held-out examples" if data.examples else ""
    ax.set_xlabel(f"AUROC{held_out} (bars: 95% interval)")
    ax.set_ylabel("chosen on other examples, best first")
    best = max((one.estimate for _, one in data.controls), default=np.nan)
    if not np.isnan(best):
        _mark(ax, best, "best control", ":")
    ax.set_title(_headline(data, best))
    _legend(ax, found, bool(data.controls))


def _headline(data: LatentRanking, best_control: float) -> str:
    """Say how many latents are findings, and of how many the interval lies above all controls."""
    found = [interval for _, interval, is_found in data.latents if is_found]
    if not found:
        return "No latent tracks harm beyond luck"
    first = f"{len(found)} of {len(data.latents)} latents shown track harm beyond luck"
    if np.isnan(best_control):
        return first
    above = sum(one.low > best_control for one in found)
    return f"{first};\n{above or 'none'} of them clearly above every control"


def _mark(ax: Axes, value: float, name: str, line: str) -> None:
    ax.axvline(value, color=NEUTRAL, linewidth=1, linestyle=line)
    ax.annotate(
        name,
        (value, 0.005),
        xycoords=("data", "axes fraction"),
        xytext=(3, 1),
        textcoords="offset points",
        color=NEUTRAL,
        fontsize=8,
    )


def _interval(ax: Axes, place: float, interval: Interval, colour: str, marker: str) -> None:
    if not np.isnan(interval.low):
        ax.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.2)
    face = "white" if marker == "o" else colour
    ax.plot(interval.estimate, place, marker, color=colour, markerfacecolor=face, markersize=6.5)


def _colours(found: list[bool], rows: int) -> list[str]:
    return [FOUND if one else HARMLESS for one in found] + [NEUTRAL] * (rows - len(found))


def _markers(found: list[bool], rows: int) -> list[str]:
    return ["D" if one else "o" for one in found] + ["s"] * (rows - len(found))


def _legend(ax: Axes, found: list[bool], controls: bool) -> None:
    entries = []
    if any(found):
        entries.append(("finding (passes all three tests)", FOUND, "D", FOUND))
    if not all(found):
        entries.append(("not a finding", HARMLESS, "o", "white"))
    if controls:
        entries.append(("control, its best latent", NEUTRAL, "s", NEUTRAL))
    for label, colour, marker, face in entries:
        ax.plot([], [], marker, color=colour, markerfacecolor=face, label=label)
    ax.figure.legend(loc="outside lower center", ncols=len(entries))
