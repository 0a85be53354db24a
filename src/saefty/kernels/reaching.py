"""What exceeds a floor, and the n largest of a batch: screened in bfloat16, decided in float32.

A latent's pre-activation matters where it exceeds that latent's floor: a threshold, or where an
estimated gradient begins. As in `screened.py`, a product in bfloat16 says for most entries that
they lie below, and each of the others is computed anew in float32 and compared: which entries are
returned, and their values, is float32's answer for certain. The n largest of a batch need no
search of their own. A few of its rows suggest a floor that somewhat more than n entries exceed; if
n do, the n largest of all are among them, and if the rows misled, the batch is done without.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefty.kernels.base import SparseCode, SparseKernels, affine
from saefty.kernels.compiled import call, library, plain
from saefty.kernels.screened import (
    LEAST_LATENTS,
    LEAST_ROWS,
    LEAST_WIDTH,
    ROUNDING,
    ROWS,
    Screened,
    product_holds,
)

SAMPLE_ROWS = 128
"""Rows, spread over a batch, that say what to expect of it."""

MARGIN = 1.25
"""How many times as many entries as asked for the floor of a batch is to let through."""

CROWDED_SHARE = 0.1
"""With a larger share of entries above their floors, computing each anew does not pay."""


UNIT = 2.0**-23
"""Largest relative error of a float32 difference, and to spare."""


class Reaching(Screened):
    """Selections by a floor, compiled."""

    def batch_topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        n: int,
    ) -> SparseCode:
        """Take all that exceeds a floor, and of it the n largest; of equal ones the first."""
        x, W_enc, b_enc = x.detach(), _by_latents(W_enc), b_enc.detach()
        if n > 0 and is_large(x, W_enc, b_enc):
            floor = _expected(x, W_enc, b_enc, n)
            code = self.reach(x, W_enc, b_enc, torch.full_like(b_enc, floor), CROWDED_SHARE)
            if code is not None and (len(code.values) >= n or floor <= 0):
                return self._descending(_first(code, n))
        return super().batch_topk(x, W_enc, b_enc, n)

    def above(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        threshold: Float[Tensor, "d_sae"],
    ) -> SparseCode:
        """Compute what is near its threshold anew."""
        code = self.reach(x, W_enc, b_enc, threshold.clamp(min=0), CROWDED_SHARE)
        if code is None:
            return super().above(x, W_enc, b_enc, threshold)
        return self._descending(code)

    def reach(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        floors: Float[Tensor, "d_sae"],
        most: float,
    ) -> SparseCode | None:
        """Return the entries above their floors; see the function of this name."""
        x, W_enc, b_enc, floors = x.detach(), _by_latents(W_enc), b_enc.detach(), floors.detach()
        if not is_large(x, W_enc, b_enc, floors):
            return None
        found = library().functions
        assert found is not None, "compiled kernels are there"
        screen = self.screen(W_enc, torch.zeros_like(b_enc), 1)
        (_, d_in), d_sae = x.shape, len(b_enc)
        shape = (min(ROWS, len(x)), d_sae)
        rough = torch.empty(shape, dtype=torch.bfloat16)
        latents, values = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        without_bias = floors - b_enc
        parts = []
        for start in range(0, len(x), ROWS):
            part = x[start : start + ROWS]
            n, rounded = len(part), part.bfloat16()
            torch.mm(rounded, screen.rough.T, out=rough[:n])
            counts = torch.empty(n, dtype=torch.long)
            bounds, share = screen.bound(part, rounded), ROUNDING / (1 - ROUNDING)
            # The floor less the bias is rounded, by less than this.
            bounds += UNIT * (floors.abs().max() + b_enc.abs().max())
            call(found.may_reach, rough, without_bias, bounds, n, d_sae, share, latents, counts)
            if int(counts.sum()) > 2 * most * n * d_sae:
                return None
            call(
                found.reach,
                part, screen.W, b_enc, floors, n, d_in, d_sae, latents, counts, values,
            )  # fmt: skip
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            total = int(offsets[-1])
            kept = values.new_empty(total), torch.empty(total, dtype=torch.long)
            call(found.joined, latents, values, offsets, n, d_sae, kept[1], kept[0])
            parts.append(SparseCode(*kept, offsets))
        code = _stacked(parts)
        return code if len(code.values) <= most * len(x) * d_sae else None

    def _descending(self, code: SparseCode) -> SparseCode:
        found = library().functions
        assert found is not None, "compiled kernels are there"
        call(found.descending, code.values, code.indices, code.offsets, code.n_rows)
        return code


def reach(
    kernels: SparseKernels,
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    floors: Float[Tensor, "d_sae"],
    most: float,
) -> SparseCode | None:
    """Return the pre-activations above each latent's floor, whichever sign they have.

    Within a row they come by latent.

    Args:
        kernels: The arithmetic to use.
        x: What is encoded.
        W_enc: The encoder.
        b_enc: Its bias.
        floors: What an entry must exceed.
        most: The largest share of entries that is worth it; None is returned where there are more.
    """
    x, W_enc, b_enc, floors = x.detach(), _by_latents(W_enc), b_enc.detach(), floors.detach()
    if not _is_few(x, W_enc, b_enc, floors, most):
        return None
    if isinstance(kernels, Reaching) and is_large(x, W_enc, b_enc, floors):
        return kernels.reach(x, W_enc, b_enc, floors, most)
    parts = []
    for part in x.split(ROWS) if len(x) else ():
        pre = affine(part, W_enc, b_enc)
        rows, indices = (pre > floors).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(part))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        parts.append(SparseCode(pre[rows, indices], indices, offsets))
    code = _stacked(parts or [SparseCode.from_dense(x.new_zeros(0, len(b_enc)))])
    return code if len(code.values) <= most * len(x) * len(b_enc) else None


def is_large(x: Tensor, W_enc: Tensor, *per_latent: Tensor) -> bool:
    """Return whether the compiled selections take these, and screening them pays."""
    (rows, d_in), d_sae = x.shape, W_enc.shape[1]
    large = rows >= LEAST_ROWS and d_sae >= LEAST_LATENTS and d_in >= LEAST_WIDTH
    return large and plain(x, W_enc.T, *per_latent) and product_holds(d_in)


def _by_latents(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """Return an encoder in the order of memory that the C functions read; a run's is so already."""
    return W_enc.detach().T.contiguous().T


def _glance(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
) -> Float[Tensor, "some d_sae"]:
    """Return about what some rows' pre-activations are."""
    some = x[:: max(1, len(x) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    if is_large(x, W_enc, b_enc):
        return torch.mm(some.bfloat16(), W_enc.bfloat16()).float() + b_enc
    return affine(some, W_enc, b_enc)


def _is_few(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    floors: Float[Tensor, "d_sae"],
    most: float,
) -> bool:
    """Return whether few entries of a few rows exceed their floors."""
    pre = _glance(x, W_enc, b_enc)
    return int((pre > floors).sum()) <= most * pre.numel()


def _expected(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    n: int,
) -> float:
    """Return what somewhat more than n pre-activations of all rows will exceed; 0 or above."""
    pre = _glance(x, W_enc, b_enc).view(-1)
    wanted = math.ceil(MARGIN * n * len(pre) / (len(x) * len(b_enc)))
    if wanted >= len(pre):
        return 0.0
    ordered = np.partition(pre.numpy(), len(pre) - wanted)
    return max(0.0, float(ordered[len(pre) - wanted]))


def _first(code: SparseCode, n: int) -> SparseCode:
    """Return the n largest entries, order kept; of equal ones the first."""
    if len(code.values) <= n:
        return code
    values = code.values.numpy()
    least = np.partition(values, len(values) - n)[len(values) - n]
    keep = values > least
    equal = np.flatnonzero(values == least)
    keep[equal[: n - int(keep.sum())]] = True
    ends = np.concatenate([[0], keep.cumsum()])[code.offsets.numpy()]
    kept = torch.from_numpy(np.flatnonzero(keep))
    return SparseCode(code.values[kept], code.indices[kept], torch.from_numpy(ends))


def _stacked(codes: list[SparseCode]) -> SparseCode:
    """Return codes of rows below each other as one."""
    counts = torch.cat([code.l0 for code in codes])
    return SparseCode(
        torch.cat([code.values for code in codes]),
        torch.cat([code.indices for code in codes]),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    )
