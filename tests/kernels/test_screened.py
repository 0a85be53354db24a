"""The screened selection is the float32 one, whatever the bfloat16 product does."""

import pytest
import torch

from saefty.kernels import screened, tiles
from saefty.kernels.base import KERNELS
from saefty.kernels.compiled import library

D_IN, D_SAE, K, ROWS = 64, 2048, 8, 600
SCREENED, DIRECT = KERNELS["screened"](), KERNELS["torch_sparse"]()


@pytest.fixture(params=["screened", "cpu", "cpu without tiles"])
def screening(request, monkeypatch):
    name, _, without = request.param.partition(" without ")
    if name == "cpu" and library().functions is None:
        pytest.skip(library().reason)
    if without:
        monkeypatch.setattr(tiles, "ready", lambda: False)
    return KERNELS[name]()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind):
    x, W, b = draw(ROWS, D_IN), draw(D_IN, D_SAE, seed=1) / 8, draw(D_SAE, seed=2) / 10
    if kind == "latents of very different sizes":
        W = W * torch.logspace(-2, 1, D_SAE)
    if kind == "rows of very different sizes":
        x = x * torch.logspace(-6, 6, ROWS)[:, None]
    if kind == "large biases":
        b = b * 1000
    if kind == "few latents positive":
        b = b - 4.5
    if kind == "no latent positive in half of the rows":
        x[::2], b = 0, b - 1
    if kind == "all latents alike":
        W, b = W[:, :1].expand(D_IN, D_SAE), torch.zeros(D_SAE)
    if kind == "latents in pairs":
        W, b = W[:, : D_SAE // 2].repeat(1, 2), b[: D_SAE // 2].repeat(2)
    if kind == "closer than bfloat16 can tell":
        W = W[:, :1] + 1e-4 * W
    if kind.startswith("duplicates"):
        W, b = W[:, :1] + float(kind.split()[1]) * W, torch.zeros(D_SAE)
    if kind == "copies of each latent 1e-5 apart":
        W = W[:, : D_SAE // 64].repeat(1, 64) + 1e-5 * W
    if kind == "norms of latents from 1e-12 to 1e12":
        W, b = W * torch.logspace(-12, 12, D_SAE), torch.zeros(D_SAE)
    if kind == "one number a thousand times the others":
        x[:, 3] += 1000
    if kind == "all rows alike":
        x = x[:1].repeat(ROWS, 1)
    if kind in VANISHING:
        W, b = W[:, :1] + VANISHING[kind][0] * W, torch.zeros(D_SAE)
        x, W = x * VANISHING[kind][1], W * VANISHING[kind][2]
    return x, W.T.contiguous().T, b


VANISHING = {
    "rows whose squares vanish": (0.03, 1e-25, 1.0),
    "latents whose squares vanish": (0.03, 1.0, 1e-25),
    "rows whose squares vanish by latents of 1e15": (0.03, 1e-25, 1e15),
    "rows that units for bfloat16 take for 0": (1.0, 1e-38, 1.0),
}
"""How like each other latents are, and factors for rows and latents."""

KINDS = [
    "gaussian", "latents of very different sizes", "rows of very different sizes", "large biases",
    "few latents positive", "no latent positive in half of the rows", "all latents alike",
    "latents in pairs", "closer than bfloat16 can tell", "duplicates 1e-7 apart",
    "duplicates 1e-3 apart",
    "copies of each latent 1e-5 apart", "norms of latents from 1e-12 to 1e12",
    "one number a thousand times the others", "all rows alike", *VANISHING,
]  # fmt: skip


@pytest.mark.parametrize("k", [K, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_latents_chosen_are_those_of_float64(screening, kind, k):
    x, W, b = inputs(kind)
    code = screening.topk(x, W, b, k)
    pre = (x.double() @ W.double() + b.double()).relu()
    wanted = pre.topk(k, dim=1).values
    scale = x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=0).max() + b.abs().max()
    got = code.dense(D_SAE).double()
    # What was chosen is worth as much as the best choice, to float32's rounding.
    chosen = torch.where(got > 0, pre, 0.0).topk(k, dim=1).values
    assert ((chosen - wanted).abs() <= 1e-6 * scale).all()
    assert ((torch.where(got > 0, got - pre, 0.0)).abs() <= 1e-6 * scale).all()
    assert (code.l0 <= k).all()


def chosen_without_a_bound(x, W, b, k, spare=24):
    """Return what top-(k + spare) of the bfloat16 product finds, the k largest by float64."""
    rough = torch.addmm(b.bfloat16(), x.bfloat16(), W.bfloat16())
    pre = (x.double() @ W.double() + b.double()).relu()
    return pre.gather(1, rough.topk(k + spare, dim=1).indices).topk(k, dim=1).values


def test_candidates_without_a_bound_would_miss_latents_here():
    x, W, b = inputs("duplicates 1e-3 apart")
    pre = (x.double() @ W.double() + b.double()).relu()
    scale = x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=0).max()
    missed = pre.topk(K, dim=1).values - chosen_without_a_bound(x, W, b, K)
    assert float((missed / scale).max()) > 1e-5  # what is chosen may be off by 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_rough_number_is_farther_from_float64_than_the_bound_says(screening, kind):
    x, W, b = inputs(kind)
    screen = screening.screen(W, b, 1)
    rough = torch.addmm(screen.rough_bias, x.bfloat16(), screen.rough.T).double()
    true = x.double() @ W.double() + b.double()
    bound = screen.bound(x, x.bfloat16()).double()[:, None]
    assert ((rough - true).abs() <= bound + screened.ROUNDING * rough.abs()).all()


@pytest.mark.parametrize("where", ["weights", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_latent_that_is_not_finite_leaves_the_choice_to_float32(screening, where, bad):
    x, W, b = inputs("gaussian")
    (W if where == "weights" else b)[..., 7] = bad
    one, two = (kernels.topk(x, W, b, K) for kernels in (screening, DIRECT))
    assert torch.equal(one.offsets, two.offsets)
    assert torch.equal(one.indices, two.indices)
    torch.testing.assert_close(one.values, two.values)


def test_where_fewer_than_k_are_positive_all_of_them_are_kept(screening):
    x, W, b = inputs("gaussian")
    b = torch.full_like(b, -3.1)
    code = screening.topk(x, W, b, 64)
    pre = (x.double() @ W.double() + b.double()).relu()
    assert ((pre > 0).sum(dim=1) < 64).all()
    sure = pre > 1e-5
    assert torch.equal(code.dense(D_SAE)[sure] > 0, torch.ones(int(sure.sum()), dtype=torch.bool))
    torch.testing.assert_close(code.dense(D_SAE).double(), pre, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["all latents alike", "latents in pairs"])
def test_of_equal_latents_the_lower_index_is_kept(screening, kind):
    x, W, b = inputs(kind)
    code = screening.topk(x, W, b, K)
    for row in (0, 1, ROWS - 1):
        mine = slice(code.offsets[row], code.offsets[row + 1])
        pairs = list(zip((-code.values[mine]).tolist(), code.indices[mine].tolist(), strict=True))
        assert pairs == sorted(pairs)
        assert (code.indices[mine] < D_SAE // 2).any() or not pairs


def test_most_latents_are_ruled_out_and_no_row_is_done_anew(monkeypatch):
    seen = []
    exact = screened.Screen.exact

    def watch(self, x, rows, latents, k):
        seen.append(len(rows) / len(x))
        return exact(self, x, rows, latents, k)

    monkeypatch.setattr(screened.Screen, "exact", watch)
    monkeypatch.setattr(type(SCREENED), "table", lambda *_: pytest.fail("a row was done anew"))
    SCREENED.topk(*inputs("gaussian"), K)
    assert len(seen) == -(-ROWS // screened.ROWS)
    assert K <= max(seen) < 5 * K


def test_a_product_that_rounds_otherwise_changes_nothing(screening, monkeypatch):
    x, W, b = inputs("gaussian")
    before = screening.topk(x, W, b, K)
    true = torch.addmm

    def other(bias, x, W, out=None):
        if x.dtype != torch.bfloat16:
            return true(bias, x, W) if out is None else true(bias, x, W, out=out)
        rough = (x.double() @ W.double() + bias.double()).bfloat16()
        return out.copy_(rough) if out is not None else rough

    def other_without_bias(W, x, out=None):
        if x.dtype != torch.bfloat16:
            return multiply(W, x) if out is None else multiply(W, x, out=out)
        calls.append(1)
        rough = (W.double() @ x.double()).bfloat16()
        return out.copy_(rough) if out is not None else rough

    multiply, calls = torch.mm, []
    monkeypatch.setattr(screened.torch, "addmm", other)
    monkeypatch.setattr(screened.torch, "mm", other_without_bias)
    after = screening.topk(x, W, b, K)
    assert torch.equal(before.values, after.values)
    assert torch.equal(before.indices, after.indices)
    assert calls or type(screening) is not type(SCREENED)


def test_memory_that_is_kept_leaves_no_trace_of_another_encoder():
    fresh = [KERNELS["screened"]().topk(*inputs(kind), K) for kind in ("gaussian", "large biases")]
    kernels = KERNELS["screened"]()
    for _ in range(2):
        for kind, wanted in zip(("gaussian", "large biases"), fresh, strict=True):
            code = kernels.topk(*inputs(kind), K)
            assert torch.equal(code.values, wanted.values)
            assert torch.equal(code.indices, wanted.indices)
    x, W, b = inputs("gaussian")  # a narrower encoder, and fewer rows
    x, W, b = x[:300, :-1], W[:-1, : D_SAE // 2].T.contiguous().T.repeat(1, 2), b
    code, wanted = kernels.topk(x, W, b, K), KERNELS["screened"]().topk(x, W, b, K)
    assert torch.equal(code.values, wanted.values)
    assert torch.equal(code.indices, wanted.indices)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(screening, bad):
    x, W, b = inputs("gaussian")
    clean = screening.topk(x, W, b, K)
    x[300, 5] = bad
    code = screening.topk(x, W, b, K)
    assert torch.equal(code.values[: 300 * K], clean.values[: 300 * K])
    assert torch.equal(code.indices[-299 * K :], clean.indices[-299 * K :])


@pytest.mark.parametrize(
    ("rows", "d_sae", "dtype"),
    [(10, D_SAE, torch.float32), (ROWS, 96, torch.float32), (ROWS, D_SAE, torch.float64)],
)
def test_what_is_small_or_not_float32_is_done_directly(screening, rows, d_sae, dtype):
    x, W, b = draw(rows, D_IN).to(dtype), draw(D_IN, d_sae).to(dtype), draw(d_sae).to(dtype)
    one, two = (kernels.topk(x, W, b, K) for kernels in (screening, DIRECT))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.indices, two.indices)
