"""Means of scores of which some are missing."""

import numpy as np
import pytest

from saefty.errors import InputError
from saefty.judges.coverage import coverage, require_coverage


def test_missing_scores_are_left_out_of_the_mean_and_bound_it():
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    scores[rng.random(200) < 0.1] = np.nan
    found = coverage(scores)
    assert found.mean == pytest.approx(np.nanmean(scores), abs=1e-12)
    assert found.low == pytest.approx(np.nan_to_num(scores, nan=0.0).mean(), abs=1e-12)
    assert found.high == pytest.approx(np.nan_to_num(scores, nan=1.0).mean(), abs=1e-12)
    assert (found.judged, found.total) == (int((~np.isnan(scores)).sum()), 200)
    assert found.missing == int(np.isnan(scores).sum())
    assert found.share == found.judged / 200


def test_without_missing_scores_the_bounds_are_the_mean():
    found = coverage(np.array([0.0, 1.0, 0.5]))
    assert found.low == found.high == found.mean == 0.5
    assert str(found) == "0.500 of 3"


def test_no_scores_at_all_bound_nothing():
    found = coverage(np.array([np.nan, np.nan]))
    assert np.isnan(found.mean)
    assert (found.low, found.high, found.share) == (0.0, 1.0, 0.0)
    assert coverage(np.array([])).share == 0.0


def test_a_score_beyond_0_and_1_is_a_mistake_of_its_judge():
    with pytest.raises(ValueError, match=r"outside 0 to 1: 0.5 to 7.0"):
        coverage(np.array([7.0, 0.5]))


@pytest.mark.parametrize(("judged", "total"), [(95, 100), (100, 100), (19, 20), (1, 1)])
def test_a_picture_is_drawn_from_95_in_100(judged, total):
    require_coverage(judged, total)


@pytest.mark.parametrize(("judged", "total"), [(94, 100), (90, 100), (18, 20), (0, 1), (0, 0)])
def test_ten_in_a_hundred_missing_are_too_many_for_a_picture(judged, total):
    with pytest.raises(InputError, match=f"{judged} of {total} replies have a score") as error:
        require_coverage(judged, total, what="the curve of French")
    assert "the curve of French needs 95%" in str(error.value)


def test_another_share_can_be_asked_for():
    require_coverage(5, 10, 0.5)
    with pytest.raises(InputError, match=r"\(40.0%\); this picture needs 50%"):
        require_coverage(4, 10, 0.5)
