"""What kept codes are, told by the SAE's own arithmetic; matrices small enough to check by hand."""

import json

import numpy as np
import pytest
import torch

from analyze.dumps import in_this_process, write_dump
from saefty import feature_dump
from saefty.diagnosis.code_checks import check_codes
from saefty.diagnosis.code_samples import Kept, sample_dump, sample_features
from saefty.diagnosis.finding import (
    AXES_SWAPPED,
    INPUT_OFFSET,
    OVERFLOW,
    PRE_ACTIVATIONS,
    RECONSTRUCTION,
    SCALE,
    STANDARDISATION,
    WRONG_TENSOR,
)
from saefty.feature_dump import FeatureDump
from saefty.saes.base import ARCHITECTURES, SaeConfig
from saefty.stores.base import StoreWriter
from saefty.stores.features import FeatureStore, commit_features

D_IN, D_SAE, N = 3, 8, 40


class Held:
    """Rows in memory, layer by layer."""

    def __init__(self, *layers):
        self.x = [torch.as_tensor(x, dtype=torch.float32) for x in layers]
        self.layers = tuple(range(len(layers)))
        self.n_rows = len(layers[0])
        self.taken = 0

    def take(self, layer, indices):
        self.taken = max(self.taken, len(indices))
        return self.x[layer][torch.as_tensor(indices)]


@pytest.fixture
def store():
    rng = np.random.default_rng(0)
    return Held(*(rng.normal(size=(N, D_IN)) * [1, 2, 4] + [3, 0, -1] for _ in range(2)))


def sae_of(arch="relu"):
    sae = ARCHITECTURES[arch](SaeConfig(arch, D_IN, D_SAE, k=2))
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.copy_(torch.from_numpy(rng.normal(size=tuple(value.shape))))
            if name == "threshold":
                value.abs_()
    return sae.requires_grad_(False)


def weights(sae):
    return {name: value.double().numpy() for name, value in sae.named_parameters()}


def codes(sae, x):
    """Return relu codes by NumPy."""
    w = weights(sae)
    return np.maximum(x @ w["W_enc"] + w["b_enc"], 0)


def kept(z, rows=None, half=False):
    rows = np.arange(len(z)) if rows is None else rows
    return Kept(np.asarray(rows), np.asarray(z, dtype=np.float64), int(max(rows)) + 1, half)


def checked(z, store, sae=None, layer=0, same_texts=None, **keys):
    return check_codes(kept(z, **keys), sae or sae_of(), store, layer, same_texts=same_texts)


def causes(check):
    return [cause for one in check.findings if one.severity == "sick" for cause in one.suggests]


def of(store, layer=0):
    return store.x[layer].double().numpy()


def test_the_saes_codes_of_the_rows_are_known(store):
    found = checked(codes(sae_of(), of(store)), store)
    assert (found.kind, causes(found)) == ("the SAE's codes", [])
    assert found.error < 1e-6
    (only,) = found.findings
    assert only.severity == "info"


def test_the_relative_error_is_that_of_numpy(store):
    x = of(store)
    z = codes(sae_of(), x)
    noisy = z + 0.01 * np.random.default_rng(3).normal(size=z.shape)
    error = np.linalg.norm(noisy - z) / np.linalg.norm(z)
    assert checked(noisy, store).error == pytest.approx(error, rel=1e-5)


def test_reconstructions_pre_activations_and_activations_are_no_codes(store):
    sae, x = sae_of(), of(store)
    w = weights(sae)
    z = codes(sae, x)
    for matrix, kind, cause in (
        (z @ w["W_dec"] + w["b_dec"], "the reconstruction", RECONSTRUCTION),
        (x @ w["W_enc"] + w["b_enc"], "the pre-activations", PRE_ACTIVATIONS),
        (x, "the activations themselves", WRONG_TENSOR),
    ):
        found = checked(matrix, store)
        assert (found.kind, causes(found)) == (kind, [cause])


@pytest.mark.parametrize("arch", ["topk", "jumprelu", "batch_topk"])
def test_positive_pre_activations_of_an_sae_that_selects_are_no_codes(store, arch):
    sae = sae_of(arch)
    pre = codes(sae, of(store))
    found = checked(pre, store, sae)
    assert found.kind == "the positive pre-activations, before latents are selected"
    assert causes(found) == [PRE_ACTIVATIONS]
    assert checked(sae.encode(store.x[0]), store, sae).kind == "the SAE's codes"


def test_codes_of_another_layer_are_named_by_it(store):
    found = checked(codes(sae_of(), of(store, 1)), store)
    assert (found.kind, causes(found)) == ("the SAE's codes of layer 1", [WRONG_TENSOR])


@pytest.mark.parametrize(
    ("change", "kind", "cause"),
    [
        (lambda x: x - x.mean(axis=0), "rows less their mean", INPUT_OFFSET),
        (lambda x: (x - x.mean(axis=0)) / x.std(axis=0), "standardised rows", STANDARDISATION),
        (lambda x: x * 3**0.5 / np.linalg.norm(x, axis=1).mean(), "√d / mean norm", SCALE),
        (
            lambda x: (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True),
            "rows after a layer norm", STANDARDISATION,
        ),
    ],
)  # fmt: skip
def test_codes_of_rows_that_were_normalised_first_are_known(store, change, kind, cause):
    found = checked(codes(sae_of(), change(of(store))), store)
    assert kind in found.kind
    assert causes(found) == [cause]


def test_codes_times_a_number_are_known_with_the_number(store):
    found = checked(7.0 * codes(sae_of(), of(store)), store)
    (scaled,) = found.findings
    assert scaled.name == "scaled_codes"
    assert scaled.numbers["factor"] == pytest.approx(7.0)
    assert scaled.suggests == (SCALE,)


def test_codes_that_ran_over_in_float16_are_codes_with_an_overflow(store):
    sae = sae_of()
    sae.W_enc.mul_(20_000)
    sae.b_enc.mul_(20_000)
    z = codes(sae, of(store))
    with np.errstate(over="ignore"):
        half = z.astype(np.float16).astype(float)
    over = np.isinf(half).mean()
    assert 0.05 < over < 0.5
    for matrix in (half, np.minimum(z, 65504)):
        found = checked(matrix, store, sae, half=matrix is half)
        assert (found.kind, causes(found)) == ("the SAE's codes", [OVERFLOW])
        assert found.findings[-1].numbers["share"] == over
        assert found.error < 1e-3


def test_a_matrix_of_nothing_but_infinity_is_unknown_and_an_overflow(store):
    found = checked(np.full((N, D_SAE), np.inf), store, half=True)
    assert (found.kind, causes(found)) == (None, [OVERFLOW])


def test_a_nan_is_no_matter_of_float16_where_nothing_was_kept_in_it(store):
    z = codes(sae_of(), of(store))
    z[3] = np.nan
    found = checked(z, store)
    assert (found.kind, causes(found)) == ("the SAE's codes", [])
    said = found.findings[-1]
    assert (said.name, said.severity, said.numbers["share"]) == ("not_whole", "sick", 1 / N)
    assert "not kept in float16" in said.sentence
    assert causes(checked(z, store, half=True)) == [OVERFLOW]


def test_few_nan_are_a_warning(store):
    z = np.tile(codes(sae_of(), of(store)), (60, 1))
    z[3, 0] = np.nan
    many = Held(np.tile(of(store), (60, 1)))
    assert {one.severity for one in checked(z, many).findings} == {"info", "warning"}


def test_codes_of_other_texts_that_are_alike_are_not_called_these_rows_in_another_order(store):
    # Rows that differ from the store's by less than is told apart, at scattered places.
    rng = np.random.default_rng(5)
    places = rng.integers(0, N, N)
    x = of(store)[places] * (1 + 0.004 * rng.normal(size=(N, 1)))
    found = checked(codes(sae_of(), x), store, same_texts=False)
    assert found.kind == "the SAE's codes"
    (said,) = found.findings
    assert (said.name, said.severity) == ("like_rows", "warning")
    assert "that this SAE gives to like activations" in said.sentence
    assert "the texts are not the same" in said.sentence
    assert "of these rows (" not in said.sentence
    assert "order" not in said.sentence
    # Where nobody knows the texts, tokens that share rows are not said to be in another order.
    (unknown,) = checked(codes(sae_of(), x), store).findings
    assert unknown.name == "like_rows"
    assert "the texts may be others" in unknown.sentence


def test_another_order_is_claimed_only_where_nearly_all_tokens_are_found(store):
    z = codes(sae_of(), of(store)[::-1])
    z[[4, 20]] = 50.0  # of 40 tokens two are of no row
    assert "like_rows" in {one.name for one in checked(z, store).findings}
    assert "other_rows" in {one.name for one in checked(z[5:20], store).findings}


def test_swapped_axes_are_known_whatever_was_swapped(store):
    z = codes(sae_of(), of(store))
    straight = kept(z.T)  # eight "tokens", forty "latents"
    found = check_codes(straight, sae_of(), store, 0, swapped=kept(z))
    assert (found.kind, causes(found)) == ("the SAE's codes, axes swapped", [AXES_SWAPPED])
    square = codes(sae_of(), of(store)[:D_SAE])
    found = check_codes(kept(square.T), sae_of(), store, 0, swapped=kept(square))
    assert causes(found) == [AXES_SWAPPED]
    found = check_codes(kept(square), sae_of(), store, 0, swapped=kept(square.T))
    assert causes(found) == []


def test_part_of_the_rows_from_the_first_on_is_said(store):
    found = checked(codes(sae_of(), of(store)[:25]), store)
    assert found.kind == "the SAE's codes"
    assert "25 tokens were kept, and the store holds 40 rows" in found.findings[-1].sentence
    assert "the first of the store's rows" in found.findings[-1].sentence


def test_more_tokens_than_rows_are_said(store):
    more = Held(of(store)[:30])
    found = checked(codes(sae_of(), of(store)), more)
    assert found.kind == "the SAE's codes"
    assert "tokens that the store does not hold" in found.findings[-1].sentence


@pytest.mark.parametrize(
    ("chosen", "order"),
    [
        (np.arange(10, 40), "token 0 is row 10 of the store"),
        (np.arange(1, 40, 2), "some of the store's rows, in the store's order"),
        (np.random.default_rng(2).permutation(40), "in another order"),
    ],
)
def test_rows_that_lie_elsewhere_are_found_and_said(store, chosen, order):
    found = checked(codes(sae_of(), of(store)[chosen]), store)
    assert found.kind == "the SAE's codes"
    assert found.error < 1e-6
    assert order in found.findings[-1].sentence
    assert found.findings[-1].numbers["found"] == 1.0
    assert causes(found) == []


def test_a_reconstruction_in_another_order_is_still_one(store):
    sae = sae_of()
    w = weights(sae)
    x_hat = codes(sae, of(store)[::-1]) @ w["W_dec"] + w["b_dec"]
    found = checked(x_hat, store)
    assert (found.kind, causes(found)) == ("the reconstruction", [RECONSTRUCTION])
    assert "in another order" in found.findings[-1].sentence


def test_codes_of_other_texts_are_said_to_be_unknown(store):
    other = np.random.default_rng(9).normal(size=(N, D_IN)) * [1, 2, 4] + [3, 0, -1]
    found = checked(codes(sae_of(), other), store)
    assert found.kind is None
    assert found.error > 0.05
    assert "agree with nothing" in found.findings[0].sentence


def test_a_width_that_is_none_of_the_saes_is_said(store):
    found = checked(np.ones((N, 5)), store)
    assert found.kind is None
    assert "5 wide; the SAE has 8 latents" in found.findings[0].sentence
    assert "the codes of another SAE" in found.findings[0].sentence
    assert causes(found) == [WRONG_TENSOR]
    assert found.error == np.inf


def test_no_more_than_a_block_of_rows_is_taken_at_once(monkeypatch):
    monkeypatch.setattr("saefty.diagnosis.code_checks.BLOCK_NUMBERS", 100 * D_SAE)
    rng = np.random.default_rng(0)
    many = Held(rng.normal(size=(5000, D_IN)))
    found = checked(codes(sae_of(), of(many)[::-1][:50]), many)
    assert "in another order" in found.findings[-1].sentence
    # 5,000 for the rows' mean, and never all of them for the search.
    monkeypatch.setattr("saefty.diagnosis.code_readings.STATISTICS_ROWS", 60)
    many.taken = 0
    assert checked(codes(sae_of(), of(many)[::-1][:50]), many).kind == "the SAE's codes"
    assert many.taken == 100


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(feature_dump, "to_safetensors", in_this_process)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dump_is_sampled_with_the_numbers_of_its_tokens(tmp_path, here, kind):
    z = torch.arange(70.0)[:, None] + torch.arange(D_SAE) / 8
    dump = FeatureDump(write_dump(tmp_path / "dump", z.to(kind), chunk=20), tmp_path)
    plain, swapped = sample_dump(dump, 20, D_SAE)
    assert swapped is None
    assert plain.n_tokens == 70
    # Of the chunks 0, 2 and 3.
    assert plain.rows.tolist() == [*range(20), *range(40, 70)]
    np.testing.assert_array_equal(plain.values, z.to(kind)[plain.rows].double())


def test_a_dump_with_its_axes_swapped_is_read_both_ways(tmp_path, here):
    z = torch.arange(70.0)[:, None] + torch.arange(D_SAE) / 8
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"SAE_D_FEAT": D_SAE}))
    for number, part in enumerate(z.split(20)):
        held = {"sae_feats": part.T.contiguous(), "total_tokens_so_far": D_SAE * (number + 1)}
        torch.save(held, folder / f"sae_feats_layer20_chunk{number}.pt")
    plain, swapped = sample_dump(FeatureDump(folder, tmp_path), 20, D_SAE)
    assert swapped.n_tokens == 70
    assert swapped.rows.tolist() == [*range(20), *range(40, 70)]
    np.testing.assert_array_equal(swapped.values, z[swapped.rows].double())
    # Read as they are, the last chunk is narrower and is left out.
    assert (plain.n_tokens, plain.values.shape) == (4 * D_SAE, (2 * D_SAE, 20))


def test_chunks_are_sampled_and_not_read_whole(tmp_path, here):
    z = torch.arange(900.0)[:, None] + torch.arange(D_SAE) / 8
    dump = FeatureDump(write_dump(tmp_path / "dump", z, chunk=300), tmp_path)
    plain, _ = sample_dump(dump, 20, D_SAE)
    assert len(plain.rows) == 3 * 96
    assert (np.diff(plain.rows) > 0).all()
    np.testing.assert_array_equal(plain.values, z[plain.rows].double())


def test_a_feature_store_is_sampled_with_the_numbers_of_its_tokens(tmp_path):
    z = np.zeros((70, D_SAE), dtype=np.float32)
    z[np.arange(70), np.arange(70) % D_SAE] = 1 + np.arange(70)
    writer, records = StoreWriter(tmp_path, "features", "f"), []
    for piece, part in enumerate(np.split(z, [20, 40, 60])):
        n = len(part)
        code = {
            "indptr": np.arange(n + 1), "ids": part.argmax(axis=1), "values": part.max(axis=1),
        }  # fmt: skip
        names = ("example", "token_pos", "token_id", "char_start", "char_end", "role", "modality")
        table = {name: np.zeros(n, np.int64) for name in names}
        records.append(commit_features(writer, piece, {1: code}, table, {}))
    writer.finish(records, {"layers": [1], "d_sae": {"1": D_SAE}}, [])
    found = sample_features(FeatureStore(tmp_path), 1)
    assert found.n_tokens == 70
    assert found.rows.tolist() == [*range(40), *range(60, 70)]
    np.testing.assert_array_equal(found.values, z[found.rows])
