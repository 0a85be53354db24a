"""What every set of kernels must do, on inputs that are easy, tied, degenerate and small."""

import numpy as np
import pytest
import torch

from kernel_sets import few, interpreted, kernels_or_skip
from saefty.kernels.base import KERNELS, AdamStep, LatentGradients, SparseCode

D_IN, D_SAE, K = 6, 20, 4
REFERENCE = KERNELS["reference"]()


def integers(*shape, seed=0, low=-3, high=4):
    """Small integers as float64: products are exact, so equal means equal, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).double()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(kind):
    if kind == "random":
        return gaussian(700, D_IN), gaussian(D_IN, D_SAE, seed=1), gaussian(D_SAE, seed=2)
    if kind == "tied":
        return integers(700, D_IN), integers(D_IN, D_SAE, seed=1), integers(D_SAE, seed=2)
    if kind == "all equal":
        return (
            torch.ones(300, D_IN).double(),
            torch.ones(D_IN, D_SAE).double(),
            torch.zeros(D_SAE).double(),
        )
    if kind == "few positive":
        return (
            gaussian(300, D_IN),
            gaussian(D_IN, D_SAE, seed=1),
            torch.full((D_SAE,), -3.0).double(),
        )
    if kind == "none positive":
        return (
            gaussian(5, D_IN),
            gaussian(D_IN, D_SAE, seed=1),
            torch.full((D_SAE,), -99.0).double(),
        )
    if kind == "one row":
        return gaussian(1, D_IN), gaussian(D_IN, D_SAE, seed=1), gaussian(D_SAE, seed=2)
    return gaussian(0, D_IN), gaussian(D_IN, D_SAE, seed=1), gaussian(D_SAE, seed=2)


KINDS = ["random", "tied", "all equal", "few positive", "none positive", "one row", "no row"]


@pytest.fixture(params=list(KERNELS))
def kernels(request):
    return kernels_or_skip(request.param)


@pytest.fixture(params=KINDS)
def data(request, kernels):
    x, W_enc, b_enc = inputs(request.param)
    return few(kernels, x), W_enc, b_enc


def assert_same_code(got, wanted):
    torch.testing.assert_close(got.offsets, wanted.offsets)
    torch.testing.assert_close(got.indices, wanted.indices)
    torch.testing.assert_close(got.values, wanted.values)


def selections(x, k):
    threshold = torch.linspace(-1, 2, D_SAE, dtype=torch.float64)
    return {"topk": k, "topk_abs": k, "batch_topk": k * len(x), "above": threshold}


@pytest.mark.parametrize("name", ["topk", "topk_abs", "batch_topk", "above"])
@pytest.mark.parametrize("k", [1, K, D_SAE])
def test_a_selection_equals_the_dense_oracle(kernels, data, name, k):
    x, W_enc, b_enc = data
    argument = selections(x, k)[name]
    got = getattr(kernels, name)(x, W_enc, b_enc, argument)
    assert_same_code(got, getattr(REFERENCE, name)(x, W_enc, b_enc, argument))


@pytest.mark.parametrize("name", ["topk", "batch_topk", "above"])
def test_a_code_holds_positive_values_that_descend_within_a_row(kernels, data, name):
    x, W_enc, b_enc = data
    code = getattr(kernels, name)(x, W_enc, b_enc, selections(x, K)[name])
    assert (code.values > 0).all()
    assert code.n_rows == len(x)
    for row in range(code.n_rows):
        values = code.values[code.offsets[row] : code.offsets[row + 1]]
        assert (values.diff() <= 0).all()


@pytest.mark.parametrize("k", [1, K, D_SAE])
def test_signed_selection_keeps_what_numpy_finds_farthest_from_zero(kernels, data, k):
    x, W_enc, b_enc = data
    code = kernels.topk_abs(x, W_enc, b_enc, k)
    for row, pre in enumerate((x @ W_enc + b_enc).numpy()):
        farthest = np.argsort(-np.abs(pre), kind="stable")[:k]
        farthest = farthest[pre[farthest] != 0]
        entries = slice(int(code.offsets[row]), int(code.offsets[row + 1]))
        assert code.indices[entries].tolist() == farthest.tolist()
        np.testing.assert_allclose(code.values[entries], pre[farthest], rtol=1e-12)


def test_of_equal_magnitudes_the_lower_index_is_kept_whatever_its_sign(kernels):
    W_enc = torch.tensor([[1.0, -2.0, -1.0, 2.0, 1.0]])
    code = kernels.topk_abs(torch.ones(1, 1), W_enc, torch.zeros(5), 3)
    assert code.indices.tolist() == [1, 3, 0]
    assert code.values.tolist() == [-2.0, 2.0, 1.0]


def test_of_equal_values_the_lower_index_is_kept(kernels):
    x = torch.ones(2, 1)
    code = kernels.topk(x, torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), torch.zeros(5), 3)
    assert code.indices.tolist() == [1, 3, 0, 1, 3, 0]


def test_of_equal_values_in_a_batch_the_earlier_row_keeps_its_own(kernels):
    x = torch.tensor([[1.0], [2.0], [1.0]])
    code = kernels.batch_topk(x, torch.tensor([[1.0, 1.0]]), torch.zeros(2), 3)
    assert code.l0.tolist() == [1, 2, 0]
    assert code.indices.tolist() == [0, 0, 1]


def test_a_batch_selection_across_many_chunks_is_exact(kernels):
    x = integers(1500, D_IN, seed=5)
    x[1200:] *= 3  # the largest values come last, after the pool has filled
    W_enc, b_enc = integers(D_IN, D_SAE, seed=6), torch.zeros(D_SAE).double()
    for n in (0, 1, 37, 3000, 10**6):
        assert_same_code(
            kernels.batch_topk(x, W_enc, b_enc, n), REFERENCE.batch_topk(x, W_enc, b_enc, n)
        )


def test_decoding_equals_the_dense_product(kernels, data):
    x, W_enc, b_enc = data
    code = REFERENCE.topk(x, W_enc, b_enc, K)
    W_dec = gaussian(D_SAE, D_IN, seed=3)
    torch.testing.assert_close(kernels.decode(code, W_dec), code.dense(D_SAE) @ W_dec)


def test_gradients_equal_autograd_on_the_dense_formula(kernels, data):
    x, W_enc, b_enc = (part.clone().requires_grad_() for part in data)
    W_dec = gaussian(D_SAE, D_IN, seed=3).requires_grad_()
    with torch.no_grad():
        code = REFERENCE.topk(x, W_enc, b_enc, K)
    z = (x @ W_enc + b_enc) * (code.dense(D_SAE) > 0)
    error = z @ W_dec - x.detach()
    error.square().sum().backward()
    with torch.no_grad():
        by_value = kernels.row_dots(2 * error, code, W_dec)
        torch.testing.assert_close(
            kernels.weight_grad(2 * code.values, code, error.detach(), D_SAE), W_dec.grad
        )
        torch.testing.assert_close(kernels.weight_grad(by_value, code, x, D_SAE), W_enc.grad.T)
        ones = torch.ones(len(x), 1).double()
        torch.testing.assert_close(
            kernels.weight_grad(by_value, code, ones, D_SAE).squeeze(1), b_enc.grad
        )


def float32_inputs(kind, kernels):
    """Enough latents for work in groups; small integers, of which float32 makes no error."""
    d_sae = 160 if interpreted(kernels) else 1024
    x, W = few(kernels, integers(300, D_IN)), integers(D_IN, d_sae, seed=1)
    b = integers(d_sae, seed=2)
    if kind == "all equal":
        x, W, b = torch.ones_like(x), torch.ones_like(W), torch.zeros_like(b)
    if kind == "few positive":
        b = b - 30
    return x.float(), W.float(), b.float()


@pytest.mark.parametrize("kind", ["random", "all equal", "few positive"])
@pytest.mark.parametrize("k", [1, 7, 32, 1024])
def test_in_float32_too_a_selection_equals_the_oracle_on_ties_and_gaps(kernels, kind, k):
    x, W_enc, b_enc = float32_inputs(kind, kernels)
    assert_same_code(kernels.topk(x, W_enc, b_enc, k), REFERENCE.topk(x, W_enc, b_enc, k))


def test_a_nan_ranks_first_in_its_row_and_no_other_row_notices(kernels):
    x, W_enc, b_enc = float32_inputs("random", kernels)
    wanted = kernels.topk(x, W_enc, b_enc, 5)
    x[7] = float("nan")
    got = kernels.topk(x, W_enc, b_enc, 5)
    others = [row for row in range(len(x)) if row != 7]
    torch.testing.assert_close(got.dense(len(b_enc))[others], wanted.dense(len(b_enc))[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_and_gradients_of_latents_equal_those_of_numpy(kernels, dtype):
    x, W_enc, b_enc = (part.to(dtype) for part in float32_inputs("random", kernels))
    W_dec, b_dec = integers(len(b_enc), D_IN, seed=3).to(dtype), integers(D_IN, seed=4).to(dtype)
    code = REFERENCE.topk(x, W_enc, b_enc, 9)
    error, dots = kernels.errors(code, x, W_dec, b_dec)
    z = code.dense(len(b_enc)).double().numpy()
    by_hand = z @ W_dec.double().numpy() + b_dec.double().numpy() - x.double().numpy()
    np.testing.assert_array_equal(error.double().numpy(), by_hand)
    all_dots = by_hand @ W_dec.double().numpy().T
    np.testing.assert_array_equal(
        dots.double().numpy(), all_dots[code.row_of.numpy(), code.indices.numpy()]
    )
    by_value = integers(len(dots), seed=5).to(dtype)
    found = kernels.latent_gradients(code, by_value, x, error, 0.5, len(b_enc))
    weights = np.zeros_like(z)
    weights[code.row_of.numpy(), code.indices.numpy()] = by_value.double().numpy()
    np.testing.assert_array_equal(found.W_enc.double().numpy(), weights.T @ x.double().numpy())
    np.testing.assert_array_equal(found.b_enc.double().numpy(), weights.sum(axis=0))
    np.testing.assert_array_equal(found.W_dec.double().numpy(), 0.5 * z.T @ by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_unit_decoder_lie_on_the_sphere_and_know_their_length(kernels, dtype):
    x, W_enc, b_enc = (part.to(dtype) for part in float32_inputs("random", kernels))
    unit = gaussian(len(b_enc), D_IN, seed=3)
    unit = (unit / unit.norm(dim=1, keepdim=True)).to(dtype)
    code = REFERENCE.topk(x, W_enc, b_enc, 9)
    error, dots = REFERENCE.errors(code, x, unit, x[0])
    free = REFERENCE.latent_gradients(code, dots, x, error, 1.0, len(b_enc))
    memory = LatentGradients.empty(len(b_enc), x)
    found = kernels.latent_gradients(code, dots, x, error, 1.0, len(b_enc), unit, memory)
    along = (free.W_dec.double() * unit.double()).sum(dim=1, keepdim=True)
    wanted = free.W_dec.double() - along * unit.double()
    scale = float(free.W_dec.abs().max())
    near = {"rtol": 0.0, "atol": (1e-5 if dtype == torch.float32 else 1e-12) * scale}
    torch.testing.assert_close(found.W_dec.double(), wanted, **near)
    parts = (found.W_enc, found.W_dec, found.b_enc[:, None])
    lengths = sum(part.double().square().sum(dim=1) for part in parts)
    torch.testing.assert_close(found.squared.double(), lengths, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "unit"), [((40, 6), False), ((40, 6), True), ((40,), False)])
def test_adamw_moves_as_torchs_optimiser_does(kernels, dtype, shape, unit):
    start = gaussian(*shape).to(dtype)
    twin = torch.nn.Parameter(start.clone().double())
    optimiser = torch.optim.AdamW([twin], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    weights, mean, power = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for number in (1, 2, 3):
        gradient = gaussian(*shape, seed=number).to(dtype)
        twin.grad = gradient.double() * 0.5
        optimiser.step()
        if unit:
            twin.data /= twin.data.norm(dim=1, keepdim=True)
        step = AdamStep(number, 0.1, 0.8, 0.9, 1e-6, 0.2, factor=0.5)
        kernels.adamw(weights, mean, power, gradient, step, unit=unit)
    near = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    )
    torch.testing.assert_close(weights.double(), twin.data, **near)
    torch.testing.assert_close(mean.double(), optimiser.state[twin]["exp_avg"], **near)
    torch.testing.assert_close(power.double(), optimiser.state[twin]["exp_avg_sq"], **near)


def test_results_do_not_depend_on_the_number_of_threads(kernels):
    x, W_enc, b_enc = (part.float() for part in inputs("random"))
    x = few(kernels, x)
    W_dec = gaussian(D_SAE, D_IN, seed=3).float()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        code = kernels.topk(x, W_enc, b_enc, K)
        results.append((code.values, kernels.decode(code, W_dec)))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_sparse_kernels_hold_no_array_of_rows_by_latents():
    x, W_enc = torch.randn(4096, 8), torch.randn(8, 4096)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    with Watch():
        code = KERNELS["torch_sparse"]().topk(x, W_enc, torch.zeros(4096), 4)
    assert max(largest) < x.shape[0] * W_enc.shape[1] / 8
    assert isinstance(code, SparseCode)
