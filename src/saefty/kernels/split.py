"""Float32 products on processors with tile registers (AMX), out of six products in bfloat16.

A float32 number has 24 bits, which three numbers of bfloat16 hold: x = x1 + x2 + x3. Of the nine
products of such parts of x and w, the six largest are added up in float32; the others are smaller
than what float32 rounds off. So the result is as accurate as that of a float32 product (the trial
of `matmul.py` looks whether it is), and comes up to twice as fast, as tiles multiply bfloat16 about
16 times as fast as vectors multiply float32. Libraries for GPUs emulate float32 by such parts too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from saefty.kernels.compiled import call, library

LEAST_ROWS, LEAST_WORK = 48, 2**25
"""From how many rows, and from how many products of two numbers, on this is faster (measured)."""

LARGEST = 2.0**126
"""Numbers from here on could overflow when they are rounded."""


def ready() -> bool:
    """Return whether compiled kernels are there and this processor lends its tile registers."""
    functions: Any = library().functions  # without tiles, they are not compiled
    return hasattr(functions, "split_product") and bool(functions.tiles_ready())


def multiply(
    x: Float[Tensor, "rows inner"],
    w: Float[Tensor, "inner columns"],
    bias: Float[Tensor, "columns"] | None = None,
    out: Float[Tensor, "rows columns"] | None = None,
    *,
    add: bool = False,
) -> Float[Tensor, "rows columns"] | None:
    """Return x w + bias, or None where it cannot be had this way.

    That is where numbers are not finite or reach 2^126, where 32 neighbours in a row of x or in a
    column of w are all below 2^-100 and not all 0, and where memory is laid out in another way.

    Args:
        x: The left factor.
        w: The right factor.
        bias: What is added to each row.
        out: Memory for the result.
        add: Add to what `out` holds, which is left as it is where None is returned. Of numbers
            below 2^-100 less may arrive there than float32 would add.
    """
    left, right = _layout(x), _layout(w.T)
    functions: Any = library().functions
    if not ready() or left is None or right is None or not _plain(x, w, bias, out):
        return None
    if add and not all(_largest(factor) < LARGEST for factor in (x, w)):
        return None
    rows, columns = len(x), w.shape[1]
    into = x.new_empty(rows, columns) if out is None else out
    unfit = torch.zeros(1, dtype=torch.uint8)
    call(
        functions.split_product,
        x, *left, w, *right, bias if bias is not None else 0, rows, columns, x.shape[1],
        into, into.stride(0), int(add), unfit,
    )  # fmt: skip
    return None if unfit.item() and not add else into


class SplitProducts(TorchFunctionMode):
    """Torch's own products of large float32 matrices go this way while the context is open.

    That holds in this thread, on the CPU, and where no gradient is recorded. What it cannot take,
    torch multiplies.
    """

    def __init__(self, least_rows: int = LEAST_ROWS, least_work: int = LEAST_WORK) -> None:
        super().__init__()
        self.least_rows, self.least_work = least_rows, least_work

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Multiply what a call of torch would, or let torch do it."""
        options = kwargs or {}
        asked = _asked(func, args, options)
        if asked is not None and self._takes(asked):
            found = asked.result()
            if found is not None:
                return found
        return func(*args, **options)

    def _takes(self, asked: "_Asked") -> bool:
        parts = [t for t in (asked.x, asked.w, asked.bias, asked.out) if t is not None]
        if not all(type(t) in (Tensor, Parameter) and t.is_cpu for t in parts):
            return False
        if any(t.layout != torch.strided for t in parts) or asked.w.dim() != 2:
            return False
        inner, columns = asked.w.shape
        if asked.x.dim() < 1 or asked.x.shape[-1] != inner or not inner:
            return False
        rows = asked.x.numel() // inner
        if rows < self.least_rows or rows * asked.w.numel() < self.least_work:
            return False
        if asked.bias is not None and asked.bias.shape != (columns,):
            return False
        if asked.out is not None and asked.out.shape != (rows, columns):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
            return False
        return not torch.is_autocast_enabled("cpu")


@dataclass
class _Asked:
    """A product that torch was asked for."""

    x: Tensor
    w: Tensor
    bias: Tensor | None = None
    out: Tensor | None = None
    add: bool = False

    def result(self) -> Tensor | None:
        shape = self.x.shape[:-1]
        x = self.x if self.x.dim() == 2 else self.x.reshape(math.prod(shape), -1)
        found = multiply(x, self.w, self.bias, self.out, add=self.add)
        return None if found is None else found if self.x.dim() == 2 else found.view(*shape, -1)


def _linear(input: Any, weight: Any, bias: Any = None) -> _Asked | None:
    return _Asked(input, weight.T, bias) if weight.dim() == 2 else None


def _mm(input: Any, other: Any, *, out: Any = None) -> _Asked | None:
    known = isinstance(input, Tensor) and isinstance(other, Tensor)
    return _Asked(input, other, out=out) if known and (out is None or input.dim() == 2) else None


def _addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> _Asked | None:
    return _Asked(mat1, mat2, input, out) if beta == alpha == 1 else None


def _addmm_(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> _Asked | None:
    return _Asked(mat1, mat2, out=input, add=True) if beta == alpha == 1 else None


_HANDLERS: dict[Any, Callable[..., _Asked | None]] = {
    torch.nn.functional.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    Tensor.addmm_: _addmm_,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.matmul: _mm,
    Tensor.matmul: _mm,
    Tensor.__matmul__: _mm,
}


def _asked(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> _Asked | None:
    """Return the product that a call asks for; None if it is none, or asked for in another way."""
    if func not in _HANDLERS:
        return None
    try:
        return _HANDLERS[func](*args, **options)
    except TypeError:  # arguments by other names, or options that few use
        return None


def _layout(x: Tensor) -> tuple[int, int] | None:
    """Return the stride that is not 1, and whether it is the one from column to column."""
    by_row, by_column = x.stride()
    if by_column == 1:
        return by_row, 0
    return (by_column, 1) if by_row == 1 else None


def _plain(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None) -> bool:
    given = [t for t in (x, w, bias, out) if t is not None]
    if not all(t.dtype == torch.float32 and t.is_cpu and t.numel() for t in given):
        return False
    return all(t.stride(-1) == 1 for t in (bias, out) if t is not None)


def _largest(x: Tensor) -> float:
    # Of what lies in columns, torch would make a copy that lies in rows.
    return float(torch.stack((x if x.is_contiguous() else x.T).aminmax()).abs().max())
