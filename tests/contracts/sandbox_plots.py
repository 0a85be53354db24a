"""Samples for the pictures of the sandbox."""

import numpy as np

from saefty.metrics.intervals import Interval
from saefty.plots.contrast_bars import Bar, Cell, ContrastBars

NAN = float("nan")


def interval(value, half=0.05):
    return Interval(value, value - half, min(value + half, 1.0), "bootstrap", 40)


def bars(*values):
    kinds = ("alone", "off", "on", "delta", "latents")
    return tuple(
        Bar(kinds[i % 5], f"group {i // 2}", f"row {i}", interval(value))
        for i, value in enumerate(values)
    )


def cells(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(n, 32, 32, 3), dtype=np.uint8)
    return tuple(Cell(image, "lighthouse", i % 3 > 0) for i, image in enumerate(images))


SANDBOX_PLOTS = {
    "contrast_bars": {
        "normal": ContrastBars(
            "Neither alone", bars(0.5, 0.49, 0.51, 0.98, 1.0, 0.75), cells(4), 256
        ),
        "without examples": ContrastBars("Neither alone", bars(0.5, 0.9), (), 256),
        "far below chance": ContrastBars("Below", bars(0.1, 0.5), cells(1), 3),
        "letters of the world": ContrastBars(
            "日本語 / 한국어 / Русский",
            (Bar("on", "묶음", "состояние 状態 " * 6, interval(0.7)),),
            (Cell(np.zeros((5, 9, 3), np.uint8), "とても長い言葉がここに立つ", True),),
            12,
        ),
        "no interval": ContrastBars(
            "One", (Bar("on", "g", "a", Interval(0.6, NAN, NAN, "", 1)),), (), 4
        ),
        "none": ContrastBars("Nothing", ()),
    },
}
