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
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.kernels.base import KERNELS, SparseCode, largest
from saefty.kernels.torch_sparse import TopkTable, TorchSparse, pair_dots

ROWS = 512
"""Rows screened at once: their product stays in cache."""

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


@KERNELS.register("screened")
class Screened(TorchSparse):
    """The pure-torch kernels, with the encoder's product screened in bfloat16."""

    caution = 1.0
    """What the bound on the error is multiplied by; 0, in training alone, takes it for exact."""

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
        pre = torch.empty(min(ROWS, len(x)), len(b_enc), dtype=torch.bfloat16)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            values[part], indices[part] = screen.topk(x[part], k, pre)
        return SparseCode.from_table(values, indices)

    def screen(
        self, W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, "d_sae"], coarser: int
    ) -> "Screen":
        """Round an encoder, a part that stays in cache at a time."""
        W = W_enc.T.contiguous()
        rough = torch.empty_like(W, dtype=torch.bfloat16)
        norms, lost = W.new_empty(len(W)), W.new_empty(len(W))
        for start in range(0, len(W), ROWS):
            part = slice(start, start + ROWS)
            rough[part] = W[part]
            torch.linalg.vector_norm(W[part], dim=1, out=norms[part])
            torch.linalg.vector_norm(W[part] - rough[part].float(), dim=1, out=lost[part])
        longest, farthest = float(norms.max()), float(lost.max())
        return Screen(W, b_enc, rough, b_enc.bfloat16(), longest, farthest, coarser, self.table)


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
        buffer: Float[Tensor, "most_rows d_sae"],
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """Return the k largest of each row, descending, of equal ones the lower latent first."""
        rough_x, pre = x.bfloat16(), buffer[: len(x)]
        torch.addmm(self.rough_bias, rough_x, self.rough.T, out=pre)
        # As integers, positive bfloat16 numbers are in the same order, and negative ones below.
        pre = pre.view(torch.int16)
        groups = pre.view(len(x), MEMBERS, -1).amax(1)
        reached = groups.view(len(x), self.coarser, -1).amax(1).view(torch.bfloat16).float()
        reached = reached.topk(k, dim=1, sorted=False).values.amin(1)
        floor = (reached * (1 - ROUNDING) - 2 * self.bound(x, rough_x)) / (1 + ROUNDING)
        sure = (floor > 0) & floor.isfinite()
        # The number before the floor rounded to bfloat16 is below the floor, whichever way it went.
        least = torch.where(sure, floor.bfloat16().view(torch.int16) - 1, NEVER)[:, None]
        rows, chosen = (groups >= least).nonzero(as_tuple=True)
        if not bool(sure.any()) or len(rows) > CROWDED * k * len(x):
            return self.table(x, self.W.T, self.b, k)
        rows, latents = _members(pre, least, rows, chosen)
        values, indices = self.exact(x, rows, latents, k)
        unsure = (~sure).nonzero().squeeze(1)
        if len(unsure):
            values[unsure], indices[unsure] = self.table(x[unsure], self.W.T, self.b, k)
        return values, indices

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
        """Return the k largest of each row's candidates by their float32 pre-activations."""
        counts = torch.bincount(rows, minlength=len(x))
        starts = counts.cumsum(0) - counts
        width = max(k, int(counts.max()))
        places = rows * width + torch.arange(len(rows)) - starts[rows]
        order = torch.sort(latents.int(), stable=True).indices
        rows, latents, places = rows[order], latents[order], places[order]
        values = pair_dots(x, self.W, rows, latents) + self.b[latents]
        table = x.new_full((len(x) * width,), -torch.inf)
        names = torch.zeros(len(x) * width, dtype=torch.long)
        table[places], names[places] = values, latents
        return largest(table.view(-1, width), k, names.view(-1, width))


def _members(
    pre: Int[Tensor, "rows d_sae"],
    least: Int[Tensor, "rows 1"],
    rows: Int[Tensor, "chosen"],
    groups: Int[Tensor, "chosen"],
) -> tuple[Int[Tensor, "candidates"], Int[Tensor, "candidates"]]:
    """Return row and latent of what is at least its row's least within the groups chosen."""
    d_sae = pre.shape[1]
    n_groups = d_sae // MEMBERS
    places = (rows * d_sae + groups)[:, None] + torch.arange(MEMBERS) * n_groups
    hits = (pre.view(-1)[places] >= least[rows]).view(-1).nonzero().squeeze(1)
    found = places.view(-1)[hits]
    rows = rows[hits // MEMBERS]
    return rows, found - rows * d_sae


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
