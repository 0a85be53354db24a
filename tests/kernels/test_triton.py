"""The programs for a GPU, on one where there is one and else in Triton's interpreter.

The contract of all kernels is in `tests/contracts/test_kernels.py`; here is what is Triton's own:
rows of many tiles, candidates that do not fit, latents summed in parts, and products in bfloat16.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel_sets import triton_or_skip
from saefty.kernels import triton_sparse
from saefty.kernels.base import KERNELS, LatentGradients, SparseCode, choose_kernels
from saefty.optimisation import Trainee
from saefty.saes.base import SaeConfig
from saefty.training_settings import OptimizerSection

D_IN, D_SAE, ROWS = 6, 200, 4
COMPILING = Path(__file__).with_name("compile_for_gpus.py")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def kernels(monkeypatch):
    """Kernels whose rows have several tiles and whose candidates have little room."""
    monkeypatch.setattr(triton_sparse, "TILE", 32)
    monkeypatch.setattr(triton_sparse, "LEAST_ROOM", 8)
    return triton_or_skip()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind):
    x, W, b = draw(ROWS, D_IN), draw(D_IN, D_SAE, seed=1), draw(D_SAE, seed=2)
    if kind == "tied":
        x, W, b = x.round(), W.round(), b.round()
    if kind == "all equal":
        x, W, b = torch.ones_like(x), torch.ones_like(W), torch.zeros_like(b)
    if kind == "all equal but the last":
        x, W, b = torch.ones_like(x), torch.ones_like(W), torch.zeros_like(b)
        b[-1] = 1
    if kind == "few positive":
        b -= 7
    if kind == "of all sizes":
        W *= torch.logspace(-30, 30, D_SAE)
    return x, W, b


def chosen_by_numpy(pre, k, signed):
    """Return (latent, value) of each row as a stable sort of float32 gives them."""
    found = []
    for row in pre.numpy():
        order = np.argsort(-(np.abs(row) if signed else row), kind="stable")[:k]
        fires = row[order] != 0 if signed else row[order] > 0
        found += zip(order[fires].tolist(), row[order][fires].tolist(), strict=True)
    return found


@pytest.mark.parametrize(
    "kind",
    ["random", "tied", "all equal", "all equal but the last", "few positive", "of all sizes"],
)
@pytest.mark.parametrize(("k", "signed"), [(1, False), (7, False), (7, True)])
def test_rows_of_many_tiles_give_what_a_stable_sort_gives(kernels, kind, k, signed):
    x, W, b = inputs(kind)
    code = (kernels.topk_abs if signed else kernels.topk)(x, W, b, k)
    found = list(zip(code.indices.tolist(), code.values.tolist(), strict=True))
    wanted = chosen_by_numpy(torch.addmm(b, x, W), k, signed)
    assert [latent for latent, _ in found] == [latent for latent, _ in wanted]
    np.testing.assert_allclose(
        [value for _, value in found], [value for _, value in wanted], rtol=1e-5
    )


@pytest.mark.parametrize("k", [1, 7])
def test_a_latent_that_is_nan_takes_a_place_as_it_does_in_the_oracle(kernels, k):
    x, W, b = inputs("random")
    W[0, 150] = float("nan")
    one, two = kernels.topk(x, W, b, k), KERNELS["reference"]().topk(x, W, b, k)
    assert one.indices.tolist() == two.indices.tolist()
    assert len(one.values) == ROWS * (k - 1)


def test_chunks_of_rows_change_nothing_and_no_array_of_rows_by_latents_is_kept(
    kernels, monkeypatch
):
    x, W, b = inputs("random")
    x, W = x[:, :1], W[:1]
    whole, made = kernels.topk(x, W, b, 7), []
    monkeypatch.setattr(triton_sparse, "CHUNK_BYTES", 4 * D_SAE)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.append(out.nbytes if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        parts = kernels.topk(x, W, b, 7)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.values, parts.values)
    assert 4 * D_SAE <= max(made) < 4 * ROWS * D_SAE / 2


def code_with_an_always_on_latent():
    """Return 24 rows in which latent 3 always fires, latent 0 in every second, latent 7 never."""
    z = torch.zeros(24, 9)
    z[:, 3], z[::2, 0], z[5, 8] = draw(24).abs(), draw(12, seed=1).abs(), 2.0
    return SparseCode.from_dense(z), z


@pytest.mark.parametrize("unit", [False, True])
def test_a_latent_of_many_entries_is_summed_in_parts(kernels, monkeypatch, unit):
    monkeypatch.setattr(triton_sparse, "SEGMENT", 5)
    code, z = code_with_an_always_on_latent()
    x, error, by_value = draw(24, D_IN), draw(24, D_IN, seed=4), draw(len(code.values), seed=5)
    W_dec = torch.nn.functional.normalize(draw(9, D_IN, seed=6))
    memory = LatentGradients(*(torch.full_like(part, torch.nan) for part in (
        x.new_empty(9, D_IN), x.new_empty(9), x.new_empty(9, D_IN), x.new_empty(9)
    )))  # fmt: skip
    found = kernels.latent_gradients(
        code, by_value, x, error, 0.5, 9, W_dec if unit else None, memory
    )
    slopes = np.zeros((24, 9))
    slopes[code.row_of.numpy(), code.indices.numpy()] = by_value.numpy()
    W_enc = slopes.T @ x.double().numpy()
    by_decoder = 0.5 * z.double().numpy().T @ error.double().numpy()
    if unit:
        rows = W_dec.double().numpy()
        by_decoder -= (by_decoder * rows).sum(1, keepdims=True) * rows
    b_enc = slopes.sum(0)
    squared = (W_enc**2).sum(1) + (by_decoder**2).sum(1) + b_enc**2
    for got, wanted in (
        (found.W_enc, W_enc), (found.b_enc, b_enc), (found.W_dec, by_decoder),
        (found.squared, squared),
    ):  # fmt: skip
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert not found.W_dec[7].any()


def test_where_a_gradient_is_asked_for_decoding_has_one(kernels):
    code, z = code_with_an_always_on_latent()
    W_dec = draw(9, D_IN).requires_grad_()
    kernels.decode(code, W_dec).square().sum().backward()
    wanted = 2 * z.T @ (z @ W_dec.detach())
    torch.testing.assert_close(W_dec.grad, wanted)


def trained(kernels, steps=3, unit=True):
    """Return the losses and weights of a small training with some dead latents."""
    config = SaeConfig("topk", D_IN, 64, 3, aux_k=2)
    optimizer = OptimizerSection(lr=0.01, warmup_steps=0, weight_decay=0.1)
    trainee = Trainee(config, optimizer, grad_clip=0.1, n_steps=9, dead_after=17)
    trainee.start(draw(8, D_IN), seed=0)
    trainee.kernels = kernels
    losses = [trainee.step(draw(8, D_IN, seed=i), i)["loss"] for i in range(steps)]
    assert len(trainee.dead)
    return losses, trainee.weights()


def test_a_training_is_that_of_the_kernels_in_torch():
    (losses, weights), (wanted, others) = map(trained, (triton_or_skip(), choose_kernels("cpu")))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_a_product_in_bfloat16_proposes_and_float32_decides(signed):
    rough = triton_or_skip(rough=True)
    x, W, b = inputs("random")
    W = W.T.contiguous().T
    pre = torch.addmm(b, x, W)
    code = (rough.topk_abs if signed else rough.topk)(x, W, b, 7)
    found = pre[code.row_of, code.indices]
    torch.testing.assert_close(code.values, found, rtol=1e-5, atol=1e-6)
    # With 8 spare proposals, and pre-activations as far apart as here, nothing is missed.
    assert list(zip(code.indices.tolist(), strict=True)) == [
        (latent,) for latent, _ in chosen_by_numpy(pre, 7, signed)
    ]


def test_of_latents_that_bfloat16_cannot_tell_apart_float32_takes_the_largest_proposed():
    rough = triton_or_skip(rough=True)
    W = (1 + torch.arange(12) * 1e-4)[None].T.contiguous().T
    code = rough.topk(torch.ones(2, 1), W, torch.zeros(12), 4)
    assert code.indices.tolist() == [11, 10, 9, 8] * 2  # all 12 are proposed: k + 8
    np.testing.assert_allclose(code.values[:4], W[0, [11, 10, 9, 8]], rtol=1e-7)


def test_a_batch_selection_in_bfloat16_has_float32_values():
    rough = triton_or_skip(rough=True)
    x, W, b = inputs("random")
    W = W.T.contiguous().T
    code = rough.batch_topk(x, W, b, 12)
    assert len(code.values) == 12
    pre = torch.addmm(b, x, W)
    torch.testing.assert_close(code.values, pre[code.row_of, code.indices], rtol=1e-5, atol=1e-6)
    assert float(code.values.min()) >= float(pre.flatten().topk(16).values.min())


@pytest.mark.parametrize(
    ("sums", "interpreted", "wanted"),
    [("there", False, "triton"), ("there", True, "torch_sparse"), (None, False, "torch_sparse")],
)
def test_a_gpu_gets_these_kernels_where_triton_compiles_them(
    monkeypatch, sums, interpreted, wanted
):
    found = triton_sparse.Programs(sums, sums, interpreted, "as the test says")
    monkeypatch.setattr(triton_sparse, "programs", lambda: found)
    assert type(choose_kernels("cuda")) is KERNELS[wanted]
    assert type(choose_kernels("cpu")) is not KERNELS["triton"]


def test_without_triton_the_reason_is_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    found = triton_sparse.programs.__wrapped__()
    assert "Triton cannot be imported" in found.reason
    monkeypatch.setattr(triton_sparse, "programs", lambda: found)
    with pytest.raises(RuntimeError, match="no kernels in Triton here: Triton cannot be imported"):
        KERNELS["triton"]()


@pytest.mark.slow
def test_every_program_compiles_for_gpus_that_are_not_here(tmp_path):
    if triton_sparse.programs().sums is None:
        pytest.skip(triton_sparse.programs().reason)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, COMPILING], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert names == {
        "candidates", "ranked", "decoded", "row_dots", "latent_gradients", "gradient_parts",
        "gradients_of_parts", "adamw",
    }  # fmt: skip


@on_gpu
@pytest.mark.parametrize("rough", [False, True])
def test_on_a_gpu_large_rows_give_what_torch_gives(rough):
    x, W, b = draw(512, 256).cuda(), draw(256, 40_000, seed=1).cuda() / 16, draw(40_000).cuda()
    W = W.T.contiguous().T
    code = KERNELS["triton"](rough=rough).topk(x, W, b, 64)
    wanted = (x.double() @ W.double() + b.double()).topk(64, dim=1)
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(code.values.view(512, 64).double(), wanted.values, **near)


@on_gpu
def test_on_a_gpu_a_training_is_that_of_torch_and_repeats_to_the_bit():
    def train(kernels):
        config = SaeConfig("topk", 128, 4096, 32)
        trainee = Trainee(
            config, OptimizerSection(), grad_clip=1.0, n_steps=9, dead_after=1000, device="cuda",
            kernels=kernels,
        )  # fmt: skip
        x = draw(2048, 128).cuda()
        trainee.start(x, seed=0)
        losses = [trainee.step(x, i)["loss"] for i in range(5)]
        return losses, trainee.weights()

    (one, weights), (again, same), (other, _) = map(train, ("Triton", "Triton", "TorchSparse"))
    assert one == again
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    np.testing.assert_allclose(one, other, rtol=1e-4)
