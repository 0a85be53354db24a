"""What gating leaves of the evidence of harm in stored activations, against the number of latents.

Above: how many of the harmful examples that a probe caught it no longer catches, and how many calls
of harmless examples change. Below: what is left of the AUROC, of that probe and of one that learns
anew on the gated activations. Each stands beside equally active other latents.
"""

from dataclasses import dataclass

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.base import (
    HARMFUL,
    HARMLESS,
    NEUTRAL,
    PLOTS,
    SERIES,
    Canvas,
    draw_intervals,
    say_nothing_to_draw,
)


@dataclass(frozen=True)
class SafetyCurve:
    """What the picture shows; each series has one interval a count.

    Attributes:
        counts: Numbers of gated latents, 0 first.
        control_counts: The counts for which there are controls, 0 first.
        safety: Of the harmful examples caught ungated, the share no longer caught; of both arms.
        changed: Share of harmless examples whose call changes; of both arms.
        auroc: Of the probe that learnt on ungated activations; of both arms.
        relearnt: Of a probe that learnt on activations gated likewise, the chosen latents.
        where: The layer, for the heading.
        strength: How many times what the latents contribute is taken out.
    """

    counts: tuple[int, ...]
    control_counts: tuple[int, ...]
    safety: tuple[tuple[Interval, ...], tuple[Interval, ...]]
    changed: tuple[tuple[Interval, ...], tuple[Interval, ...]]
    auroc: tuple[tuple[Interval, ...], tuple[Interval, ...]]
    relearnt: tuple[Interval, ...]
    where: str = ""
    strength: float = 1.0


ARMS = ((0, "chosen", "o", "-"), (1, "control", "s", ":"))


@PLOTS.register("safety_curve")
def draw(data: SafetyCurve, figure: Canvas) -> None:
    """Draw safety and changed calls above and AUROC below, over the number of gated latents."""
    if len(data.counts) < 2:
        say_nothing_to_draw(figure.add_subplot(), "Nothing was gated.")
        return
    places = np.arange(len(data.counts))
    of_arm = places, places[np.isin(data.counts, data.control_counts)]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    for label, series, colour in (
        ("harmful, no longer caught", data.safety, HARMFUL),
        ("harmless, call changed", data.changed, HARMLESS),
    ):
        for arm, name, marker, line in ARMS:
            draw_intervals(
                top, of_arm[arm], series[arm], colour, marker, line, f"{label} ({name} gated)",
                scale=100.0,
            )  # fmt: skip
    top.set_ylim(-3, 103)
    top.set_ylabel("% of examples")
    top.set_title(_headline(data))
    for arm, name, marker, line in ARMS:
        draw_intervals(
            bottom, of_arm[arm], data.auroc[arm], NEUTRAL, marker, line, f"same probe ({name})"
        )
    draw_intervals(
        bottom, places, data.relearnt, SERIES[2], "D", "--", "probe learnt anew (chosen)"
    )
    bottom.axhline(0.5, color=NEUTRAL, linewidth=1, linestyle=(0, (1, 3)))
    ends = [one.low for one in (*data.auroc[0], *data.auroc[1], *data.relearnt)]
    values = [one.estimate for one in (*data.auroc[0], *data.auroc[1], *data.relearnt)]
    bottom.set_ylim(float(np.nanmin([*ends, *values, 0.45])) - 0.03, 1.03)
    bottom.set_ylabel("AUROC left")
    bottom.set_xticks(places, [str(count) for count in data.counts])
    bottom.set_xlabel("number of gated latents; bands: 95 % interval")
    handles = [ax.get_legend_handles_labels() for ax in (top, bottom)]
    figure.legend(
        [one for found, _ in handles for one in found],
        [one for _, labels in handles for one in labels],
        loc="outside lower center",
        ncols=2,
    )


def _headline(data: SafetyCurve) -> str:
    """Say what gating the most latents did, and the control at the same count."""
    times = "" if data.strength == 1 else f", {data.strength:g} times"
    most, count = data.safety[0][-1].estimate, data.counts[-1]
    latents = "latent" if count == 1 else "latents"
    if np.isnan(most):
        return _titled(data.where, "the probe caught no harmful example")
    found = f"gating {count} {latents}{times} hides {most:.0%} of what a probe caught"
    if data.control_counts and data.control_counts[-1] == count:
        found += f"\n(equally active others: {data.safety[1][-1].estimate:.0%})"
    return _titled(data.where, found)


def _titled(where: str, words: str) -> str:
    return f"{where}: {words}" if where else words[0].upper() + words[1:]
