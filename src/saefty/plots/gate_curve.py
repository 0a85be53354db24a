"""What gating does to behaviour: refusal and fluency against the number of gated latents.

The evidence is a difference of differences: refusal of harmful prompts falls when the chosen
latents are gated and stays when as many equally active others are; what either does to harmless
prompts, and whether the text stays fluent, stands beside it.
"""

from dataclasses import dataclass

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.base import (
    HARMFUL,
    HARMLESS,
    NEUTRAL,
    PLOTS,
    Canvas,
    draw_intervals,
    say_nothing_to_draw,
)


@dataclass(frozen=True)
class GateCurve:
    """What the picture shows; each series has one interval a count, shares from 0 to 1.

    Those of the controls end earlier where there are fewer controls than gated latents.

    Attributes:
        counts: Numbers of gated latents, 0 first.
        target_harmful: Refusal of harmful prompts with the chosen latents gated.
        target_harmless: Refusal of harmless prompts likewise.
        control_harmful: Refusal of harmful prompts with equally active other latents gated.
        control_harmless: Refusal of harmless prompts likewise.
        target_fluency: Fluency with the chosen latents gated; 1 is as fluent as ungated.
        control_fluency: Fluency with the other latents gated.
        behaviour: What is measured, for the axis.
        claim: The number of gated latents that the heading speaks of; None for the one with the
            largest fall.
    """

    counts: tuple[int, ...]
    target_harmful: tuple[Interval, ...]
    target_harmless: tuple[Interval, ...]
    control_harmful: tuple[Interval, ...]
    control_harmless: tuple[Interval, ...]
    target_fluency: tuple[Interval, ...] = ()
    control_fluency: tuple[Interval, ...] = ()
    behaviour: str = "refusal"
    claim: int | None = None


@PLOTS.register("gate_curve")
def draw(data: GateCurve, figure: Canvas) -> None:
    """Draw refusal above and fluency below, over the number of gated latents."""
    if not data.counts:
        say_nothing_to_draw(figure.add_subplot(), "Nothing was gated.")
        return
    places = np.arange(len(data.counts))
    if data.target_fluency:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    else:
        top = bottom = figure.add_subplot()
    series = (
        ("harmful prompts, chosen latents gated", data.target_harmful, HARMFUL, "o", "-"),
        ("harmful prompts, control latents gated", data.control_harmful, HARMFUL, "s", ":"),
        ("harmless prompts, chosen latents gated", data.target_harmless, HARMLESS, "o", "-"),
        ("harmless prompts, control latents gated", data.control_harmless, HARMLESS, "s", ":"),
    )
    for label, values, colour, marker, line in series:
        draw_intervals(top, places, values, colour, marker, line, label, scale=100.0)
    top.set_ylim(-3, 103)
    top.set_ylabel(f"{data.behaviour} (% of prompts)")
    top.set_title(_headline(data))
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    if data.target_fluency:
        draw_intervals(bottom, places, data.target_fluency, NEUTRAL, "o", "-", "chosen")
        draw_intervals(bottom, places, data.control_fluency, NEUTRAL, "s", ":", "control")
        ends = [one.low for one in (*data.target_fluency, *data.control_fluency)]
        lowest = np.nanmin([*ends, 0.75])
        bottom.set_ylim(max(0.0, lowest - 0.05), 1.04)
        bottom.set_ylabel("fluency\n(1 = as before)")
    bottom.set_xticks(places, [str(count) for count in data.counts])
    bottom.set_xlabel("number of gated latents; bands: 95% interval")


def _headline(data: GateCurve) -> str:
    """Say how far gating lowered the behaviour, and what the control did at the same count."""
    falls = [100 * (data.target_harmful[0].estimate - one.estimate) for one in data.target_harmful]
    if np.isnan(falls).all():
        return f"{data.behaviour.capitalize()} could not be judged"
    at = int(np.nanargmax(falls)) if data.claim is None else data.counts.index(data.claim)
    count = data.counts[at]
    if falls[at] < 1 or len(data.control_harmful) <= at:
        return f"Gating up to {max(data.counts)} latents: {data.behaviour} of harmful prompts"
    control = 100 * (data.control_harmful[at].estimate - data.control_harmful[0].estimate)
    latents = "latent" if count == 1 else "latents"
    return (
        f"Gating {count} {latents}: {data.behaviour} of harmful prompts −{falls[at]:.0f} points, "
        f"control {control:+.0f}".replace("-", "−")
    )
