import numpy as np
import pytest
from scipy.sparse import csc_array, csr_array
from scipy.stats import rankdata

from saefty.errors import NumericError
from saefty.metrics import base


def sparse_columns(rows=60, columns=40, seed=0, signed=False):
    """Columns with many zeros and many ties; the first never fires, the second is constant."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 4, (rows, columns)) * (rng.random((rows, columns)) < 0.4) * 0.5
    if signed:
        z = z * rng.choice([-1, 1], (rows, columns))
    z[:, 0], z[:, 1] = 0.0, 0.1
    return z


@pytest.mark.parametrize("signed", [False, True])
def test_ranks_equal_scipys_on_columns_with_zeros_and_ties(signed):
    z = sparse_columns(signed=signed)
    ranked = base.rank_columns(base.as_columns(z))
    ranks = ranked.above_zeros.toarray() + ranked.zero_rank
    np.testing.assert_array_equal(ranks, rankdata(z, axis=0))


def test_tie_term_counts_the_zeros_as_one_run():
    z = np.array([[0.0], [0.0], [0.0], [2.0], [2.0]])  # runs of 3 and 2: 27 - 3 + 8 - 2
    assert base.rank_columns(base.as_columns(z)).ties.tolist() == [30.0]


def test_blocks_cover_every_column_once(monkeypatch):
    monkeypatch.setattr(base, "BLOCK_VALUES", 50)
    monkeypatch.setattr(base, "BLOCK_COLUMNS", 7)
    columns = base.as_columns(sparse_columns())
    blocks = list(base.column_blocks(columns))
    assert len(blocks) > 5
    assert np.concatenate([np.arange(40)[where] for where, _ in blocks]).tolist() == list(range(40))
    np.testing.assert_array_equal(
        np.hstack([block.toarray() for _, block in blocks]), columns.toarray()
    )


def test_a_column_larger_than_a_block_is_still_walked(monkeypatch):
    monkeypatch.setattr(base, "BLOCK_VALUES", 2)
    columns = base.as_columns(np.ones((5, 3)))
    assert [where for where, _ in base.column_blocks(columns)] == [
        slice(0, 1),
        slice(1, 2),
        slice(2, 3),
    ]


def test_stored_zeros_and_duplicates_do_not_count_as_firing():
    z = csr_array(([0.0, 1.0, 1.0], [0, 1, 1], [0, 3]), shape=(1, 2))
    columns = base.as_columns(z)
    assert columns.nnz == 1
    assert columns.toarray().tolist() == [[0.0, 2.0]]
    assert base.firing(z).tolist() == [False, True]


def test_the_callers_matrix_is_left_as_it_was():
    z = csc_array(([0.0, 1.0], [0, 1], [0, 2]), shape=(2, 1))
    base.as_columns(z)
    assert z.nnz == 2


def test_a_latent_fires_above_eps():
    z = np.array([[0.5, 2.0], [1.0, 0.0]])
    assert base.firing(z, eps=1.0).tolist() == [False, True]


def test_nan_is_refused_and_counted():
    with pytest.raises(NumericError, match="1 of 2 pooled latents are NaN"):
        base.as_columns(np.array([[np.nan, 1.0]]))


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 examples but 3 group codes"):
        base.group_codes(np.arange(3), 4)


def test_without_groups_every_example_is_its_own():
    assert base.group_codes(None, 3).tolist() == [0, 1, 2]
    assert base.group_codes(np.array([7, 3, 7]), 3).tolist() == [1, 0, 1]


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 rows of latents but 3 labels"):
        base.check_labels(np.array([True, True, False]), 4)
