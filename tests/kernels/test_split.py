"""Float32 products out of bfloat16 parts are as accurate as float32, or left to torch."""

import threading

import pytest
import torch

from saefty import matmul
from saefty.kernels import split
from saefty.kernels.split import SplitProducts, multiply

SHAPES = [
    (64, 64, 64), (100, 300, 129), (33, 31, 17), (1, 512, 515), (700, 1100, 60), (40, 5, 300),
    (2100, 600, 530), (300, 530, 75),
]  # fmt: skip
LAYOUTS = ["by row", "by column"]

tiles = pytest.mark.skipif(not split.ready(), reason="this processor has no tile registers")


def draw(*shape, seed=0, layout="by row"):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers if layout == "by row" else numbers.T.contiguous().T


def error(found, x, w, plus=0.0):
    """Return the largest error of an entry against float64, relative to what it is the sum of.

    That is the norms of row and column, and what is added to their product.
    """
    true = x.double() @ w.double() + plus
    size = x.double().norm(dim=1)[:, None] * w.double().norm(dim=0) + abs(plus)
    return float(((found.double() - true).abs() / size).max())


@tiles
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_accurate_as_torchs_in_float32(shape, left, right):
    rows, inner, columns = shape
    x, w = draw(rows, inner, layout=left), draw(inner, columns, seed=1, layout=right)
    bias, out = draw(columns, seed=2), torch.full((rows, columns + 7), 7.0)
    allowed = max(2 * error(x @ w, x, w), 2**-23)
    assert error(multiply(x, w), x, w) < allowed
    assert error(multiply(x, w, bias), x, w, bias.double()) < allowed
    assert multiply(x, w, bias, out[:, :columns]).data_ptr() == out.data_ptr()
    assert error(out[:, :columns], x, w, bias.double()) < allowed
    assert torch.equal(out[:, columns:], torch.full((rows, 7), 7.0))


@tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_added_to_what_is_there(shape):
    rows, inner, columns = shape
    x, w, there = (
        draw(rows, inner, layout="by column"),
        draw(inner, columns, seed=1),
        draw(rows, columns),
    )
    out = there.clone()
    multiply(x, w, out=out, add=True)
    assert error(out, x, w, there.double()) < 2**-23


@tiles
def test_whole_numbers_of_24_bits_are_multiplied_exactly():
    bits = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**23), 2**23, (64, 512), generator=bits).float()
    w = torch.zeros(512, 64)
    w[torch.arange(64) * 8, torch.arange(64)] = 1.0
    assert torch.equal(multiply(x, w), x[:, ::8])
    assert torch.equal(multiply(w.T.contiguous(), x.T.contiguous()), x[:, ::8].T)
    x = torch.randint(-(2**11), 2**11, (96, 500), generator=bits).float()
    w = torch.randint(-7, 8, (500, 70), generator=bits).float()
    assert torch.equal(multiply(x, w).double(), x.double() @ w.double())


@tiles
@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e30])
def test_accuracy_does_not_depend_on_the_scale_of_numbers(scale):
    x, w = draw(64, 200) * scale, draw(200, 64, seed=1)
    x[:, ::3] *= 1e-6
    assert error(multiply(x, w), x, w) < 2**-23


@tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, -1e38, 1e-31])
@pytest.mark.parametrize("where", ["left", "right"])
def test_numbers_that_do_not_fit_are_left_to_torch(bad, where):
    x, w = draw(128, 512), draw(512, 600, seed=1)
    (x if where == "left" else w.T)[5] = bad
    assert multiply(x, w) is None
    with SplitProducts(), torch.no_grad():
        found = x @ w
    torch.testing.assert_close(found, x @ w, rtol=0, atol=0, equal_nan=True)


@tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_does_not_fit_is_not_added_and_what_was_there_stays(bad):
    x, w, out = draw(64, 512), draw(512, 600, seed=1), draw(64, 600, seed=2)
    before = out.clone()
    x[5, 7] = bad
    assert multiply(x, w, out=out, add=True) is None
    assert torch.equal(out, before)


@tiles
@pytest.mark.parametrize("shape", [(300, 700, 900), (900, 300, 900), (2500, 70, 65), (50, 90, 70)])
def test_the_last_bits_do_not_depend_on_the_number_of_threads(shape):
    """Shares of rows, of columns, of both, and more threads than shares."""
    rows, inner, columns = shape
    x, w = draw(rows, inner), draw(inner, columns, seed=1)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 4, 6, 7, 16):
            torch.set_num_threads(threads)
            found.append(multiply(x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@tiles
def test_torchs_own_tiles_work_before_and_behind_it():
    x, w = draw(256, 512), draw(512, 256, seed=1)
    rough = x.bfloat16() @ w.bfloat16()
    for _ in range(2):
        multiply(x, w)
        assert torch.equal(x.bfloat16() @ w.bfloat16(), rough)


LAYER = torch.nn.Linear(512, 600)
X, W, B = draw(2, 128, 512), draw(512, 600, seed=1), draw(600, seed=2)
CALLS = {
    "linear": lambda: torch.nn.functional.linear(X, W.T.contiguous(), B),
    "linear without a bias": lambda: torch.nn.functional.linear(X, W.T),
    "a layer": lambda: LAYER(X),
    "addmm": lambda: torch.addmm(B, X[0], W),
    "addmm into memory": lambda: torch.addmm(B, X[0], W, out=torch.empty(128, 600)),
    "a tensor's addmm_": lambda: torch.ones(128, 600).addmm_(X[0], W),
    "mm": lambda: torch.mm(X[0], W),
    "a tensor's mm": lambda: X[0].mm(W),
    "mm into memory": lambda: torch.mm(X[0], W, out=torch.empty(128, 600)),
    "matmul": lambda: torch.matmul(X, W),
    "a tensor's matmul": lambda: X.matmul(W),
    "the operator": lambda: X @ W,
}
LEFT = {
    "few rows": lambda: X[0, :4] @ W,
    "little work": lambda: X[0, :, :64] @ W[:64, :64],
    "float64": lambda: X.double() @ W.double(),
    "batches on both sides": lambda: X @ W[:, :64].expand(2, 512, 64),
    "a vector": lambda: X @ W[:, 0],
    "a bias for each entry": lambda: torch.addmm(torch.ones(128, 600), X[0], W),
    "another factor": lambda: torch.addmm(B, X[0], W, alpha=2.0),
    "arguments by name": lambda: torch.mm(input=X[0], mat2=W),
    "rows apart": lambda: X[0] @ W.repeat_interleave(2, 1)[:, ::2],
    "a sparse matrix": lambda: X[0].to_sparse_csr() @ W,
    "a gradient": lambda: X @ W.clone().requires_grad_(),
}


@pytest.fixture
def taken(monkeypatch):
    """Return the shapes of products that are multiplied in parts."""
    shapes, true = [], split.multiply

    def watched(x, w, *rest, **options):
        found = true(x, w, *rest, **options)
        if found is not None:
            shapes.append((*x.shape, w.shape[1]))
        return found

    monkeypatch.setattr(split, "multiply", watched)
    return shapes


@tiles
@pytest.mark.parametrize("name", CALLS)
def test_torchs_large_products_go_this_way_with_the_same_result(name, taken):
    wanted = CALLS[name]().detach()
    with torch.no_grad(), SplitProducts():
        found = CALLS[name]()
    assert len(taken) == 1
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", LEFT)
def test_other_products_are_torchs_to_the_bit(name, taken):
    wanted = LEFT[name]()
    with SplitProducts():
        found = LEFT[name]()
    assert not taken
    assert torch.equal(found, wanted)


@tiles
def test_it_holds_in_the_thread_that_entered_and_until_it_leaves(taken):
    def elsewhere():
        with torch.no_grad():
            _ = X @ W

    with torch.no_grad(), matmul.products(matmul.TILES):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not taken
        with matmul.products():
            _ = X @ W
        _ = X @ W
    _ = X @ W
    assert len(taken) == 2


def test_without_tiles_there_is_no_such_way(monkeypatch):
    monkeypatch.setattr(split, "ready", lambda: False)
    assert multiply(draw(64, 512), W) is None
    matmul.measured.cache_clear()
    try:
        assert matmul.TILES not in matmul.measured()
        assert matmul.choose(matmul.TILES) != matmul.TILES
    finally:
        matmul.measured.cache_clear()
