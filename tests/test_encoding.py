"""Rows become sparse codes: against the dense latents, from any source of pieces."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saefty import fsio
from saefty.encoding import check_saes, encode_rows, stored_pieces, write_features
from saefty.errors import MismatchError
from saefty.records import Site
from saefty.sae_sets import SaeRecord
from saefty.saes.base import SaeConfig
from saefty.stores.base import EXAMPLES
from stores import planted_store


@pytest.fixture
def saes():
    torch.manual_seed(0)
    return {layer: SaeConfig("topk", planted_store.D_IN, 8, 2).build() for layer in (0, 2)}


def features(folder, store, saes):
    fsio.commit_text(folder / EXAMPLES, (store.folder / EXAMPLES).read_text())
    return write_features(
        folder,
        "fingerprint",
        lambda done: stored_pieces(store, sorted(saes), done),
        saes,
        model_name="m",
        extra=[EXAMPLES],
    )


def test_a_code_is_the_dense_latents_without_their_zeros(saes):
    x = torch.randn(50, planted_store.D_IN)
    code = encode_rows(saes[0], x)
    dense = saes[0].encode(x).detach().numpy()
    found = np.zeros_like(dense)
    rows = np.repeat(np.arange(50), np.diff(code["indptr"]))
    found[rows, code["ids"]] = code["values"]
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-6)
    assert (code["values"] > 0).all()


def test_values_descend_within_each_row(saes):
    code = encode_rows(saes[0], torch.randn(50, planted_store.D_IN))
    for start, end in zip(code["indptr"], code["indptr"][1:], strict=False):
        assert (np.diff(code["values"][start:end]) <= 0).all()


def test_no_rows_give_an_empty_code(saes):
    code = encode_rows(saes[0], torch.zeros(0, planted_store.D_IN))
    assert code["indptr"].tolist() == [0]
    assert len(code["ids"]) == len(code["values"]) == 0


def test_a_store_is_encoded_row_by_row_in_every_layer(tmp_path, saes):
    store = planted_store.make(tmp_path / "x")
    found = features(tmp_path / "f", store, saes)
    assert found.layers == (0, 2)
    for layer, sae in saes.items():
        x = torch.cat(list(store.batches(layer, 100)))
        np.testing.assert_allclose(
            found.csr(layer).toarray(), sae.encode(x).detach(), rtol=1e-4, atol=1e-4
        )
    np.testing.assert_array_equal(found.tokens()["example"], store.rows()["example"])
    assert found.manifest["masked"] == {}


def test_poolings_agree_with_the_dense_latents(tmp_path, saes):
    store = planted_store.make(tmp_path / "x")
    found = features(tmp_path / "f", store, saes)
    dense, owner = found.csr(0).toarray(), found.tokens()["example"]
    for how, pool in {
        "max": lambda z: z.max(axis=0),
        "mean": lambda z: z.mean(axis=0),
        "sum": lambda z: z.sum(axis=0),
        "last": lambda z: z[-1],
    }.items():
        wanted = np.stack([pool(dense[owner == i]) for i in range(3)])
        np.testing.assert_allclose(found.pooled(0, how).toarray(), wanted, rtol=1e-5)


def test_an_example_that_is_cut_between_two_pieces_is_pooled_as_one(tmp_path, saes):
    store = planted_store.make(tmp_path / "x", counts=(4, 4), examples=(0, 0))
    found = features(tmp_path / "f", store, saes)
    dense = found.csr(0).toarray()
    for how, wanted in {
        "max": dense.max(axis=0), "mean": dense.mean(axis=0), "sum": dense.sum(axis=0),
        "last": dense[-1],
    }.items():  # fmt: skip
        np.testing.assert_allclose(found.pooled(0, how).toarray()[0], wanted, rtol=1e-5)


def test_pieces_that_are_done_are_left_out(tmp_path):
    store = planted_store.make(tmp_path)
    assert [piece.index for piece in stored_pieces(store, [0], done={0, 2})] == [1]


def test_an_sae_of_another_width_is_refused_with_both_numbers(saes):
    with pytest.raises(MismatchError, match=r"layer 0 reads activations 3 wide.*of m are 4 wide"):
        check_saes(saes, 4, "m")


WIDTHS = (2, 3, 5)


@pytest.mark.parametrize("d_in", WIDTHS)
@pytest.mark.parametrize("d_model", WIDTHS)
def test_every_pair_of_an_sae_and_a_model_fits_or_is_refused_with_both_widths(d_in, d_model):
    zoo = {3: SaeConfig("topk", d_in, 8, 2).build()}
    if d_in == d_model:
        check_saes(zoo, d_model, "the model")
        return
    words = f"layer 3 reads activations {d_in} wide, but those of the model are {d_model} wide"
    with pytest.raises(MismatchError, match=words) as error:
        check_saes(zoo, d_model, "the model")
    assert "an SAE that was trained on this model" in error.value.then


DELTA = {"method": "zero_attention", "scope": "per_layer"}
OTHER = {"method": "knockout", "scope": "joint"}
UNKNOWN = {"method": "unknown", "scope": "unknown"}


def sae_of(contrast):
    sae = SaeConfig("topk", 3, 8, 2).build()
    sae.metadata = {} if contrast is None else {"contrast": contrast}
    return sae


def records_of(sae):
    return {0: SaeRecord.of(sae, Site(0))}


@pytest.mark.parametrize("form", [lambda sae: {0: sae}, records_of])
@pytest.mark.parametrize(
    ("trained", "read", "words"),
    [
        (DELTA, None, "was trained on contrasts .*zero_attention, per_layer.*m is plain"),
        (None, DELTA, "was trained on plain activations.*m is contrasts .*zero_attention"),
        (DELTA, OTHER, r"\(zero_attention, per_layer\), .*\(knockout, joint\)"),
        (UNKNOWN, None, r"was trained on contrasts .*unknown"),
    ],
)
def test_an_sae_of_contrasts_and_plain_activations_are_kept_apart(form, trained, read, words):
    with pytest.raises(MismatchError, match=words) as error:
        check_saes(form(sae_of(trained)), 3, "m", read)
    assert "contrast.method=" in error.value.then


@pytest.mark.parametrize(
    ("trained", "read"), [(None, None), (DELTA, DELTA), (DELTA, UNKNOWN), (UNKNOWN, OTHER)]
)
def test_an_sae_reads_what_it_was_trained_on(trained, read):
    check_saes({0: sae_of(trained)}, 3, "m", read)


def test_features_of_a_contrast_say_so(tmp_path):
    store = planted_store.make(tmp_path / "x", contrast=DELTA)
    found = features(tmp_path / "f", store, {0: sae_of(DELTA)})
    assert found.manifest["contrast"] == DELTA


def test_rows_that_were_masked_on_the_way_are_counted_for_each_layer(tmp_path, saes):
    store = planted_store.make(tmp_path / "x")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / EXAMPLES).write_bytes((tmp_path / "x" / EXAMPLES).read_bytes())

    def pieces(done):
        for piece in stored_pieces(store, [0, 2], done):
            yield replace(piece, masked={"2": piece.index})

    found = write_features(
        tmp_path / "f", "fingerprint", pieces, saes, model_name="m", extra=[EXAMPLES]
    )
    assert found.manifest["masked"] == {"2": 0 + 1 + 2}
