"""What exceeds its floor, and the n largest of a batch, are float32's, whatever bfloat16 says."""

import pytest
import torch

from saefty.kernels import cpu, reaching
from saefty.kernels.base import KERNELS, LatentGradients
from saefty.kernels.compiled import library
from saefty.kernels.reaching import reach

D_IN, D_SAE, K, ROWS = 64, 2048, 8, 600
DIRECT = KERNELS["torch_sparse"]()


@pytest.fixture
def kernels():
    if library().functions is None:
        pytest.skip(library().reason)
    return KERNELS["cpu"]()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape, seed=0):
    """Small whole numbers: their products are exact in float32 and bfloat16, and ties abound."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def inputs(kind):
    x, W, b = draw(ROWS, D_IN), draw(D_IN, D_SAE, seed=1) / 8, draw(D_SAE, seed=2) / 10
    if kind == "latents of very different sizes":
        W = W * torch.logspace(-2, 1, D_SAE)
    if kind == "rows of very different sizes":
        x = x * torch.logspace(-3, 3, ROWS)[:, None]
    if kind == "large biases":
        b = b * 1000
    if kind == "latents nearly alike":
        W = W[:, :1] + W * 1e-3
    if kind == "a weight of 0":
        W[:, 7], b[7] = 0, 0
    return x, W, b


KINDS = [
    "gaussian",
    "latents of very different sizes",
    "rows of very different sizes",
    "large biases",
    "latents nearly alike",
    "a weight of 0",
]


def floors_for(x, W, b, share=0.03):
    """A floor a latent, of either sign, that about this share of its pre-activations exceeds."""
    return (x @ W + b).quantile(1 - share, dim=0) + draw(D_SAE, seed=3) / 100


@pytest.mark.parametrize("kind", KINDS)
def test_what_exceeds_its_floor_in_float64_is_found_and_nothing_else(kernels, kind):
    x, W, b = inputs(kind)
    floors = floors_for(x, W, b)
    code = kernels.reach(x, W, b, floors, 1.0)
    pre = x.double() @ W.double() + b.double()
    scale = x.double().norm(dim=1)[:, None] * W.double().norm(dim=0) + b.abs().double()
    found = torch.zeros(ROWS, D_SAE, dtype=torch.bool)
    found[code.row_of, code.indices] = True
    assert (pre[found] - code.values.double()).abs().div(scale[found] + 1e-30).max() < 1e-6
    beyond = (pre - floors.double()) / scale.clamp(min=1e-30)
    assert found[beyond > 1e-6].all()
    assert not found[beyond < -1e-6].any()
    assert found.sum() == len(code.values) > ROWS


def test_what_is_found_is_what_comparing_all_entries_finds(kernels):
    x, W, b = whole(ROWS, D_IN), whole(D_IN, D_SAE, seed=1), whole(D_SAE, seed=2)
    floors = whole(D_SAE, seed=3) * 10 + 30
    one, two = (reach(each, x, W, b, floors, 1.0) for each in (kernels, DIRECT))
    assert (one.l0 == 0).any() or one.l0.min() < one.l0.max()
    for name in ("values", "indices", "offsets"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_floors_below_zero_let_negative_entries_through(kernels):
    x, W, b = inputs("gaussian")
    code = reach(kernels, x, W, b, torch.full((D_SAE,), -0.1), 1.0)
    assert (code.values < 0).any()
    assert code.values.min() > -0.1


@pytest.mark.parametrize("name", ["cpu", "torch_sparse"])
def test_too_many_entries_are_left_to_dense_products(name, request):
    if name == "cpu":
        request.getfixturevalue("kernels")
    x, W, b = inputs("gaussian")
    code = reach(KERNELS[name](), x, W, b, torch.zeros(D_SAE), 0.1)
    assert code is None


def test_crowded_rows_that_the_glance_missed_are_noticed(kernels, monkeypatch):
    x, W, b = inputs("gaussian")
    monkeypatch.setattr(reaching, "_is_few", lambda *_: True)
    assert reach(kernels, x, W, b, torch.zeros(D_SAE), 0.1) is None
    assert reach(DIRECT, x, W, b, torch.zeros(D_SAE), 0.1) is None


@pytest.mark.parametrize("kind", ["ties", *KINDS])
@pytest.mark.parametrize("n", [1, K * ROWS, K * ROWS + 3])
def test_the_largest_of_a_batch_are_those_of_float64(kernels, kind, n):
    x, W, b = inputs(kind)
    if kind == "ties":
        x, W, b = whole(ROWS, D_IN), whole(D_IN, D_SAE, seed=1), whole(D_SAE, seed=2)
    code = kernels.batch_topk(x, W, b, n)
    pre = x.double() @ W.double() + b.double()
    assert len(code.values) == n
    wanted = pre.flatten().topk(n).values
    scale = float(x.norm(dim=1).max() * W.norm(dim=0).max() + b.abs().max())
    # What was chosen is worth as much as the best choice, to float32's rounding.
    chosen = pre[code.row_of, code.indices].sort(descending=True).values
    assert (chosen - wanted).abs().max() <= 1e-6 * scale
    for row in (0, 1, ROWS - 1):
        mine = slice(code.offsets[row], code.offsets[row + 1])
        pairs = list(zip((-code.values[mine]).tolist(), code.indices[mine].tolist(), strict=True))
        assert pairs == sorted(pairs)


def test_of_equal_values_of_a_batch_the_earlier_row_and_the_lower_latent_are_kept(kernels):
    x, W, b = whole(ROWS, D_IN), whole(D_IN, D_SAE, seed=1), whole(D_SAE, seed=2)
    for n in (K * ROWS, 37):
        one, two = (each.batch_topk(x, W, b, n) for each in (kernels, KERNELS["reference"]()))
        for name in ("values", "indices", "offsets"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("high", [True, False], ids=["the glance's rows high", "they alone low"])
def test_rows_that_mislead_cost_time_alone(kernels, high):
    x, W, b = whole(ROWS, D_IN), whole(D_IN, D_SAE, seed=1), whole(D_SAE, seed=2)
    seen = torch.arange(ROWS) % (ROWS // reaching.SAMPLE_ROWS) == 0
    x[seen if not high else ~seen] = 0.0
    one, two = (each.batch_topk(x, W, b, K * ROWS) for each in (kernels, DIRECT))
    for name in ("values", "indices", "offsets"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_fewer_positive_values_than_asked_for_are_all_returned(kernels):
    x, W, b = inputs("gaussian")
    one, two = (each.batch_topk(x, W, b - 3.5, K * ROWS) for each in (kernels, DIRECT))
    assert 0 < len(one.values) == len(two.values) < K * ROWS
    assert torch.equal(one.indices, two.indices)
    none = kernels.batch_topk(x, W, b - 99, K * ROWS)
    assert (len(none.values), none.n_rows) == (0, ROWS)


def test_a_product_that_rounds_otherwise_changes_nothing(kernels, monkeypatch):
    x, W, b = inputs("gaussian")
    floors = floors_for(x, W, b)
    before = kernels.reach(x, W, b, floors, 1.0), kernels.batch_topk(x, W, b, K * ROWS)
    true = torch.mm

    def other(x, W, out=None):
        if x.dtype != torch.bfloat16:
            return true(x, W) if out is None else true(x, W, out=out)
        rough = (x.double() @ W.double()).bfloat16()
        return rough if out is None else out.copy_(rough)

    monkeypatch.setattr(reaching.torch, "mm", other)
    after = kernels.reach(x, W, b, floors, 1.0), kernels.batch_topk(x, W, b, K * ROWS)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one.values, two.values)
        assert torch.equal(one.indices, two.indices)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(kernels, bad):
    x, W, b = inputs("gaussian")
    floors = floors_for(x, W, b)
    clean = kernels.reach(x, W, b, floors, 1.0)
    x[300, 5] = bad
    code = kernels.reach(x, W, b, floors, 1.0)
    before, behind = int(clean.offsets[300]), len(clean.values) - int(clean.offsets[301])
    assert torch.equal(code.values[:before], clean.values[:before])
    assert torch.equal(code.values[-behind:], clean.values[-behind:])
    assert code.values[torch.isfinite(code.values)].min() > floors.min()


def test_a_weight_that_is_not_finite_hides_no_other_latent(kernels):
    x, W, b = inputs("gaussian")
    floors = floors_for(x, W, b)
    clean = kernels.reach(x, W, b, floors, 1.0)
    W[3, 11] = float("nan")
    code = kernels.reach(x, W, b, floors, 1.0)
    assert torch.equal(code.values, clean.values[clean.indices != 11])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(kernels, threads):
    x, W, b = inputs("gaussian")
    before = torch.get_num_threads()
    floors, wanted = floors_for(x, W, b), []
    try:
        for count in (before, threads):
            torch.set_num_threads(count)
            code = kernels.reach(x, W, b, floors, 1.0)
            found = gradients(kernels, code, x)
            wanted.append([code.values, code.indices, found.W_enc, found.W_dec, found.b_enc])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*wanted, strict=True))


def gradients(kernels, code, x):
    by_value, error = draw(len(code.values), seed=4), draw(ROWS, D_IN, seed=5)
    unit = torch.nn.functional.normalize(draw(D_SAE, D_IN, seed=6))
    found = LatentGradients.empty(D_SAE, x)
    return kernels.latent_gradients(code, by_value, x, error, 0.5, D_SAE, unit, found)


def test_gradients_a_block_of_rows_at_a_time_are_the_same_to_the_bit(kernels, monkeypatch):
    x, W, b = inputs("gaussian")
    x = x.repeat(1, 1)
    code = kernels.reach(x, W, b, floors_for(x, W, b, 0.1), 1.0)
    found = []
    for many in (0, 10**9):
        monkeypatch.setattr(cpu, "MANY", many)
        found.append(gradients(kernels, code, x))
    for name in ("W_enc", "b_enc", "W_dec", "squared"):
        assert torch.equal(*(getattr(one, name) for one in found)), name


def test_errors_a_tile_of_rows_at_a_time_are_the_same_to_the_bit(kernels, monkeypatch):
    x, W, b = inputs("gaussian")
    code = kernels.reach(x, W, b, floors_for(x, W, b, 0.1), 1.0)
    W_dec, b_dec = draw(D_SAE, D_IN, seed=4), draw(D_IN, seed=5)
    found = []
    for crowded in (0, 10**9):
        monkeypatch.setattr(cpu, "CROWDED_ROW", crowded)
        found.append(kernels.errors(code, x, W_dec, b_dec))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
