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
    # One decade below the rarest rate that these tokens can show.
    first = np.floor(np.log10(1 / tokens)) if tokens > 1 else -1.0
    edges = np.logspace(first, 0, int(-first * BINS_A_DECADE) + 1)
    counts, _ = np.histogram(np.clip(rates, edges[0], 1.0), edges)
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=HARMLESS, edgecolor="white")
    ax.set_xscale("log")
    left = edges[0] / 10**0.9
    ax.bar(
        left,
        dead,
        edges[0] / 10**0.3 - left,
        align="edge",
        color=NEUTRAL,
        hatch="///",
        edgecolor="white",
    )
    ax.axvspan(ALWAYS_ON, 10**0.15, color=HARMFUL, alpha=0.25, linewidth=0)
    ax.axvline(ALWAYS_ON, color=HARMFUL, linewidth=1.2)
    ax.set_xlim(left / 10**0.15, 10**0.15)
    decades = np.arange(int(first), 1)
    ax.set_xticks(
        [np.sqrt(left * edges[0] / 10**0.3), *10.0**decades],
        ["never", *(_rate(int(decade)) for decade in decades)],
    )
    ax.minorticks_off()
    top = max(int(counts.max()), dead, 1)
    ax.set_ylim(0, top * 1.12)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(f"firing rate: share of {tokens:,} tokens on which a latent is above 0")
    ax.set_ylabel("number of latents")
    middle = f"median of the others {np.median(rates):.2%} of tokens" if len(rates) else ""
    ax.set_title(
        f"{latents:,} latents: {dead:,} never fire ({dead / latents:.1%}), "
        f"{always:,} always on ({always / latents:.1%})"
    )
    ax.text(
        0.02,
        0.97,
        f"mean L0 {data.mean_l0:.1f} latents a token\n{middle}".strip(),
        transform=ax.transAxes,
        va="top",
        color="#404040",
    )
    ax.annotate(
        "always on (≥ 99 %)",
        (ALWAYS_ON, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        color=HARMFUL,
    )


def _rate(decade: int) -> str:
    return f"{10.0 ** (2 + decade):g} %"
