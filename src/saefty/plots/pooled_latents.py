"""The values of the best latents on harmful and on harmless examples: what an AUROC is made of."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from saefty.plots.base import HARMFUL, HARMLESS, PLOTS, Canvas, say_nothing_to_draw

BINS = 24
COLUMNS = 3
HEADROOM = 1.3
"""Room for the writing above the bars."""


@dataclass(frozen=True)
class PooledLatents:
    """What the picture shows.

    Attributes:
        latents: The latents, best first.
        values: Their pooled values, one row an example.
        harmful: The labels.
    """

    latents: tuple[int, ...]
    values: Float[np.ndarray, "examples latents"]
    harmful: Bool[np.ndarray, "examples"]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches that give every row of panels room."""
        rows = max(1, -(-len(self.latents) // COLUMNS))
        return 9.0, 1.1 + 2.3 * rows


@PLOTS.register("pooled_latents")
def draw(data: PooledLatents, figure: Canvas) -> None:
    """Draw one histogram a latent and label: shares of the examples on which it fires."""
    if not data.latents or len(data.harmful) == 0:
        say_nothing_to_draw(figure.add_subplot(), "No latent was chosen.")
        return
    columns = min(COLUMNS, len(data.latents))
    rows = -(-len(data.latents) // columns)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, latent in enumerate(data.latents):
        ax = axes[place // columns][place % columns]
        values = data.values[:, place]
        top = float(values.max())
        edges = np.linspace(0, top if top > 0 else 1.0, BINS + 1)
        silent = []
        for mask, colour, label in (
            (data.harmful, HARMFUL, "harmful"),
            (~data.harmful, HARMLESS, "harmless"),
        ):
            own = values[mask]
            fires = own[own > 0]
            weights = np.full(len(fires), 100 / max(len(own), 1))
            line = "-" if label == "harmful" else "--"
            ax.hist(fires, bins=edges.tolist(), weights=weights, histtype="stepfilled",
                    color=colour, alpha=0.25)  # fmt: skip
            ax.hist(fires, bins=edges.tolist(), weights=weights, histtype="step", color=colour,
                    linewidth=1.6, linestyle=line, label=label)  # fmt: skip
            silent.append(f"{(own == 0).mean():.0%} of {label}" if len(own) else f"no {label}")
        ax.set_ylim(0, HEADROOM * max(ax.get_ylim()[1], 1.0))
        ax.set_title(f"latent {latent:,}", fontsize=10)
        ax.text(0.98, 0.96, "silent on\n" + "\n".join(silent), transform=ax.transAxes,
                ha="right", va="top", fontsize=7.5)  # fmt: skip
        ax.set_xlabel("pooled value", fontsize=9)
        ax.set_ylabel("% of examples", fontsize=9)
    for spare in range(len(data.latents), rows * columns):
        axes[spare // columns][spare % columns].set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
