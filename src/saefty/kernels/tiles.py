"""Top-k on processors with tile registers (AMX): screened in bfloat16 while the product is made.

`screened.py` says why this gives the float32 top-k for certain; three things are faster here. What
cannot be among the k largest is dropped where it is computed, so no product is ever written down.
Sums stay in float32, so only the factors are rounded. And the k candidates that look largest are
computed in float32 first: another one can only be among the k largest if what bfloat16 says of it
lies below the least of these by no more than the bound, instead of twice that.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.kernels.base import SparseCode
from saefty.kernels.compiled import call, library
from saefty.kernels.reaching import Reaching, is_large
from saefty.kernels.screened import SUMMING, VANISHING

SIDE = 32
"""Widths and numbers of latents are multiples of it, or tiles are not used."""

CANDIDATES, LEAST_CANDIDATES = 4, 256
"""Times k: with more candidates a row, and more than that many, it is done in float32 at once."""


def ready() -> bool:
    """Return whether compiled kernels are there and this processor lends its tile registers."""
    functions = library().functions
    return functions is not None and bool(functions.tiles_ready())


class Tiled(Reaching):
    """Selects the k largest of each row in tiles, where there are any."""

    def __init__(self) -> None:
        super().__init__()
        self._tiles = ready()
        self._packed = torch.empty(0, dtype=torch.bfloat16)

    def topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Select, compute candidates anew, and leave to float32 the rows that are not certain."""
        d_in, d_sae = W_enc.shape
        fits = d_in % SIDE == 0 and d_sae % SIDE == 0 and 0 < k <= d_sae // CANDIDATES
        if not (self._tiles and fits and is_large(x, W_enc, b_enc)):
            return super().topk(x, W_enc, b_enc, k)
        x, W, b = x.detach(), W_enc.detach().T, b_enc.detach()
        functions = library().functions
        assert functions is not None, "tiles are used by compiled kernels"
        if len(self._packed) != W.numel():  # kept, because fresh memory costs as much as filling it
            self._packed = torch.empty(W.numel(), dtype=torch.bfloat16)
        squared, lost = W.new_empty(d_sae), W.new_empty(d_sae)
        call(functions.packed, W, d_sae, d_in, self._packed, squared, lost)
        vanished = VANISHING * math.sqrt(d_in)
        norms = (float(part.max().sqrt()) * self.caution for part in (squared, lost))
        longest, farthest = (norm + vanished for norm in norms)
        values, latents = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.long)
        unsure = torch.empty(len(x), dtype=torch.uint8)
        most = max(LEAST_CANDIDATES, CANDIDATES * k)
        call(
            functions.tile_topk,
            x, W, self._packed, b, len(x), d_in, d_sae, k, most, longest, farthest,
            float(b.abs().max()), SUMMING, vanished, values, latents, unsure,
        )  # fmt: skip
        rest = unsure.nonzero().squeeze(1)
        if len(rest):
            values[rest], latents[rest] = self.table(x[rest], W.T, b, k)
        return SparseCode.from_table(values, latents)
