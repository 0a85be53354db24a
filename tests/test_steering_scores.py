"""Scores of steered replies: means without what is missing, products, and why one is missing."""

from unittest.mock import create_autospec

import numpy as np
import pytest

from saefty.errors import ExternalError, IntegrityError
from saefty.judges.perplexity import Fluency
from saefty.judges.rating import Rating
from saefty.judges.rules import Regex
from saefty.metrics.intervals import Bootstrap
from saefty.models.base import ModelAdapter
from saefty.records import Example
from saefty.steering import PLAIN, Dose
from saefty.steering_scores import (
    judge_of,
    judged,
    points_of,
    reasons,
    share_scored,
    ten_points,
)

NAN = float("nan")
PROMPTS = [Example(str(n), "p") for n in range(4)]
STRONG = Dose("method_1", 2.0)
REPLIES = {PLAIN: ["oui", "no", "no", "no"], STRONG: ["oui", "", "...", "oui"]}


def test_the_two_scales_meet_at_both_ends():
    assert [ten_points(score) for score in (0.0, 0.5, 1.0)] == [1.0, 5.5, 10.0]


def test_missing_scores_are_left_out_of_means_and_counted():
    behaviour = {PLAIN: np.array([0.0, 0, 0, 1]), STRONG: np.array([1.0, NAN, 1, 0.4])}
    fluency = {PLAIN: np.ones(4), STRONG: np.array([0.5, NAN, NAN, 0.25])}
    plain, strong = points_of(behaviour, fluency, None, boots=100, seed=0)
    assert strong.behaviour.mean.estimate == pytest.approx((1 + 1 + 0.4) / 3)
    told = strong.behaviour.told
    assert (told.judged, told.missing) == (3, 1)
    assert (told.low, told.high) == pytest.approx((2.4 / 4, 3.4 / 4)), "the missing one 0, or 1"
    assert strong.covered(0.5)
    assert not strong.covered(0.75), "of fluency, only half is there"
    assert strong.fluency.mean.estimate == pytest.approx(0.375)
    assert strong.change.estimate == pytest.approx((1 + 1 - 0.6) / 3), "paired, without the missing"
    assert strong.product.estimate == pytest.approx(0.8 * 0.375)
    assert plain.change.estimate == 0
    assert np.isnan([plain.change.low, plain.change.high]).all(), "from itself, by definition"
    assert strong.change.low < strong.change.high
    assert share_scored([plain, strong], "behaviour") == 7 / 8
    assert share_scored([plain, strong], "fluency") == 6 / 8


def test_what_fluency_compares_with_is_1_by_definition_and_has_no_interval():
    behaviour = {PLAIN: np.array([0.0, 0, 0, 1]), STRONG: np.array([1.0, 1, 1, 0.4])}
    fluency = {PLAIN: np.array([1.0, 1, NAN, 1]), STRONG: np.ones(4)}
    plain, strong = points_of(behaviour, fluency, None, boots=100, seed=0, relative=True)
    assert (plain.fluency.mean.estimate, plain.fluency.mean.method) == (1.0, "1 by definition")
    assert np.isnan([plain.fluency.mean.low, plain.fluency.mean.high]).all()
    assert strong.fluency.mean.low < 1, "of the steered replies 1 was measured"
    assert plain.product.low < plain.product.high
    measured, _ = points_of(behaviour, fluency, None, boots=100, seed=0)
    assert measured.fluency.mean.low < 1


def test_a_dose_that_broke_counts_neither_for_nor_against_the_coverage():
    behaviour = {PLAIN: np.ones(4), STRONG: np.full(4, NAN)}
    points = points_of(behaviour, behaviour, None, boots=100, seed=0, broken={STRONG: "NaN"})
    assert [point.broken for point in points] == ["", "NaN"]
    assert share_scored(points, "behaviour") == 1.0


def test_the_product_s_interval_is_that_of_the_same_draws_for_both_means():
    rng = np.random.default_rng(0)
    behaviour, fluency = rng.random(30), rng.random(30)
    behaviour[3] = NAN
    draws = Bootstrap(30, boots=100, seed=1)
    by_hand = []
    for weights in draws.weights:
        rows = np.repeat(np.arange(30), weights.astype(int))
        by_hand.append(np.nanmean(behaviour[rows]) * fluency[rows].mean())
    found = points_of({PLAIN: behaviour}, {PLAIN: fluency}, None, boots=100, seed=1)[0].product
    assert found.estimate == pytest.approx(np.nanmean(behaviour) * fluency.mean())
    np.testing.assert_allclose((found.low, found.high), np.quantile(by_hand, [0.025, 0.975]))


def test_scores_on_disk_are_not_judged_again_and_tell_why_they_are_missing(tmp_path):
    first = judged(Regex("oui"), "behaviour", PROMPTS, REPLIES, tmp_path)
    np.testing.assert_array_equal(first[PLAIN], [1, 0, 0, 0])
    np.testing.assert_array_equal(first[STRONG], [1, NAN, 0, 1])
    again = judged(Regex("never"), "behaviour", PROMPTS, REPLIES, tmp_path)
    np.testing.assert_array_equal(again[STRONG], first[STRONG])
    assert reasons("behaviour", tmp_path) == {"empty": 1}


def test_a_judge_s_own_reasons_are_kept(tmp_path):
    class Endpoint:
        def score(self, prompts, replies):
            self.ratings = (Rating("scored", 0.25), Rating("empty"), Rating("unparsed"),
                            Rating("scored", 1.0))  # fmt: skip
            return np.array([one.score for one in self.ratings])

    found = judged(Endpoint(), "behaviour", PROMPTS, {PLAIN: ["a"] * 4}, tmp_path)
    np.testing.assert_array_equal(found[PLAIN], [0.25, NAN, NAN, 1.0])
    assert reasons("behaviour", tmp_path) == {"empty": 1, "unparsed": 1}


class Flaky:
    """Has no answer for a reply that holds `oui`, as long as it is down."""

    def __init__(self):
        self.down, self.asked = True, []

    def score(self, prompts, replies):
        self.asked.append(list(replies))
        self.ratings = tuple(
            Rating("failed", raw="503") if self.down and "oui" in reply else Rating("scored", 0.5)
            for reply in replies
        )
        return np.array([one.score for one in self.ratings])


def test_a_dose_without_an_answer_is_asked_for_again_and_no_other(tmp_path):
    replies = {PLAIN: ["no"] * 4, STRONG: ["oui", "no", "oui", "no"], Dose("b", 1.0): ["no"] * 4}
    judge = Flaky()
    words = r"no answer for 2 of 12 replies, in 1 of 3 doses \(method_1_2.0 2\)"
    with pytest.raises(ExternalError, match=words):
        judged(judge, "behaviour", PROMPTS, replies, tmp_path)
    assert len(judge.asked) == 3
    judge.down = False
    found = judged(judge, "behaviour", PROMPTS, replies, tmp_path)
    assert judge.asked[3:] == [replies[STRONG]]
    assert all((scores == 0.5).all() for scores in found.values())
    assert reasons("behaviour", tmp_path) == {}


def test_a_reply_that_changed_is_judged_anew(tmp_path, caplog):
    judged(Regex("oui"), "behaviour", PROMPTS, REPLIES, tmp_path)
    changed = {**REPLIES, STRONG: ["oui", "oui", "...", "oui"]}
    found = judged(Regex("oui"), "behaviour", PROMPTS, changed, tmp_path)
    np.testing.assert_array_equal(found[STRONG], [1, 1, 0, 1])
    assert "method_1_2.0.jsonl holds the scores of other replies" in caplog.text


def test_a_score_that_compares_belongs_to_the_model_s_own_reply_too(tmp_path):
    class Same:
        def __init__(self, unsteered):
            self.unsteered = unsteered

        def score(self, prompts, replies):
            return np.array([float(a == b) for a, b in zip(replies, self.unsteered, strict=True)])

    replies = {STRONG: ["a", "b", "c", "d"]}
    for own in (["a", "x", "x", "x"], ["a", "b", "x", "x"]):
        found = judged(Same(own), "fluency", PROMPTS, replies, tmp_path)
        assert found[STRONG].sum() == 4 - own.count("x")


def test_scores_of_other_prompts_are_refused(tmp_path):
    judged(Regex("oui"), "behaviour", PROMPTS, REPLIES, tmp_path)
    others = [Example(f"x{n}", "p") for n in range(4)]
    with pytest.raises(IntegrityError, match="scores of other prompts"):
        judged(Regex("oui"), "behaviour", others, REPLIES, tmp_path)


def test_a_judge_that_compares_gets_the_model_s_own_replies():
    model = create_autospec(ModelAdapter, instance=True)
    judge = judge_of("perplexity", {}, "steer.fluency", model, ["a", "b"])
    assert isinstance(judge, Fluency)
    assert judge.unsteered == ("a", "b")
    assert isinstance(judge_of("regex", {"pattern": "x"}, "steer.judge", model, []), Regex)
