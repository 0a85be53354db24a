"""Samples for the pictures of a comparison of ways to steer."""

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.off_target import OffTarget
from saefty.plots.steering_ways import SteeredWay, SteeredWays

NAN = float("nan")
UNIT = "in multiples of the mean residual norm"
ALPHAS = (0.0, 0.5, 1.0, 2.0)


def interval(value, half=0.05):
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), "bootstrap", 64)


def falling(height, steep):
    x = np.linspace(0, 1, len(ALPHAS)) ** steep
    return tuple(interval(height * v) for v in x), tuple(interval(1 - 0.8 * v) for v in x)


def way(name, height=0.9, steep=1.0, control=False, chosen=2):
    behaviour, coherence = falling(height, steep)
    scores = tuple(
        interval(one.estimate * other.estimate)
        for one, other in zip(behaviour, coherence, strict=True)
    )
    return SteeredWay(name, ALPHAS, behaviour, coherence, scores, chosen, control)


def ways(*several, behaviour="share of French", unit=UNIT, prompts=64):
    return SteeredWays(several, behaviour, unit, prompts)


NONE = Interval(NAN, NAN, NAN, "no values", 0)
UNSCORED = SteeredWay("mute", ALPHAS, (NONE,) * 4, (NONE,) * 4, (NONE,) * 4, None)
RANDOM = tuple(way(f"random_{n}", 0.1 * n, 1.0, control=True) for n in range(1, 4))
LONG = "sae_ts on a group of eight latents, lambda 0, rotation"

WAYS = {
    "normal": ways(way("caa"), way("sae_ts", 0.7, 2.0), *RANDOM),
    "many": ways(*(way(f"{LONG} {n}", 0.1 + 0.08 * n) for n in range(10)), behaviour="b"),
    "Japanese": ways(way("正解"), behaviour="フランス語の割合", prompts=2),
    "random alone": ways(*RANDOM, behaviour="refusal"),
    "none beats not steering": ways(way("caa", 0.05, chosen=None), *RANDOM[:1]),
    "the last and largest": ways(way("caa", 1.0, chosen=3), unit="in activation units"),
    "not scored": ways(UNSCORED, behaviour="refusal"),
    "nothing": ways(behaviour="refusal", prompts=0),
}

STEERING_PLOTS = {
    "steering_pareto": WAYS,
    "steering_scores": WAYS,
    "off_target": {
        "normal": OffTarget(
            ("caa", "sae_ts", "random_1"), ("mentions food", "refusal"),
            ((interval(0.6), interval(0.1), interval(0.0)),) * 2,
            ((0.001, 0.5, 1.0), (0.04, 1.0, 1.0)),
        ),
        "one": OffTarget(("caa",), ("topic",), ((interval(0.6),),), ((0.5,),)),
        "many": OffTarget(
            tuple(f"{LONG} {n}" for n in range(12)), tuple(f"attribute {n}" for n in range(6)),
            (tuple(interval(0.07 * n) for n in range(12)),) * 6, ((0.01,) * 12,) * 6,
        ),
        "not scored": OffTarget(("caa",), ("topic",), ((NONE,),), ((1.0,),)),
        "nothing": OffTarget(("caa",), (), (), ()),
    },
}  # fmt: skip
