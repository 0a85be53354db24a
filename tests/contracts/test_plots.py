"""What every plot must do, on ordinary and on degenerate data; a new one adds its samples here."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.sparse import csr_array

from saefty.metrics.firing import firing_stats
from saefty.metrics.intervals import Interval
from saefty.plots.base import PLOTS, save_plot
from saefty.plots.gate_curve import GateCurve
from saefty.plots.latent_ranking import LatentRanking
from saefty.plots.loss_curve import TrainingCurve

NAN = float("nan")


def interval(value, half=0.05):
    return Interval(value, value - half, value + half, "bootstrap", 40)


def ranking(n, found=True, controls=True):
    rest = (("random SAE", interval(0.7)), ("無作為 / 무작위 / случайно", interval(0.5)))
    return LatentRanking(
        tuple((i * 1000, interval(0.9 - 0.02 * i), found) for i in range(n)),
        rest if controls else (),
        128,
    )


def gate(counts, fluency=True, value=0.9):
    line = tuple(interval(value) for _ in counts)
    return GateCurve(tuple(counts), *[line] * 4, *[line if fluency else ()] * 2)


def codes(rate, tokens=2000, latents=300):
    rng = np.random.default_rng(0)
    return firing_stats(csr_array((rng.random((tokens, latents)) < rate).astype(float)))


def curve(n, value=0.2):
    steps = np.arange(n) * 10
    return TrainingCurve(steps, np.linspace(1, value, n), steps[::5], np.linspace(1, value, n)[::5])


SAMPLES = {
    "latent_ranking": {
        "normal": ranking(15),
        "nothing found": ranking(5, found=False),
        "no latent": ranking(0),
        "one latent, no control": ranking(1, controls=False),
        "no interval": LatentRanking(((7, Interval(0.6, NAN, NAN, "", 1), False),)),
    },
    "gate_curve": {
        "normal": gate([0, 1, 2, 4, 8, 16]),
        "without fluency": gate([0, 1, 8], fluency=False),
        "one count": gate([0]),
        "nothing gated": gate([]),
        "not judged": gate([0, 8], value=NAN),
    },
    "firing_rate": {
        "normal": codes(10 ** np.random.default_rng(1).normal(-2.5, 0.8, 300)),
        "dead": codes(0.0),
        "dense": codes(1.0),
        "one token": codes(0.1, tokens=1),
        "no token": codes(0.1, tokens=0),
    },
    "loss_curve": {
        "normal": {"layer 2": curve(200)},
        "several": {f"layer {i}": curve(50, 0.1 + 0.02 * i) for i in range(9)},
        "one step": {"layer 2": curve(1)},
        "no step": {},
        "without validation": {"layer 2": TrainingCurve(np.arange(5), np.linspace(1, 0.5, 5))},
        "not finite": {"layer 2": TrainingCurve(np.arange(3), np.array([1.0, NAN, NAN]))},
    },
}
CASES = [(name, case) for name, cases in SAMPLES.items() for case in cases]


def test_every_plot_has_samples():
    assert set(PLOTS) == set(SAMPLES)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_it_is_drawn_without_warning_and_nothing_is_cut_off(name, case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save_plot(name, SAMPLES[name][case], tmp_path / f"{name}.png", dpi=60)
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert pixels.min() < 200
    assert (border > 230).all()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_axes_say_what_they_measure(name, case):
    figure = Figure()
    PLOTS[name](SAMPLES[name][case], figure)
    for ax in figure.axes:
        assert not ax.axison or ax.get_ylabel()
    assert not figure.axes[-1].axison or figure.axes[-1].get_xlabel()


@pytest.mark.parametrize("name", list(SAMPLES))
def test_the_same_data_write_the_same_bytes(name, tmp_path):
    for file in ("a.png", "b.png"):
        save_plot(name, SAMPLES[name]["normal"], tmp_path / file, dpi=60)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_plot_leaves_the_callers_settings_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    save_plot("loss_curve", SAMPLES["loss_curve"]["normal"], tmp_path / "a.png", dpi=60)
    assert dict(mpl.rcParams) == before
