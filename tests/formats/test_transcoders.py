"""What a transcoder, and an SAE that scales its rows, can be used for, and what refuses them."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty.errors import MismatchError
from saefty.fidelity import measure_fidelity, measure_loss_recovered
from saefty.formats.base import format_of, read_sae
from saefty.gating import Condition, Silencer, reply_under
from saefty.interventions.gate import gate, subtract
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae

D, M, D_OUT = 6, 20, 4


def made(**options):
    sae = SaeConfig("relu", D, M, 0, **options).build().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in sae.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator))
    sae.site = Site(1)
    return sae


def transcoder(d_out=D_OUT, skip=False):
    sae = made(d_out=d_out, skip=skip)
    sae.site, sae.site_out = Site(1, "post_attn_ln"), Site(1, "mlp_out")
    return sae


def rows(n=30):
    return 2 + 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(1))


BOTH = r"this is a transcoder: it reads blocks\.1\.hook_post_attn_ln \(6 wide\) and predicts "
BOTH += r"blocks\.1\.hook_mlp_out \(4 wide\)"


@pytest.mark.parametrize("change", [gate, subtract])
def test_gating_by_a_transcoder_is_refused_with_both_places(change):
    with pytest.raises(MismatchError, match=BOTH) as error:
        change(transcoder(), [0])
    assert "`encode` works with transcoders" in error.value.then


def test_generating_under_a_transcoders_gate_is_refused_before_a_token_is_made(tmp_path):
    with pytest.raises(MismatchError, match="gating needs an autoencoder"):
        reply_under(
            tiny_models.load("llama"), Silencer.of(transcoder()), [Example("a", "b")],
            [Condition("target", ())], tmp_path, max_new_tokens=1, seed=0, batch_size=1,
        )  # fmt: skip


def test_a_transcoder_is_not_put_in_the_place_of_what_it_reads():
    with pytest.raises(MismatchError, match="measuring a reconstruction of the same rows"):
        measure_fidelity(transcoder(d_out=D), [rows()])
    model = tiny_models.load("llama")
    items = model.tokenize([Example("a", "the quick brown fox", raw=True)])
    with pytest.raises(MismatchError, match="in the place of what was read"):
        measure_loss_recovered(model, transcoder(), items)


def test_a_transcoder_of_one_width_is_one_all_the_same(tmp_path):
    sae = transcoder(d_out=D)
    assert sae.is_transcoder
    assert (sae.d_in, sae.d_out) == (D, D)
    save_sae(sae, tmp_path)
    assert format_of(tmp_path) == "saelens"
    again = read_sae(tmp_path)
    assert again.is_transcoder
    assert (again.site, again.site_out) == (Site(1, "post_attn_ln"), Site(1, "mlp_out"))


def test_the_skip_connection_belongs_to_the_reconstruction_and_not_to_the_latents():
    sae, x = transcoder(skip=True), rows()
    w = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    z = np.maximum(x.double().numpy() @ w["W_enc"] + w["b_enc"], 0)
    decoded = z @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(sae.encode(x), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x)), decoded, rtol=1e-5, atol=1e-4)
    whole = decoded + x.double().numpy() @ w["W_skip"].T
    for found in (sae(x), sae.reconstruct(x), sae.reconstruct(x, sae.encode_sparse(x))):
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-4)


def by_hand(sae, x, kind):
    x = x.double().numpy()
    w = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    if kind == "layer_norm":
        shift, scale = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        divisor = scale + 1e-5
    else:
        shift, scale = 0.0, np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
        divisor = np.where(scale > 0, scale, 1.0)
    z = np.maximum((x - shift) / divisor @ w["W_enc"] + w["b_enc"], 0)
    return z, (z @ w["W_dec"] + w["b_dec"]) * scale + shift


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_rows_scaled_by_their_own_numbers_are_encoded_reconstructed_and_saved(kind, tmp_path):
    sae, x = made(row_norm=kind), rows()
    x[3] = 0.0  # a row without any direction is encoded as it is
    z, x_hat = by_hand(sae, x, kind)
    save_sae(sae, tmp_path)
    for one in (sae, read_sae(tmp_path)):
        np.testing.assert_allclose(one.encode(x), z, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.encode_sparse(x).dense(M), z, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.reconstruct(x), x_hat, rtol=1e-4, atol=1e-4)


def test_fidelity_of_an_sae_that_scales_its_rows_is_that_of_its_reconstruction():
    sae, x = made(row_norm="layer_norm"), rows()
    _, x_hat = by_hand(sae, x, "layer_norm")
    error = np.square(x.double().numpy() - x_hat).sum()
    assert measure_fidelity(sae, [x]).squared_error == pytest.approx(error, rel=1e-5)


def test_latents_alone_do_not_say_what_a_row_was_when_rows_are_scaled():
    sae = made(row_norm="layer_norm")
    z = sae.encode(rows())
    for use in (lambda: sae.decode(z), lambda: sae.contribution(z, [0]), lambda: gate(sae, [0])):
        with pytest.raises(MismatchError, match=r"every row by the row's own numbers \(layer_norm"):
            use()
