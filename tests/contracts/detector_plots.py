"""Samples for the pictures of a comparison of detectors."""

import numpy as np

from saefty.metrics.calibration import calibration
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.plots.categories import Categories
from saefty.plots.detectors import Detectors
from saefty.plots.left_out_sources import LeftOutSources
from saefty.plots.reliability import Reliability

NAN = float("nan")
FAMILIES = ("SAE latents", "dense activations", "64 latents", "1 latent", "bag of words")


def interval(value, half=0.06):
    return Interval(value, value - half, min(value + half, 1.0), "bootstrap", 40)


def detectors(n, balanced=True, value=0.9):
    areas = tuple(interval(value - 0.06 * i) for i in range(n))
    worse = tuple(i > 1 for i in range(n))
    return Detectors(FAMILIES[:n], areas, areas[::-1] if balanced else None, worse, 306)


def measured(seed, sure=1.0, n=200):
    rng = np.random.default_rng(seed)
    scores = sure * rng.normal(size=n)
    return calibration(scores, rng.random(n) < 0.5, 0.0, Bootstrap(n, boots=20))


def sources(left_out, within):
    names = ("ShareGPT", "日本語データ / 한국어 / Русский набор данных, длинное", "c")
    return LeftOutSources(names[: len(left_out[0])], FAMILIES[: len(left_out)], left_out, within)


BOTH = (interval(0.9), interval(0.7), interval(0.4))
DETECTOR_PLOTS = {
    "detectors": {
        "normal": detectors(5),
        "one training set": detectors(5, balanced=False),
        "one detector": detectors(1),
        "no interval": Detectors(("a",), (Interval(0.7, NAN, NAN, "", 1),), None, (False,), 3),
        "far below chance": detectors(4, value=0.3),
        "none": detectors(0),
    },
    "reliability": {
        "normal": Reliability(FAMILIES, tuple(measured(i, 1.0 + i) for i in range(5))),
        "one": Reliability(("SAE latents",), (measured(0),)),
        "always sure": Reliability(("a", "b"), (measured(0, 50.0), measured(1, 0.0))),
        "two examples": Reliability(("a",), (measured(3, n=2),)),
        "none": Reliability((), ()),
    },
    "left_out_sources": {
        "normal": sources((BOTH, BOTH[::-1], BOTH, BOTH), (BOTH[::-1], BOTH, BOTH, BOTH)),
        "one label in one": sources(((interval(0.8), None),), ((interval(0.9), None),)),
        "none in the test": sources((BOTH,), ((None, None, None),)),
        "no interval": sources(((Interval(0.4, NAN, NAN, "", 1),),), ((None,),)),
        "one label everywhere": sources(((None, None),), ((None, None),)),
    },
    "categories": {
        "normal": Categories(
            ("violence", "a category of quite a long name indeed", "無題 / 범주 / раздел"),
            FAMILIES,
            np.linspace(0, 1, 15).reshape(3, 5),
            (12, 1234, 2),
        ),
        "one": Categories(("a",), ("SAE latents",), np.array([[0.5]]), (3,)),
        "not measured": Categories(("a", "b"), ("SAE latents",), np.array([[NAN], [1.0]]), (4, 5)),
        "none": Categories((), (), np.zeros((0, 0)), ()),
    },
}
