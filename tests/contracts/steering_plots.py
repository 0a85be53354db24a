"""Samples for the pictures of a comparison of ways to steer."""

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.off_target import OffTarget
from saefty.plots.steering_pareto import Pareto, WayPoints
from saefty.plots.steering_scores import ScoreCurve, ScoreCurves

NAN = float("nan")
ALPHAS = (0.0, 0.5, 1.0, 2.0)


def interval(value, half=0.05):
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), "bootstrap", 64)


def falling(height, steep):
    x = np.linspace(0, 1, len(ALPHAS)) ** steep
    return tuple(interval(height * v) for v in x), tuple(interval(1 - 0.8 * v) for v in x)


def way(name, height=0.9, steep=1.0, control=False, chosen=2):
    return WayPoints(name, ALPHAS, *falling(height, steep), chosen, control)


def score(name, height=0.5, control=False):
    values = tuple(interval(height * v) for v in (0.0, 0.6, 1.0, 0.4))
    return ScoreCurve(name, ALPHAS, values, 2, control)


NONE = Interval(NAN, NAN, NAN, "no values", 0)
UNSCORED = WayPoints("mute", ALPHAS, (NONE,) * 4, (NONE,) * 4, 0)
RANDOM = tuple(way(f"random_{n}", 0.1 * n, 1.0, control=True) for n in range(1, 4))
LONG = "sae_ts on a group of eight latents, lambda 0, rotation"

STEERING_PLOTS = {
    "steering_pareto": {
        "normal": Pareto((way("caa"), way("sae_ts", 0.7, 2.0), *RANDOM), "share of French", 64),
        "many": Pareto(tuple(way(f"{LONG} {n}", 0.1 + 0.08 * n) for n in range(10)), "b", 64),
        "Japanese": Pareto((way("正解"),), "フランス語の割合", 2),
        "random alone": Pareto(RANDOM, "refusal", 64),
        "not scored": Pareto((UNSCORED,), "refusal", 64),
        "nothing": Pareto((), "refusal", 0),
    },
    "steering_scores": {
        "normal": ScoreCurves(
            (score("caa"), score("decoder", 0.3), score("random_1", 0.05, control=True)),
            "share of French", "in multiples of the mean residual norm", 64,
        ),
        "many": ScoreCurves(
            tuple(score(f"{LONG} {n}", 0.1 * n) for n in range(10)), "b", "in activation units", 9
        ),
        "nothing": ScoreCurves((), "refusal", "in activation units", 0),
    },
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
