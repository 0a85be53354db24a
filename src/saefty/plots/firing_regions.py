"""Latents by how often they fire and how strongly: dead, rare, healthy, frequent and always on.

Frequent latents that are also strong carry most of the code; a healthy SAE has its mass in the band
marked healthy, and little to the right of it.
"""

import numpy as np

from saefty.metrics.firing import ALWAYS_ON, FREQUENT, RARE, FiringStats, firing_regions
from saefty.plots.base import DARK_SERIES, LIGHT, PLOTS, Canvas, dark, say_nothing_to_draw

GRID = 45
TICKS = 8
COLOURS = {
    "rare": DARK_SERIES[6], "healthy": DARK_SERIES[2], "frequent": DARK_SERIES[4],
    "always on": DARK_SERIES[5],
}  # fmt: skip


@PLOTS.register("firing_regions")
@dark
def draw(data: FiringStats, figure: Canvas) -> None:
    """Draw the number of latents by firing rate and mean activation, with the regions marked."""
    ax = figure.add_subplot()
    regions = firing_regions(data)
    counts = {name: int(mask.sum()) for name, mask in regions.items()}
    latents, tokens = len(data.firing_rate), data.token_count
    fires = data.active_count > 0
    if not fires.any():
        say_nothing_to_draw(ax, f"All {latents:,} latents are dead on {tokens:,} tokens.")
        return
    rate, mean = np.log10(data.firing_rate[fires]), np.log10(data.mean_when_active[fires])
    left = min(np.floor(-np.log10(tokens)), np.log10(RARE)) - 0.5
    low, high = float(mean.min()), float(mean.max())
    room = max(0.08 * (high - low), 0.3)
    right = 0.8  # room for what is always on, right of 1
    # In a column of their own: their rates differ by less than a cell is wide.
    rate[regions["always on"][fires]] = right / 2
    ends = (left, right, low - room, high + 3.2 * room)
    cells = ax.hexbin(
        rate, mean, gridsize=(GRID, GRID // 2), extent=ends, bins="log", mincnt=1, cmap="viridis",
        linewidths=0.1,
    )  # fmt: skip
    edges = {
        "rare": (left, np.log10(RARE)),
        "healthy": (np.log10(RARE), np.log10(FREQUENT)),
        "frequent": (np.log10(FREQUENT), np.log10(ALWAYS_ON)),
        "always on": (np.log10(ALWAYS_ON), right),
    }
    for name, (begin, end) in edges.items():
        ax.axvspan(begin, end, color=COLOURS[name], alpha=0.10, linewidth=0)
        ax.axvline(begin, color=COLOURS[name], linewidth=0.9, linestyle=":")
        ax.text(
            (begin + end) / 2,
            ends[3] - 0.15 * room,
            f"{name}\n{counts[name]:,}\n{counts[name] / latents:.1%}",
            ha="center",
            va="top",
            color=COLOURS[name],
            fontsize=8.5,
        )
    ax.set_xlim(left, right)
    ax.set_ylim(ends[2], ends[3])
    decades = np.arange(int(np.ceil(left)), 0)
    names = [f"{10.0 ** (2 + int(decade)):g}%" for decade in decades]
    ax.set_xticks([*decades, right / 2], [*names, f"≥ {ALWAYS_ON:.0%}"])
    heights = np.arange(int(np.floor(ends[2])), int(np.ceil(ends[3])) + 1)
    heights = heights[(heights >= ends[2]) & (heights <= ends[3])]
    heights = heights[:: -(-len(heights) // TICKS) or 1]
    if len(heights) < 2:  # less than two decades: round numbers between them
        values = np.outer(10.0 ** np.arange(np.floor(ends[2]), ends[3] + 1), (1, 2, 5)).ravel()
        heights = np.log10(values)
        heights = heights[(heights >= ends[2]) & (heights <= ends[3])]
    ax.set_yticks(heights, [f"{10.0**one:.3g}" for one in heights])
    ax.grid(visible=False)
    bar = figure.colorbar(cells, ax=ax, pad=0.02)
    bar.set_label("latents in a cell")
    bar.ax.tick_params(colors=LIGHT)
    ax.set_xlabel(f"firing rate over {tokens:,} token{'s'[: tokens - 1]} (log scale)")
    ax.set_ylabel("mean activation where active (log scale)")
    silent = counts["dead"]
    unseen = f"{silent:,} dead ({silent / latents:.1%}) are not shown"
    ax.set_title(
        f"{latents:,} latents: {unseen if silent else 'all fire'}, "
        f"{counts['always on']:,} always on"
    )
