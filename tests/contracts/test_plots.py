"""What every plot must do, on ordinary and on degenerate data; a new one adds its samples here."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.sparse import csr_array

from contracts.code_plots import CODE_PLOTS
from contracts.detector_plots import DETECTOR_PLOTS
from contracts.latent_plots import LATENT_PLOTS
from contracts.sandbox_plots import SANDBOX_PLOTS
from contracts.steering_plots import STEERING_PLOTS
from saefty.metrics.firing import firing_stats
from saefty.metrics.intervals import Interval
from saefty.plots.base import PLOTS, save_plot
from saefty.plots.composition import Composition
from saefty.plots.data_matrix import DataMatrix
from saefty.plots.gate_curve import GateCurve
from saefty.plots.latent_ranking import LatentRanking
from saefty.plots.length_histogram import Lengths
from saefty.plots.loss_curve import TrainingCurve
from saefty.plots.nnz_histogram import LatentCounts
from saefty.plots.steer_curve import SteerCurve
from saefty.plots.token_bars import TokenBars, TokenPanel

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


def steering(alphas, scores, **fields):
    return SteerCurve(
        tuple(alphas), tuple(interval(one, 0.4) for one in scores), "refusal", "Method 1", **fields
    )


def matrix(rows, columns):
    values = np.arange(rows * columns, dtype=float).reshape(rows, columns) ** 2
    return DataMatrix(
        "d",
        tuple(f"source {i}" for i in range(rows)),
        tuple(f"a category of a long name {i}" for i in range(columns)),
        values + (rows * columns == 1),
        "examples",
    )


def codes(rate, tokens=2000, latents=300):
    rng = np.random.default_rng(0)
    return firing_stats(csr_array((rng.random((tokens, latents)) < rate).astype(float)))


def curve(n, value=0.2):
    steps = np.arange(n) * 10
    return TrainingCurve(steps, np.linspace(1, value, n), steps[::5], np.linspace(1, value, n)[::5])


def panel(title, n=10, value=3.0):
    ids = np.arange(n) * 3277
    colours = np.full((n, 3), 0.8)
    return TokenPanel(title, f"token 4 · {n} latents", ids, value * 0.8 ** np.arange(n), colours)


def bars(*rows, names=(), text="Yes, it is. 東京 서울 Москва 😀"):
    return TokenBars("Layer 3 · sentence 12", text, rows, names)


SAMPLES = {
    "data_matrix": {
        "normal": matrix(4, 6),
        "one source, no category": matrix(1, 1),
        "letters of the world": replace(
            matrix(3, 2), sources=("日本語データ", "한국어 자료", "Русский набор")
        ),
        "means": replace(
            matrix(3, 2),
            values=np.array([[NAN, 1.5], [0.0, 12345.6], [2, 3]]),
            form="decimal",
            scale="linear",
        ),
        "more than are shown": matrix(22, 21),
        "nothing": replace(matrix(2, 2), values=np.zeros((2, 2))),
    },
    "length_histogram": {
        "normal": Lengths("d", np.arange(300) % 97, "characters"),
        "a long tail": Lengths("d", np.r_[np.arange(200), 10**7], "tokens"),
        "all alike": Lengths("d", np.full(9, 7), "words"),
        "one empty text": Lengths("d", np.zeros(1, dtype=int), "characters"),
        "no example": Lengths("d", np.zeros(0, dtype=int), "characters"),
    },
    "composition": {
        "normal": Composition("d", {"a": 59369, "無": 79}, {"a": 86138752, "無": 35169}, "tokens"),
        "one source": Composition("d", {"a": 3}, {"a": 0}, "characters"),
        "many": Composition(
            "d", {f"s{i}": i for i in range(30, 0, -1)}, {f"s{i}": 1 for i in range(31)}, "words"
        ),
        "no example": Composition("d", {}, {}, "characters"),
    },
    "token_bars": {
        "normal": bars((panel("␣Paris"), panel("東京", 3)), (panel("<E6 9D>"), None)),
        "layers": bars(
            (panel("は"),), (panel("서울", value=20000),), names=("layer 2", "layer 10")
        ),
        "long": bars((panel("x" * 90), panel("東" * 60)), text="Much text, 東京は。 " * 90),
        "mathematics": bars((panel("$x$"), panel("a_b^c\\")), text="$\\frac{1}{$"),
        "no latent": bars((panel("the", 0),)),
        "no token": bars(text=""),
        "no value": bars((panel("the", 2, value=0.0), panel("of", 2, value=-2.0))),
    },
    "nnz_histogram": {
        "normal": LatentCounts("Layer 3", np.random.default_rng(0).poisson(40, 2000)),
        "always the same": LatentCounts("Layer 3", np.full(34, 24)),
        "silent": LatentCounts("Layer 3", np.array([0, 0, 1])),
        "wide": LatentCounts("Layer 3", np.array([1, 40_000])),
        "no token": LatentCounts("Layer 3", np.zeros(0, np.int64)),
    },
    "latent_ranking": {
        "normal": ranking(15),
        "nothing found": ranking(5, found=False),
        "no latent": ranking(0),
        "one latent, no control": ranking(1, controls=False),
        "no interval": LatentRanking(((7, Interval(0.6, NAN, NAN, "", 1), False),)),
    },
    "steer_curve": {
        "normal": steering(
            np.linspace(-300, 300, 21),
            np.linspace(1, 9, 21),
            unit="in activation units",
            marked=(122.0, -60.0),
            thin=(0.0, 300.0),
        ),
        "a gap": steering([-2, 0, 2], [NAN, 3.0, 5.0], thin=(-2,)),
        "nothing scored": steering([-2, 0, 2], [NAN] * 3),
        "all the same": steering([-2, 0, 2], [4.0] * 3),
        "no alpha": steering([], []),
        "letters of the world": replace(
            steering([0, 2], [1.0, 9.0]), what="日本語の使用 / 한국어 / французский язык"
        ),
    },
    "gate_curve": {
        "normal": gate([0, 1, 2, 4, 8, 16]),
        "without fluency": gate([0, 1, 8], fluency=False),
        "one count": gate([0]),
        "nothing gated": gate([]),
        "fewer controls": replace(
            gate([0, 1, 8]),
            target_harmful=(interval(0.9), interval(0.5), interval(0.2)),
            control_harmful=(interval(0.9),) * 2,
            control_harmless=(interval(0.1),) * 2,
            control_fluency=(interval(0.9),) * 2,
        ),
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
SAMPLES |= CODE_PLOTS | STEERING_PLOTS | DETECTOR_PLOTS | LATENT_PLOTS | SANDBOX_PLOTS
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
    paper = pixels[0, 0]
    assert paper > 230 or paper < 25
    assert np.abs(pixels - paper).max() > 55
    assert (np.abs(border - paper) < 25).all()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_axes_say_what_they_measure(name, case):
    figure = Figure()
    PLOTS[name](SAMPLES[name][case], figure)
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    for ax in figure.axes:
        assert not ax.axison or ax.get_ylabel()
    assert not axes[-1].axison or axes[-1].get_xlabel()


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
