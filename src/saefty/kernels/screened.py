"""Top-k that multiplies in bfloat16 first, to rule latents out, and in float32 only what is left.

Processors with bfloat16 units multiply several times as fast in it as in float32, but a pre-
activation comes out wrong in its third digit, which swaps latents. So a product in bfloat16 only
screens here. With x̃ and w̃ rounded to bfloat16, Cauchy and Schwarz bound the error of x̃·w̃:

    |x·w - x̃·w̃| <= |x - x̃| |w| + |x̃| |w - w̃|        (norms; rounding of sums is added to it)

which gives each row a bound ε for all latents. At least k latents are screened at t or above, where
t is the k-th largest among the maxima of disjoint groups of latents; so the k-th largest true value
is at least t - ε, and a latent that is screened below t - 2ε cannot be among the k largest. The few
others are computed anew in float32 and compared. The outcome is the float32 top-k for certain: how
the bfloat16 product rounds decides only how many latents are looked at twice. Rows for which the
bound says nothing, because fewer than k latents are clearly positive, are done in float32 at once.

The product has a row for each latent, so that maxima and comparisons are between rows that lie side
by side in memory, and what is found comes sorted by latent, as computing it anew wants it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.kernels.base import KERNELS, SparseCode, largest
from saefty.kernels.torch_sparse import TopkTable, TorchSparse, pair_dots

ROWS = 512
"""Rows screened at once: their product stays in cache."""

LATENTS = 256
"""Latents rounded at once."""

MEMBERS, COARSER = 8, (8, 4, 2, 1)
"""Latents in a group; how many groups the maximum of which `t` is found may join (fewest last)."""

GROUPS_FOR_K = 4
"""There are at least this many times k maxima, so that few more than k latents reach `t`."""

CROWDED = 8
"""With more than this many times k groups a row to look at, screening rules out too little."""

LEAST_ROWS, LEAST_LATENTS, LEAST_WIDTH = 256, 2048, 64
"""Smaller products gain nothing (measured)."""

ROUNDING = 2.0**-8
"""Largest relative error of rounding to bfloat16."""

SUMMING = 2.0**-22
"""Error of a sum of products in float32 for each term, relative to the product of the norms."""

VANISHING = 2.0**-62
"""What a norm can lack for the root of each number, whose square underflows, or is denormal and
taken for 0, as the units for bfloat16 do. The product of two norms covers what such products lack.
"""

NEVER = torch.iinfo(torch.int16).max

PADDING = 16
"""Inputs that are added, one for the bias: products of a width that is no multiple are slower."""


@KERNELS.register("screened")
class Screened(TorchSparse):
    """The pure-torch kernels, with the encoder's product screened in bfloat16."""

    caution = 1.0
    """What the bound on the error is multiplied by; 0, in training alone, takes it for exact."""

    def __init__(self) -> None:
        # Kept, because fresh memory costs as much as filling it.
        self._rough = self._pre = torch.empty(0, dtype=torch.bfloat16)

    def topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Select the k largest of each row, most of them found without a float32 product."""
        coarser = _coarser(x, W_enc, k)
        if not coarser:
            return super().topk(x, W_enc, b_enc, k)
        x, screen = x.detach(), self.screen(W_enc.detach(), b_enc.detach(), coarser)
        values = x.new_empty(len(x), k)
        indices = torch.empty(len(x), k, dtype=torch.long)
        if len(self._pre) < (size := min(ROWS, len(x)) * len(b_enc)):
            self._pre = torch.empty(size, dtype=torch.bfloat16)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            values[part], indices[part] = screen.topk(x[part], k, self._pre)
        return SparseCode.from_table(values, indices)

    def screen(
        self, W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, "d_sae"], coarser: int
    ) -> "Screen":
        """Round an encoder, a part that stays in cache at a time."""
        W = W_enc.T.contiguous()
        d_sae, d_in = W.shape
        if self._rough.shape != (d_sae, d_in + PADDING):
            self._rough = torch.zeros(d_sae, d_in + PADDING, dtype=torch.bfloat16)
        rough, rough_bias = self._rough[:, :d_in], self._rough[:, d_in].copy_(b_enc)
        norms, lost = W.new_empty(d_sae), W.new_empty(d_sae)
        difference = W.new_empty(min(LATENTS, d_sae), d_in)
        for start in range(0, d_sae, LATENTS):
            part = slice(start, start + LATENTS)
            rough[part] = W[part]
            torch.linalg.vector_norm(W[part], dim=1, out=norms[part])
            left = difference[: len(norms[part])].copy_(rough[part]).sub_(W[part])
            torch.linalg.vector_norm(left, dim=1, out=lost[part])
        longest, farthest = float(norms.max()), float(lost.max())
        return Screen(W, b_enc, rough, rough_bias, longest, farthest, coarser, self.table)


def _coarser(x: Float[Tensor, "rows d_in"], W_enc: Float[Tensor, "d_in d_sae"], k: int) -> int:
    """Return how many groups share a maximum, or 0 where screening does not pay."""
    rows, (d_in, d_sae) = len(x), W_enc.shape
    large = rows >= LEAST_ROWS and d_sae >= LEAST_LATENTS and d_in >= LEAST_WIDTH
    known = x.dtype == W_enc.dtype == torch.float32 and x.device.type == "cpu"
    if not (large and known and k > 0 and product_holds(d_in)):
        return 0
    return joined_groups(d_sae, k)


def joined_groups(d_sae: int, k: int) -> int:
    """Return how many groups may share a maximum so that enough are left, or 0 if none may."""
    fits = (
        n for n in COARSER if d_sae % (MEMBERS * n) == 0 and d_sae >= MEMBERS * n * GROUPS_FOR_K * k
    )
    return next(fits, 0)


@dataclass(frozen=True)
class Screen:
    """An encoder in both formats, and the norms that bound what rounding does to its products."""

    W: Float[Tensor, "d_sae d_in"]
    b: Float[Tensor, "d_sae"]
    rough: Float[Tensor, "d_sae d_in"]
    rough_bias: Float[Tensor, "d_sae"]
    longest: float
    """Largest norm of a latent's weights."""
    farthest: float
    """Largest norm of what rounding took from a latent's weights."""
    coarser: int
    table: Callable[..., TopkTable]
    """Selects where screening says too little."""

    def topk(
        self,
        x: Float[Tensor, "rows d_in"],
        k: int,
        memory: Float[Tensor, "most_entries"],
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """Return the k largest of each row, descending, of equal ones the lower latent first."""
        rough_x = x.bfloat16()
        # As integers, positive bfloat16 numbers are in the same order, and negative ones below.
        pre = self.product(rough_x, memory).view(torch.int16)
        groups = pre.view(MEMBERS, -1, len(x)).amax(0)
        maxima = groups.view(self.coarser, -1, len(x)).amax(0).T.contiguous().numpy()
        place = maxima.shape[1] - k
        kth = torch.from_numpy(np.partition(maxima, place, axis=1)[:, place].copy())
        reached = kth.view(torch.bfloat16).float()
        floor = (reached * (1 - ROUNDING) - 2 * self.bound(x, rough_x)) / (1 + ROUNDING)
        sure = (floor > 0) & floor.isfinite()
        # The number before the floor rounded to bfloat16 is below the floor, whichever way it went.
        least = torch.where(sure, floor.bfloat16().view(torch.int16) - 1, NEVER)
        chosen = (groups >= least).view(-1).nonzero().squeeze(1)
        if not bool(sure.any()) or len(chosen) > CROWDED * k * len(x):
            return self.table(x, self.W.T, self.b, k)
        values, indices = self.exact(x, *_members(pre, least, chosen), k)
        unsure = (~sure).nonzero().squeeze(1)
        if len(unsure):
            values[unsure], indices[unsure] = self.table(x[unsure], self.W.T, self.b, k)
        return values, indices

    def product(
        self, rough_x: Float[Tensor, "rows d_in"], memory: Float[Tensor, "most_entries"]
    ) -> Float[Tensor, "d_sae rows"]:
        """Return the screened pre-activations: the bias is what an input that is 1 is weighted by.

        As a summand of the product it would take a pass over the product to itself.
        """
        (rows, d_in), d_sae = rough_x.shape, len(self.b)
        given = rough_x.new_zeros(rows, d_in + PADDING)
        given[:, :d_in] = rough_x
        given[:, d_in] = 1
        padded = self.rough.as_strided((d_sae, d_in + PADDING), self.rough.stride())
        return torch.mm(padded, given.T, out=memory[: d_sae * rows].view(d_sae, rows))

    def bound(
        self, x: Float[Tensor, "rows d_in"], rough: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows"]:
        """Return by how much a screened pre-activation of a row can be wrong, before it is stored.

        The bias, which is rounded too, counts in it.
        """
        vanished = VANISHING * math.sqrt(x.shape[1])
        lost = torch.linalg.vector_norm(x - rough.float(), dim=1) + vanished
        norm = torch.linalg.vector_norm(x, dim=1) + vanished
        longest, farthest = self.longest + vanished, self.farthest + vanished
        products = lost * longest + (norm + lost) * farthest
        sums = norm * longest * (SUMMING * x.shape[1])
        bias = (self.b - self.rough_bias.float()).abs().max() + SUMMING * self.b.abs().max()
        return products + sums + bias

    def exact(
        self,
        x: Float[Tensor, "rows d_in"],
        rows: Int[Tensor, "candidates"],
        latents: Int[Tensor, "candidates"],
        k: int,
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """Return the k largest of each row's candidates, which are given by ascending latent."""
        values = (pair_dots(x, self.W, rows, latents) + self.b[latents]).numpy()
        # Of numbers of 16 bits NumPy's stable sort takes linear time.
        order = np.argsort(rows.numpy().astype(np.int16), kind="stable")
        counts = torch.bincount(rows, minlength=len(x))
        width = max(k, int(counts.max()))
        table = np.full((len(x), width), -np.inf, np.float32)
        table[np.arange(width) < counts.numpy()[:, None]] = values[order]
        best, columns = largest(torch.from_numpy(table), k)
        # A row that has too few candidates, which is done anew, may point behind the last one.
        places = (columns + (counts.cumsum(0) - counts)[:, None]).clamp_(max=len(order) - 1)
        return best, latents[torch.from_numpy(order)][places]


def _members(
    pre: Int[Tensor, "d_sae rows"],
    least: Int[Tensor, "rows"],
    chosen: Int[Tensor, "chosen"],
) -> tuple[Int[Tensor, "candidates"], Int[Tensor, "candidates"]]:
    """Return row and latent of what is at least its row's least within the groups chosen.

    A group that was chosen for a row is given by its place in the product's first groups.
    """
    rows, n_groups = len(least), len(pre) // MEMBERS
    groups = chosen.int().numpy() // rows
    of = chosen.int().numpy() - groups * rows  # dividing once is several times as fast as divmod
    found = pre.view(MEMBERS, -1)[:, chosen] >= least[torch.from_numpy(of)]
    hits = np.flatnonzero(found.numpy())
    member = hits // max(len(of), 1)
    which = hits - member * len(of)
    latents = groups[which] + member * n_groups
    return torch.from_numpy(of[which].astype(np.int64)), torch.from_numpy(latents)


@cache
def product_holds(width: int = 512) -> bool:
    """Return whether torch's bfloat16 products have the precision the bound relies on here."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(64, width, generator=generator).bfloat16() for _ in range(2))
    b = torch.randn(64, generator=generator).bfloat16()
    true = x.double() @ W.double().T + b.double()
    scale = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
    allowed = SUMMING * width * scale + ROUNDING * true.abs()
    return bool(((torch.addmm(b, x, W.T).double() - true).abs() <= allowed).all())
