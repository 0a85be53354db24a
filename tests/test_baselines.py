import numpy as np
import pytest
import torch

from saefty.baselines import (
    Labelled,
    activation_blocks,
    mean_activation,
    names_to_codes,
    pool_dense,
)
from stores import planted_store


@pytest.fixture
def store(tmp_path):
    return planted_store.make(tmp_path, counts=(5, 7, 4), layers=(0,))


DATA = Labelled(
    rows=np.array([0, 2]),
    texts=("a", "c"),
    harmful=np.array([True, False]),
    clusters=None,
    sources=None,
    n_table=3,
)


def test_only_rows_of_the_labelled_examples_are_read(store):
    blocks = list(activation_blocks(DATA, store, 0))
    assert [owner.tolist() for _, owner in blocks] == [[0] * 5, [], [1] * 4]


@pytest.mark.parametrize(("how", "expected"), [("mean", [2.0, 13.5]), ("last", [4.0, 15.0])])
def test_dense_pooling_equals_the_same_by_hand(store, how, expected):
    assert pool_dense(DATA, store, 0, how)[:, 0].tolist() == expected


def test_the_mean_activation_is_over_tokens_and_not_over_examples(store):
    rows = torch.cat([planted_store.rows_of(0, 0, 5), planted_store.rows_of(0, 12, 4)])
    np.testing.assert_allclose(mean_activation(DATA, store, 0), rows.mean(0).numpy(), rtol=1e-6)


def test_equal_names_have_equal_codes_and_the_nameless_stand_alone():
    codes = names_to_codes(["a", None, "a", None, "b"])
    assert codes[0] == codes[2]
    assert len(set(codes.tolist())) == 4
    assert names_to_codes([None, None]) is None
