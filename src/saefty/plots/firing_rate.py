"""How often latents fire: a histogram over latents, with the two pathologies marked.

A healthy SAE has most of its latents between one token in a hundred thousand and one in ten. Dead
latents (which never fire) have no place on a logarithmic axis and stand in a bar of their own;
always-on ones (99 % of tokens or more) say nothing about any token.
"""

import numpy as np

from saefty.metrics.firing import ALWAYS_ON, FiringStats
from saefty.plots.base import HARMFUL, HARMLESS, NEUTRAL, PLOTS, Canvas, say_nothing_to_draw

BINS_A_DECADE = 5


@PLOTS.register("firing_rate")
def draw(data: FiringStats, figure: Canvas) -> None:
    """Draw the number of latents over their firing rate, in bins of a fifth of a decade."""
    ax = figure.add_subplot()
    latents, tokens = len(data.firing_rate), data.token_count
    if latents == 0 or tokens == 0:
        say_nothing_to_draw(ax, "No tokens were read.")
        return
    rates = data.firing_rate[data.active_count > 0]
    dead = latents - len(rates)
    always = int((data.firing_rate >= ALWAYS_ON).sum())
    first = np.floor(np.log10(1 / tokens)) if tokens > 1 else -1.0
    edges = np.logspace(first, 0, int(-first * BINS_A_DECADE) + 1)
    edges[-1] = ALWAYS_ON
    counts, _ = np.histogram(rates[rates < ALWAYS_ON].clip(min=edges[0]), edges)
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=HARMLESS, edgecolor="white")
    ax.set_xscale("log")
    # Bars of their own, as wide as two bins and two bins apart from the rest.
    wide = gap = 10 ** (2 / BINS_A_DECADE)
    dead_at, always_at = edges[0] / gap / wide, gap
    for at, height, colour, hatch in (
        (dead_at, dead, NEUTRAL, "///"),
        (always_at, always, HARMFUL, "..."),
    ):
        ax.bar(at, height, at * (wide - 1), align="edge", color=colour, hatch=hatch, ec="white")
        ax.annotate(
            f"{height:,}",
            (at * np.sqrt(wide), height),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            color=colour,
        )
    ax.set_xlim(dead_at / gap, always_at * wide * gap)
    decades = np.arange(int(first), 0)
    ax.set_xticks(
        [dead_at * np.sqrt(wide), *10.0**decades, always_at * np.sqrt(wide)],
        ["never", *(_rate(int(decade)) for decade in decades), "always\n(≥ 99%)"],
    )
    ax.minorticks_off()
    ax.set_ylim(0, max(int(counts.max()), dead, always, 1) * 1.1)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(
        f"firing rate: share of {tokens:,} token{'s'[: tokens - 1]} on which a latent is above 0"
    )
    ax.set_ylabel("number of latents")
    typical = f", median rate of those that fire {np.median(rates):.2%}" if len(rates) else ""
    ax.set_title(
        f"{latents:,} latents: {dead / latents:.1%} never fire, {always / latents:.1%} always on\n"
        f"mean L0 {data.mean_l0:.1f}{typical}"
    )


def _rate(decade: int) -> str:
    return f"{10.0 ** (2 + decade):g}%"
