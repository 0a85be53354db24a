"""The linear detector against scikit-learn, and by hand."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from saefty.errors import MismatchError, NumericError
from saefty.linear import Linear, probability


def by_hand(**changes) -> Linear:
    """Return 2 (x1 - 1) / 4 - 3 x3 / 2 + 0.5 over rows of four columns."""
    parts = {
        "columns": [1, 3],
        "center": [1.0, 0.0],
        "scale": [4.0, 2.0],
        "weights": [2.0, -3.0],
        "bias": 0.5,
        "width": 4,
    }
    parts |= changes
    arrays = {key: np.array(parts.pop(key)) for key in ("columns", "center", "scale", "weights")}
    return Linear(**arrays, **parts)


ROWS = np.array([[9.0, 5.0, 9.0, 2.0], [0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 9.0, 0.0]])


def test_log_odds_are_the_weighted_sum_of_what_is_read():
    assert by_hand().score(ROWS).tolist() == [-0.5, 0.0, 0.5]


def test_sparse_rows_score_as_dense_ones():
    assert by_hand().score(csr_array(ROWS)) == pytest.approx(by_hand().score(ROWS), abs=1e-15)


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_are_scikit_learns(sparse):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 5.0, (300, 20)) * (rng.random((300, 20)) < 0.4)
    harmful = x[:, 2] + rng.normal(size=300) > 1
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=0.5).fit(scaler.transform(x), harmful)
    linear = Linear(
        np.arange(20), scaler.mean_, scaler.scale_, model.coef_[0], float(model.intercept_[0]), 20
    )
    given = csr_array(x) if sparse else x
    assert linear.score(given) == pytest.approx(
        model.decision_function(scaler.transform(x)), rel=1e-10, abs=1e-10
    )
    assert linear.probability(given) == pytest.approx(
        model.predict_proba(scaler.transform(x))[:, 1], rel=1e-10
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_a_rows_score_does_not_depend_on_the_rows_beside_it(sparse):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4099, 301))
    linear = Linear(np.arange(301), *(np.abs(rng.normal(size=(3, 301))) + 0.1), bias=0.3, width=301)
    form = csr_array if sparse else np.asarray
    together = linear.score(form(x))
    alone = np.concatenate([linear.score(form(x[i : i + 1])) for i in range(0, 4099, 50)])
    assert (together[::50] == alone).all()
    order = rng.permutation(4099)
    assert (linear.score(form(x[order])) == together[order]).all()


def test_a_detector_without_columns_gives_its_bias():
    linear = Linear(np.zeros(0, dtype=int), *np.zeros((3, 0)), bias=-1.5, width=4)
    assert linear.score(ROWS).tolist() == [-1.5, -1.5, -1.5]
    assert linear.score(csr_array(ROWS)).tolist() == [-1.5, -1.5, -1.5]


def test_no_rows_have_no_scores():
    assert by_hand().score(np.zeros((0, 4))).shape == (0,)


def test_probabilities_of_far_log_odds_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        found = probability(np.array([-800.0, -2.0, 0.0, 2.0, 800.0, np.nan]))
    assert found[:5] == pytest.approx([0.0, 1 / (1 + np.e**2), 0.5, 1 / (1 + np.e**-2), 1.0])
    assert np.isnan(found[5])


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_of_another_width_are_refused_with_both_widths(sparse):
    x = csr_array(ROWS[:, :3]) if sparse else ROWS[:, :3]
    with pytest.raises(MismatchError, match="4 columns, but these have 3"):
        by_hand().score(x)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_where_they_are_read(sparse, bad):
    form = csr_array if sparse else np.asarray
    unread, read = ROWS.copy(), ROWS.copy()
    unread[0, 0], read[0, 1] = bad, bad
    assert by_hand().score(form(unread)).tolist() == pytest.approx([-0.5, 0.0, 0.5])
    with pytest.raises(NumericError, match="1 of 3 rows"):
        by_hand().score(form(read))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weights": [np.nan, 1.0]}, "1 of 2 values of weights are NaN"),
        ({"center": [np.inf, 1.0]}, "center are NaN or infinite"),
        ({"bias": np.nan}, "the bias is nan"),
        ({"scale": [0.0, 1.0]}, "a scale is 0.0"),
        ({"columns": [-1, 3]}, "columns -1 to 3 do not lie in range"),
        ({"columns": [1, 4]}, "columns 1 to 4 do not lie in range"),
        ({"columns": [3, 1]}, "do not lie|not ascending"),
        ({"columns": [1, 1]}, "not ascending, each once"),
        ({"width": -1}, "the width is -1"),
    ],
)
def test_parts_that_make_no_detector_are_refused(changes, what):
    with pytest.raises(ValueError, match=what):
        by_hand(**changes)
