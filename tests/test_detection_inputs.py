"""The inputs of detectors: what is pooled, counted and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from saefty import baselines
from saefty.baselines import Labelled, pool_dense
from saefty.detection import inputs
from saefty.detection.inputs import (
    OVER,
    check_same_tokens,
    dense_inputs,
    random_inputs,
    word_input,
)
from saefty.errors import InputError, MismatchError, NumericError
from saefty.stores.features import FeatureStore
from stores import planted_store

DATA = Labelled(
    rows=np.array([0, 1]),
    texts=("a", "b"),
    harmful=np.array([True, False]),
    clusters=None,
    sources=None,
    n_table=3,
)


@pytest.mark.parametrize("how", OVER)
def test_dense_pooling_over_several_blocks_equals_the_same_by_hand(how, tmp_path, monkeypatch):
    store = planted_store.make(tmp_path)
    x = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    owner = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    blocks = [(x[:3], owner[:3]), (x[3:7], owner[3:7]), (x[7:], owner[7:])]
    monkeypatch.setattr(baselines, "activation_blocks", lambda *_: iter(blocks))
    by_hand = {"max": np.max, "mean": np.mean, "last": lambda rows, axis: rows[-1]}[how]
    expected = [by_hand(x[owner == i], axis=0) for i in (0, 1)]
    np.testing.assert_allclose(pool_dense(DATA, store, 0, how), expected, rtol=1e-6)


def test_an_example_without_a_token_has_zeros_however_it_is_pooled(tmp_path):
    store = planted_store.make(tmp_path, counts=(5, 4), layers=(0,), examples=(0, 2))
    for how in OVER:
        assert pool_dense(DATA, store, 0, how)[1].tolist() == [0.0, 0.0, 0.0]


def test_activations_that_overflow_are_refused_with_their_layer_and_count(tmp_path):
    store = planted_store.make(tmp_path, layers=(200,), dtype=torch.float16)
    with pytest.raises(NumericError, match="layer 200 of 2 of 2 examples hold NaN or infinity"):
        dense_inputs(store, DATA, [200], ["mean"])


def test_words_are_counted_by_hand():
    found = word_input(["Pay, then steal steal", "pay"])
    assert found.vocabulary == ("pay", "steal", "then")
    assert found.rows.toarray().tolist() == [[1, 2, 1], [1, 0, 0]]


def test_texts_without_words_are_refused():
    with pytest.raises(InputError, match="none of the 2 texts holds a word"):
        word_input(["?!", "…"])


class Codes(FeatureStore):
    """Features of the tokens of `planted_store`: two latents fire on each, in example 1 all six."""

    folder, n_tokens = Path("codes"), 16

    def __init__(self):
        pass

    def tokens(self):
        return {"example": np.repeat([0, 1, 2], [5, 7, 4])}

    def chunks(self, layer):
        fires = np.tile([True, True, False, False, False, False], (16, 1))
        fires[5:12] = True
        yield csr_array(fires[:9].astype(np.float32))
        yield csr_array(fires[9:].astype(np.float32))

    def signed(self, layer):
        return False

    def d_sae(self, layer):
        return 6


@pytest.mark.parametrize(("train", "k"), [((True, False), 2), ((False, True), 6)])
def test_a_random_sae_has_l0_and_centre_of_the_training_side(train, k, tmp_path, monkeypatch):
    store = planted_store.make(tmp_path, layers=(0,))
    given = []

    def noting(blocks, n, **settings):
        given.append(settings)
        return csr_array((n, 6), dtype=np.float32)

    monkeypatch.setattr(inputs, "random_sae", noting)
    random_inputs(store, Codes(), DATA, [0], ["mean"], 0, train=np.array(train))
    assert given[0]["k"] == k
    own = slice(0, 5) if train[0] else slice(5, 12)
    rows = planted_store.rows_of(0, 0, 16)[own].numpy()
    np.testing.assert_allclose(given[0]["center"], rows.mean(axis=0), rtol=1e-6)


def test_activations_read_again_of_more_tokens_than_the_features_are_refused(tmp_path):
    store = planted_store.make(tmp_path, counts=(5, 7, 5))
    with pytest.raises(MismatchError, match="have 17 tokens; the features in codes hold 16") as e:
        check_same_tokens(Codes(), store)
    assert "set probe.store" in str(e.value)
