import math

import pytest
import torch

from saefty.errors import NumericError
from saefty.optimisation import EarlyStopping, Trainee
from saefty.saes.base import SaeConfig
from saefty.training_settings import OptimizerSection

PLAIN = OptimizerSection(lr=1e-2, warmup_steps=0)


def rows(n=200, d_in=8, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def make(arch="topk", *, optimizer=PLAIN, grad_clip=None, dead_after=10**9, aux_k=None):
    config = SaeConfig(arch, 8, 32, 4, aux_k=aux_k)
    trainee = Trainee(config, optimizer, grad_clip=grad_clip, n_steps=100, dead_after=dead_after)
    trainee.start(rows(), seed=1)
    return trainee


def test_the_rate_rises_linearly_then_falls_as_a_cosine():
    section = OptimizerSection(lr=1.0, warmup_steps=4, final_lr_share=0.2)
    assert [section.rate(i, 104) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert section.rate(4, 104) == 1.0
    assert section.rate(54, 104) == pytest.approx(0.6)
    assert section.rate(104, 104) == pytest.approx(0.2)


def test_warm_up_is_a_twentieth_of_the_steps_and_at_most_a_thousand():
    section = OptimizerSection(lr=1.0)
    assert section.rate(99, 2000) == 1.0
    assert section.rate(98, 2000) < 1.0
    assert section.rate(999, 10**6) == 1.0


@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_the_first_encoder_scale_minimises_the_first_error(arch):
    trainee, x = make(arch), rows()
    sae = trainee.sae

    def error(factor):
        with torch.no_grad():
            z = sae.activate_in_training((x @ sae.W_enc + sae.b_enc) * factor)
            return float((sae.decode(z) - x).square().sum())

    assert error(1.0) < min(error(0.98), error(1.02))


def test_the_first_decoder_rows_have_norm_one_and_the_encoder_is_their_transpose():
    sae = make().sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    cosine = torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1)
    torch.testing.assert_close(cosine, torch.ones(32))


def dense_twin(trainee, x, grad_clip):
    """One step written again: autograd on the dense loss, torch's own clipping and AdamW.

    The encoder reads x - b_dec; its bias is brought to one of x at the end.
    """
    sae = trainee.sae
    start = {name: value.detach().clone() for name, value in sae.named_parameters()}
    start["b_enc"] += start["b_dec"] @ start["W_enc"]
    weights = {name: torch.nn.Parameter(value) for name, value in start.items()}
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(4, dim=1).indices, 1.0)
    x_hat = (pre.relu() * kept) @ weights["W_dec"] + weights["b_dec"]
    (x_hat - x).square().mean().backward()
    W, g = weights["W_dec"].data, weights["W_dec"].grad
    g -= (g * W).sum(1, keepdim=True) * W
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(weights.values(), grad_clip)
    torch.optim.AdamW(weights.values(), lr=1e-2, eps=6.25e-10, weight_decay=0.0).step()
    W /= W.norm(dim=1, keepdim=True)
    found = {name: value.data for name, value in weights.items()}
    return {**found, "b_enc": found["b_enc"] - found["b_dec"] @ found["W_enc"]}


@pytest.mark.parametrize("grad_clip", [None, 0.01])
def test_a_step_equals_autograd_clipping_and_adamw(grad_clip):
    trainee, x = make(grad_clip=grad_clip), rows(seed=2)
    wanted = dense_twin(trainee, x, grad_clip)
    trainee.step(x, 0)
    for name, value in trainee.sae.named_parameters():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=2e-6, msg=name)


def test_decoder_rows_keep_norm_one():
    trainee = make()
    for step in range(5):
        trainee.step(rows(seed=step), step)
    torch.testing.assert_close(trainee.sae.W_dec.norm(dim=1), torch.ones(32))


def test_figures_are_those_of_the_batch():
    trainee, x = make(), rows(seed=2)
    with torch.no_grad():
        error = float((trainee.sae(x) - x).square().sum())
        l0 = float(trainee.sae.encode_sparse(x).l0.float().mean())
    figures = trainee.step(x, 0)
    assert figures["squared_error"] == pytest.approx(error, rel=1e-5)
    assert figures["loss"] == pytest.approx(error / x.numel(), rel=1e-5)
    assert figures["l0"] == l0
    assert figures["lr"] == 1e-2


def kill(trainee, latents):
    """Let latents see nothing: their pre-activations stay far below the others'."""
    with torch.no_grad():
        trainee.sae.W_enc[:, latents] = 0
        trainee.sae.b_enc[latents] = 1e-3  # positive, so that AuxK can bring them back


def test_a_latent_is_dead_once_it_has_not_fired_for_long_enough():
    trainee = make(dead_after=400, aux_k=0)
    kill(trainee, [3, 7])
    assert trainee.step(rows(), 0)["dead_share"] == 0
    trainee.step(rows(), 1)
    assert {3, 7} <= set(trainee.dead.tolist())
    assert trainee.since_fired[3] == 400


def test_dead_latents_learn_from_the_residual_and_only_then():
    for aux_k, moves in ((0, False), (None, True)):
        trainee = make(dead_after=1, aux_k=aux_k)
        kill(trainee, [3])
        trainee.step(rows(), 0)
        before = trainee.sae.W_enc[:, 3].clone()
        trainee.step(rows(seed=5), 1)
        assert (not torch.equal(trainee.sae.W_enc[:, 3], before)) is moves


def test_a_loss_that_is_not_finite_stops_before_the_weights_move():
    trainee, x = make(), rows()
    before = {name: value.clone() for name, value in trainee.weights().items()}
    x[4, 2] = float("nan")
    with pytest.raises(NumericError, match="the loss is nan"):
        trainee.step(x, 0)
    for name, value in trainee.weights().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_a_restored_trainee_goes_on_to_the_same_bits(arch):
    trainee = make(arch, dead_after=300)
    for step in range(3):
        trainee.step(rows(seed=step), step)
    other = make(arch, dead_after=300)
    other.restore({name: value.clone() for name, value in trainee.state().items()})
    for step in range(3, 6):
        trainee.step(rows(seed=step), step)
        other.step(rows(seed=step), step)
    for (name, one), two in zip(trainee.state().items(), other.state().values(), strict=True):
        assert torch.equal(one, two), name


def test_early_stopping_counts_measurements_without_a_new_best():
    stopping = EarlyStopping(patience=2)
    assert [stopping.is_best(i, fvu) for i, fvu in enumerate([0.5, 0.3, 0.4])] == [
        True,
        True,
        False,
    ]
    assert stopping.stopped_at is None
    stopping.is_best(3, 0.3)
    assert (stopping.stopped_at, stopping.best_step, stopping.best_fvu) == (3, 1, 0.3)


def test_without_patience_nothing_stops_and_nothing_is_best():
    stopping = EarlyStopping(patience=None)
    assert not any(stopping.is_best(i, math.exp(i)) for i in range(50))
    assert stopping.stopped_at is None
