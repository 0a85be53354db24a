"""How training went: the share of variance left unexplained, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

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

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "TrainingCurve":
        """Return the curve of the records of a `train_log.jsonl`."""
        batches = [record for record in records if record.get("fvu") is not None]
        checks = [record for record in records if record.get("held_out_fvu") is not None]
        return cls(
            np.array([record["step"] for record in batches], dtype=int),
            np.array([record["fvu"] for record in batches], dtype=float),
            np.array([record["step"] for record in checks], dtype=int),
            np.array([record["held_out_fvu"] for record in checks], dtype=float),
        )


@PLOTS.register("loss_curve")
def draw(data: Mapping[str, TrainingCurve], figure: Canvas) -> None:
    """Draw FVU over steps for each SAE by name: batches thin, validation thick."""
    ax = figure.add_subplot()
    curves = {name: curve for name, curve in data.items() if len(curve.steps)}
    if not curves:
        say_nothing_to_draw(ax, "No step was logged.")
        return
    for i, (name, curve) in enumerate(curves.items()):
        # Colours come round again; the line's style tells the rounds apart.
        look = (SERIES[i % len(SERIES)], ("-", "--", ":")[i // len(SERIES) % 3])
        _draw_one(ax, name, curve, look, alone=len(curves) == 1)
    values = np.concatenate([np.append(one.train, one.validation) for one in curves.values()])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() / values.min() > 5:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if ax.dataLim.width == 0:
        ax.set_xlim(ax.dataLim.x0 - 1, ax.dataLim.x0 + 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("training step")
    ax.set_ylabel("variance unexplained (FVU)")
    ax.set_title(_headline(list(curves.values())))
    figure.legend(loc="outside lower center", ncols=3)


def _draw_one(
    ax: Axes, name: str, curve: TrainingCurve, look: tuple[str, str], *, alone: bool
) -> None:
    """Draw one SAE; among several its colour has a name, and batches are told by thin lines."""
    colour, line = look
    checked = len(curve.validation) > 0
    last = curve.validation[-1] if checked else curve.train[-1]
    kind = "validation" if checked else "training batches"
    label = f"{kind if alone else name} ({_share(last)} at the end)"
    ax.plot(
        curve.steps,
        curve.train,
        "-" if len(curve.steps) > 1 else ".",
        color=NEUTRAL if alone and checked else colour,
        alpha=0.45 if checked else 1.0,
        linewidth=1.0,
        label=("training batches" if alone else None) if checked else label,
    )
    if checked:
        ax.plot(
            curve.validation_steps,
            curve.validation,
            linestyle=line,
            marker="o",
            color=colour,
            linewidth=2.2,
            markersize=4.5,
            label=label,
        )


def _headline(curves: list[TrainingCurve]) -> str:
    checked = all(len(curve.validation) for curve in curves)
    ends = [curve.validation[-1] if checked else curve.train[-1] for curve in curves]
    if not np.isfinite(ends).all():
        return "The loss is not finite at the end"
    where = "of held-out variance" if checked else "of the training batches' variance"
    if len(ends) == 1:
        return f"{_share(ends[0])} {where} unexplained at the end"
    return f"{_share(min(ends))} to {_share(max(ends))} {where} unexplained at the end"


def _share(fvu: float) -> str:
    return f"{fvu:.1%}" if np.isfinite(fvu) else "not finite"
