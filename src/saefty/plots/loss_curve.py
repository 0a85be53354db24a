"""How training went: the share of variance left unexplained, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from saefty.plots.base import NEUTRAL, PLOTS, SERIES, Canvas, say_nothing_to_draw


@dataclass(frozen=True)
class TrainingCurve:
    """FVU of one SAE.

    Attributes:
        steps: Optimiser steps at which a batch was measured.
        train: FVU of that batch.
        validation_steps: Steps at which the validation rows were measured.
        validation: FVU of the validation rows.
    """

    steps: Int[np.ndarray, "steps"]
    train: Float[np.ndarray, "steps"]
    validation_steps: Int[np.ndarray, "checks"] = field(
        default_factory=lambda: np.zeros(0, dtype=int)
    )
    validation: Float[np.ndarray, "checks"] = field(default_factory=lambda: np.zeros(0))


@PLOTS.register("loss_curve")
def draw(data: Mapping[str, TrainingCurve], figure: Canvas) -> None:
    """Draw FVU over steps for each SAE by name: batches thin, validation thick."""
    ax = figure.add_subplot()
    curves = {name: curve for name, curve in data.items() if len(curve.steps)}
    if not curves:
        say_nothing_to_draw(ax, "No step was logged.")
        return
    for i, (name, curve) in enumerate(curves.items()):
        _draw_one(ax, name, curve, SERIES[i % len(SERIES)], alone=len(curves) == 1)
    values = np.concatenate([np.append(one.train, one.validation) for one in curves.values()])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() / values.min() > 5:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_xlabel("training step")
    ax.set_ylabel("variance unexplained (FVU)")
    ax.set_title("; ".join(_ending(name, curve, len(curves)) for name, curve in curves.items()))
    figure.legend(loc="outside lower center", ncols=min(4, 2 * len(curves)))


def _draw_one(ax: Axes, name: str, curve: TrainingCurve, colour: str, *, alone: bool) -> None:
    prefix = "" if alone else f"{name}, "
    many = len(curve.steps) > 1
    ax.plot(
        curve.steps,
        curve.train,
        "-" if many else ".",
        color=colour if not alone else NEUTRAL,
        alpha=0.45,
        linewidth=1.0,
        label=f"{prefix}training batches",
    )
    if len(curve.validation):
        ax.plot(
            curve.validation_steps,
            curve.validation,
            "-o",
            color=colour,
            linewidth=2.2,
            markersize=4.5,
            label=f"{prefix}validation",
        )


def _ending(name: str, curve: TrainingCurve, curves: int) -> str:
    held_out = len(curve.validation) > 0
    last = curve.validation[-1] if held_out else curve.train[-1]
    prefix = f"{name}: " if curves > 1 else ""
    kind = "validation" if held_out else "training"
    if curves > 1:
        return f"{prefix}{last:.1%}"
    return f"{last:.1%} of the variance unexplained at the end ({kind})"
