"""Samples for the pictures of gating in stored activations, of layers, and of how scores spread."""

from dataclasses import replace

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.layers import Layers
from saefty.plots.pooled_latents import PooledLatents
from saefty.plots.safety_curve import SafetyCurve
from saefty.plots.score_histograms import ScoreHistograms

NAN = float("nan")


def interval(value, half=0.05):
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), "bootstrap", 40)


def curve(counts, controls=None, **fields):
    controls = counts if controls is None else controls
    rising = tuple(interval(0.15 * i) for i in range(len(counts)))
    falling = tuple(interval(1 - 0.08 * i) for i in range(len(counts)))
    few = tuple(interval(0.02, 0.02) for _ in counts)
    return SafetyCurve(
        counts=tuple(counts),
        control_counts=tuple(controls),
        safety=(rising, tuple(interval(0.03, 0.03) for _ in controls)),
        changed=(few, few[: len(controls)]),
        auroc=(falling, tuple(interval(0.97) for _ in controls)),
        relearnt=tuple(interval(0.95, 0.03) for _ in counts),
        where="Layer 3",
        **fields,
    )


def scores(n, found=3, chosen=12):
    rng = np.random.default_rng(0)
    values = {
        "dfreq": rng.normal(0, 0.1, n),
        "dmag": rng.normal(0, 2, n) ** 3,
        "auroc": np.clip(rng.normal(0.5, 0.08, n), 0, 1),
        "consensus": rng.normal(0, 1, n),
    }
    is_chosen = np.arange(n) < chosen
    return ScoreHistograms(values, is_chosen, np.arange(n) < found)


def pooled(latents, n=200):
    rng = np.random.default_rng(1)
    harmful = np.arange(n) % 2 == 0
    fires = rng.random((n, latents)) < np.where(harmful, 0.8, 0.2)[:, None]
    values = fires * rng.gamma(3, 1 + harmful[:, None], (n, latents))
    return PooledLatents(tuple(4096 * i + 7 for i in range(latents)), values, harmful)


def layers(n, safety=True, fvu=True):
    names = tuple(str(4 * i) if i != 2 else "8__width_16k/average_l0_82" for i in range(n))
    rising = tuple(interval(0.55 + 0.4 * i / max(n, 1)) for i in range(n))
    gap = tuple(None if i == 1 else one for i, one in enumerate(rising))
    return Layers(
        names,
        {
            "best latent": rising, "dense probe": tuple(interval(0.97, 0.02) for _ in range(n)),
            "SAE latents": gap, "5 latents": rising[::-1], "2 latents": gap, "1 latent": rising,
            "bag of words": tuple(interval(0.5, 0.04) for _ in range(n)),
        },
        {"chosen latents": gap, "equally active others": tuple(interval(0.03, 0.03) for _ in gap)}
        if safety else {"chosen latents": (None,) * n, "equally active others": (None,) * n},
        8,
        tuple(0.1 * (i + 1) if fvu and i != 1 else None for i in range(n)),
    )  # fmt: skip


LATENT_PLOTS = {
    "safety_curve": {
        "normal": curve([0, 1, 2, 4, 8, 16]),
        "fewer controls, over-corrected": curve([0, 1, 2, 4], [0, 1], strength=2.5),
        "no control": curve([0, 8], [0]),
        "nothing caught": replace(
            curve([0, 8]), safety=((interval(0.0), interval(NAN)), (interval(0.0), interval(NAN)))
        ),
        "nothing gated": curve([0]),
        "no count": curve([], []),
    },
    "score_histograms": {
        "normal": scores(4000),
        "nothing chosen": scores(300, 0, 0),
        "one latent": scores(1, 1, 1),
        "one score, not finite": ScoreHistograms(
            {"kl": np.full(5, NAN)}, np.ones(5, bool), np.zeros(5, bool)
        ),
        "five scores": replace(
            scores(50), scores={**scores(50).scores, "вероятность 確率": np.arange(50.0)}
        ),
        "no latent": scores(0),
    },
    "pooled_latents": {
        "normal": pooled(6),
        "four": pooled(4),
        "one": pooled(1),
        "silent": PooledLatents((3,), np.zeros((4, 1)), np.array([True, False, True, False])),
        "one label": PooledLatents((3,), np.ones((4, 1)), np.ones(4, bool)),
        "none": pooled(0),
    },
    "layers": {
        "normal": layers(6),
        "one layer": layers(1),
        "forty layers": layers(40),
        "without silencing and FVU": layers(3, safety=False, fvu=False),
        "no interval": Layers(
            ("0",), {"best latent": (Interval(0.6, NAN, NAN, "", 1),)}, {}, 8, (None,)
        ),
        "none": layers(0),
    },
}  # fmt: skip
