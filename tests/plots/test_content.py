"""What the pictures show, read back from their axes."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.sparse import csr_array

from saefty.evaluation import evaluate_latents
from saefty.metrics.firing import firing_stats
from saefty.metrics.intervals import Interval
from saefty.plots.base import PLOTS
from saefty.plots.gate_curve import GateCurve
from saefty.plots.latent_ranking import LatentRanking
from saefty.plots.loss_curve import TrainingCurve
from saefty.plots.off_target import OffTarget
from saefty.plots.steer_curve import SteerCurve
from saefty.plots.steering_ways import SteeredWay, SteeredWays
from saefty.plots.token_bars import TokenBars, TokenPanel


def drawn(name, data):
    figure = Figure()
    PLOTS[name](data, figure)
    return figure


def interval(value):
    return Interval(value, value - 0.1, value + 0.05, "bootstrap", 30)


def test_the_ranking_shows_each_estimate_with_its_ends():
    data = LatentRanking(((3, interval(0.9), True), (8, interval(0.6), False)))
    ax = drawn("latent_ranking", data).axes[0]
    lines = [line.get_xdata() for line in ax.lines if len(np.atleast_1d(line.get_xdata()))]
    np.testing.assert_allclose(lines[0], [0.8, 0.95])
    np.testing.assert_allclose(lines[2], [0.5, 0.65])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["latent 3", "latent 8"]


@pytest.mark.parametrize(
    ("control", "words"), [(0.7, "1 of them clearly above"), (0.85, "none of them clearly above")]
)
def test_the_ranking_says_whether_a_control_does_as_well(control, words):
    data = LatentRanking(((3, interval(0.9), True),), (("random SAE", interval(control)),))
    assert words in drawn("latent_ranking", data).axes[0].get_title(loc="center")


def test_the_ranking_is_made_from_an_evaluation():
    rng = np.random.default_rng(0)
    harmful = np.arange(120) % 2 == 0
    z = rng.random((120, 10)) + harmful[:, None] * np.array([1.0] + [0] * 9)
    found = evaluate_latents(csr_array(z), harmful, boots=50)
    data = LatentRanking.of(found, {"raw neuron": interval(0.6)}, top=2)
    assert data.latents[0][0] == 0
    assert data.latents[0][1] == found.latents[0].auroc
    assert len(data.latents) == 2
    assert data.examples == 60


def test_the_gate_curve_names_the_fall_and_the_control():
    falls = tuple(interval(value) for value in (0.94, 0.6, 0.3))
    stays = tuple(interval(value) for value in (0.94, 0.95, 0.9))
    data = GateCurve((0, 4, 8), falls, stays, stays, stays)
    title = "Gating 8 latents: refusal of harmful prompts −64 points, control −4"
    ax = drawn("gate_curve", data).axes[0]
    assert ax.get_title(loc="center") == title
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [94, 60, 30])
    claimed = GateCurve((0, 4, 8), falls, stays, stays, stays, claim=4)
    assert "Gating 4 latents" in drawn("gate_curve", claimed).axes[0].get_title(loc="center")


def test_the_histogram_counts_every_latent_once():
    rng = np.random.default_rng(0)
    rates = np.concatenate([np.zeros(7), np.ones(5), rng.random(88) * 0.3 + 0.01])
    stats = firing_stats(csr_array((rng.random((3000, 100)) < rates).astype(float)))
    ax = drawn("firing_rate", stats).axes[0]
    heights = [bar.get_height() for bar in ax.patches]
    assert sum(heights) == 100
    assert heights[-2:] == [7, 5]


def test_the_loss_curve_ends_where_validation_ends():
    curve = TrainingCurve(
        np.arange(4), np.array([1.0, 0.5, 0.2, 0.1]), np.array([0, 3]), np.array([1.0, 0.12])
    )
    ax = drawn("loss_curve", {"layer 1": curve}).axes[0]
    assert ax.get_title(loc="center").startswith("12.0% of held-out variance")
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize(("names", "ratio"), [((), 4.0), (("layer 1", "layer 2"), 1.0)])
def test_bars_have_one_scale_in_a_picture_or_one_a_named_row(names, ratio):
    def token(value):
        return TokenPanel("a", "1 latent", np.array([7]), np.array([value]), np.zeros((1, 3)))

    data = TokenBars("", "", ((token(8.0),), (token(2.0),)), names, top_n=1)
    ax = drawn("token_bars", data).axes[0]
    first, second = (np.ptp(path.vertices[:, 0]) for path in ax.collections[0].get_paths())
    assert first / second == pytest.approx(ratio)
    words = " ".join(text.get_text() for text in ax.texts)
    assert ("Each row has its own scale" if names else "All bars have one scale") in words


def steered(scores, **fields):
    scores = tuple(interval(score) for score in scores)
    return SteerCurve((-2.0, 0.0, 2.0), scores, "French", "Method 2", **fields)


def test_the_steering_curve_says_what_is_unsteered_and_where_it_is_furthest_from_that():
    ax = drawn("steer_curve", steered([3.0, 4.0, 9.0], unit="in norms")).axes[0]
    assert ax.get_title() == "Method 2: French 4.0 unsteered, 9.0 at α = 2"
    assert ax.get_xlabel() == "alpha, in norms"
    assert ax.get_ylim()[0] < 1
    assert ax.get_ylim()[1] > 10
    falls = drawn("steer_curve", steered([1.5, 9.0, 8.0])).axes[0]
    assert "9.0 unsteered, 1.5 at α = −2" in falls.get_title()


def test_the_steering_curve_s_heading_says_nothing_of_points_with_few_scores():
    ax = drawn("steer_curve", steered([3.0, 4.0, 9.0], thin=(2.0,), replies=64)).axes[0]
    assert ax.get_title() == "Method 2: French 4.0 unsteered, 3.0 at α = −2"
    assert "mean of up to 64 replies" in {line.get_label() for line in ax.lines}
    none = drawn("steer_curve", steered([3.0, 4.0, 9.0], thin=(-2.0, 0.0, 2.0))).axes[0]
    assert "too few replies scored at every α" in none.get_title()


def test_the_steering_curve_s_heading_tells_the_other_score_at_the_same_alpha():
    """Much of a behaviour may be had at the price of all fluency."""
    data = steered([3.0, 4.0, 9.0], beside="fluency", others=(8.0, 10.0, 1.4))
    title = " ".join(drawn("steer_curve", data).axes[0].get_title().split())
    assert title == "Method 2: French 4.0 unsteered, 9.0 at α = 2, with fluency 1.4"
    none = steered([3.0, 4.0, 9.0], beside="fluency", others=(8.0, 10.0, np.nan))
    assert drawn("steer_curve", none).axes[0].get_title().endswith("9.0 at α = 2")


def steered_way(name, scores, chosen, control=False):
    whole = tuple(interval(1.0) for _ in scores)
    own = tuple(interval(score) for score in scores)
    return SteeredWay(name, (0.0, 0.5, 2.0), own, whole, own, chosen, control)


def ringed(ax):
    return [line for line in ax.lines if line.get_markersize() == 11]


@pytest.mark.parametrize("name", ["steering_pareto", "steering_scores"])
def test_the_pictures_of_a_comparison_ring_what_was_chosen_and_say_the_best(name):
    caa = steered_way("caa", (0.1, 0.4, 0.8), 2)
    ways = (caa, steered_way("idle", (0.1, 0.0, 0.0), None), steered_way("random_1", (0, 0, 0), 1,
            control=True))  # fmt: skip
    ax = drawn(name, SteeredWays(ways, "French", "in norms", 8)).axes[0]
    title = " ".join(ax.get_title().split())
    assert title == "Highest: caa at α = 2, French × coherence = 0.80 × 1.00 = 0.80; unsteered 0.10"
    rings = ringed(ax)
    assert len(rings) == 1, "neither of the way at alpha 0 nor of the random direction"
    assert not rings[0].get_clip_on(), "whole at the edge of the axes, too"
    assert float(rings[0].get_ydata()[0]) == (1.0 if name == "steering_pareto" else 0.8)
    none = drawn(name, SteeredWays(ways[1:], "French", "in norms", 8)).axes[0]
    told = " ".join(none.get_title().split())
    assert told == "No strength of any vector beats not steering"
    assert not ringed(none)


def test_the_off_target_picture_spans_what_moved_and_names_the_largest_clear_change():
    changes = ((Interval(0.2, 0.1, 0.3, "b", 9), Interval(-0.3, -0.5, -0.1, "b", 9)),)
    data = OffTarget(("caa", "sae_ts"), ("food",), changes, ((0.01, 0.04),))
    ax = drawn("off_target", data).axes[0]
    assert ax.get_xlim() == pytest.approx((-0.56, 0.56))
    title = " ".join(ax.get_title().split())
    assert title == (
        "2 of 2 changes of other attributes are clear; the largest: sae_ts, food −0.30"
    )
    none = drawn("off_target", OffTarget(("caa", "sae_ts"), ("food",), changes, ((0.5, 0.4),)))
    assert none.axes[0].get_title() == "None of 2 changes of other attributes are clear"


def test_the_steering_curve_marks_anchors_the_unsteered_score_and_thin_points():
    ax = drawn("steer_curve", steered([3.0, 4.0, 9.0], marked=(2.0,), thin=(-2.0,))).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["unsteered"].get_ydata()) == [4.0, 4.0]
    assert list(lines["α = 2"].get_xdata()) == [2.0, 2.0]
    assert list(lines["mean of the replies"].get_xdata()) == [0.0, 2.0]
    assert list(lines["too few replies scored"].get_xdata()) == [-2.0]
