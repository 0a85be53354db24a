"""Kernels in C++ where loops over rows and latents cost more in torch: selecting, fused gradients.

The encoder's product is torch's, or that of `tiles.py`. What follows it is one pass over each row
or each latent while it lies in cache: which latents can be among the k largest, their float32
values, errors with the dot products of the encoder's gradient, and both gradients of a latent.
Anything but contiguous float32 on the CPU is left to the kernels in torch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.kernels.base import KERNELS, AdamStep, LatentGradients, SparseCode, largest
from saefty.kernels.compiled import call, library, plain
from saefty.kernels.screened import CROWDED, MEMBERS, ROUNDING, Screen, joined_groups
from saefty.kernels.tiles import Tiled
from saefty.kernels.torch_sparse import TopkTable, topk_table

NOT_DECIDED = -1

CROWDED_ROW = 192
"""From this many entries a row on, several rows are decoded latent by latent (measured)."""

MANY = 24
"""From this many entries a latent on, their rows are read block by block (measured)."""

SOME, CACHED, LEAST_SLICE = 8, 2**18, 64
"""With that many entries a latent, rows of more numbers than stay in a core's cache are read by
slices of at least so many inputs, if all rows' slice does stay there (measured).
"""


@KERNELS.register("cpu")
class Cpu(Tiled):
    """The compiled kernels.

    Raises:
        RuntimeError: If they could not be compiled here; `compiled.library().reason` says why.
    """

    def __init__(self) -> None:
        found = library()
        if found.functions is None:
            raise RuntimeError(f"there are no compiled kernels here: {found.reason}")
        super().__init__()
        self._call = found.functions
        self._rough = torch.empty(0, 0, dtype=torch.bfloat16)

    def table(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> TopkTable:
        """Select from float32 products without sorting more than a few numbers a row."""
        return topk_table(x, W_enc, b_enc, k, self._largest)

    def screen(
        self, W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, "d_sae"], coarser: int
    ) -> Screen:
        """Round an encoder in one pass."""
        W = W_enc.T.contiguous()
        if self._rough.shape != W.shape:  # kept, because fresh memory costs as much as filling it
            self._rough = torch.empty_like(W, dtype=torch.bfloat16)
        squared, lost = W.new_empty(len(W)), W.new_empty(len(W))
        call(self._call.rounded, W, *W.shape, self._rough, squared, lost)
        return _CompiledScreen(
            W,
            b_enc,
            self._rough,
            b_enc.bfloat16(),
            float(squared.max().sqrt()),
            float(lost.max().sqrt()),
            coarser,
            self.table,
        )

    def errors(
        self,
        code: SparseCode,
        x: Float[Tensor, "rows d_in"],
        W_dec: Float[Tensor, "latents d_in"],
        b_dec: Float[Tensor, "d_in"],
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "nnz"]]:
        """Decode, subtract and multiply row by row."""
        if not plain(x, W_dec, b_dec, code.values):
            return super().errors(code, x, W_dec, b_dec)
        error, dots = torch.empty_like(x), torch.empty_like(code.values)
        given = code.values, code.indices, code.offsets, W_dec, b_dec, x, *x.shape
        if len(dots) >= CROWDED_ROW * len(x) > 0:
            call(self._call.reconstruct_by_tiles, *given, len(W_dec), error, dots)
        else:
            call(self._call.reconstruct, *given, error, dots)
        return error, dots

    def latent_gradients(
        self,
        code: SparseCode,
        by_value: Float[Tensor, "nnz"],
        x: Float[Tensor, "rows d_in"],
        error: Float[Tensor, "rows d_in"],
        scale: float,
        d_sae: int,
        unit: Float[Tensor, "d_sae d_in"] | None = None,
        into: LatentGradients | None = None,
    ) -> LatentGradients:
        """Sum latent by latent, both gradients at once."""
        if not plain(x, error, code.values, by_value, *([] if unit is None else [unit])):
            return super().latent_gradients(code, by_value, x, error, scale, d_sae, unit)
        found = into or LatentGradients.empty(d_sae, x)
        starts = code.indices.new_empty(d_sae + 1)
        order = torch.empty_like(code.indices)
        call(self._call.by_latent, code.indices, len(order), d_sae, starts, order)
        each = len(order) / d_sae
        sliced = each >= SOME and x.numel() > CACHED >= len(x) * LEAST_SLICE
        function = (
            self._call.latent_gradients_by_rows
            if each >= MANY
            else self._call.latent_gradients_by_slices
            if sliced
            else self._call.latent_gradients
        )
        call(
            function,
            code.values, by_value, code.row_of, starts, order, x, error, len(x), d_sae,
            x.shape[1], float(scale), x if unit is None else unit, int(unit is not None),
            found.W_enc, found.W_dec, found.b_enc, found.squared,
        )  # fmt: skip
        return found

    def adamw(
        self,
        weights: Float[Tensor, "*shape"],
        mean: Float[Tensor, "*shape"],
        power: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        step: AdamStep,
        *,
        unit: bool = False,
    ) -> None:
        """Read and write everything once."""
        if not plain(weights, mean, power, gradient):
            super().adamw(weights, mean, power, gradient, step, unit=unit)
            return
        rows, width = weights.shape if weights.ndim == 2 else (1, weights.numel())
        numbers = (
            step.factor, step.rate, step.beta1, step.beta2, step.eps, step.weight_decay,
            1 - step.beta1**step.number, 1 - step.beta2**step.number,
        )  # fmt: skip
        call(
            self._call.adamw, weights, mean, power, gradient, rows, width, *map(float, numbers),
            int(unit),
        )  # fmt: skip

    def _largest(
        self, pre: Float[Tensor, "rows d_sae"], k: int
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        rows, d_sae = pre.shape
        coarser = joined_groups(d_sae, k)
        if not (coarser and k and plain(pre)):
            return largest(pre, k)
        values, latents = pre.new_empty(rows, k), torch.empty(rows, k, dtype=torch.long)
        strange = torch.empty(rows, dtype=torch.uint8)
        call(self._call.topk, pre, rows, d_sae, MEMBERS, coarser, k, values, latents, strange)
        if strange.any():
            where = strange.bool()
            values[where], latents[where] = largest(pre[where], k)
        return values, latents


class _CompiledScreen(Screen):
    """A screen whose candidates are found and computed anew row by row, in cache."""

    def topk(
        self,
        x: Float[Tensor, "rows d_in"],
        k: int,
        memory: Float[Tensor, "most_entries"],
    ) -> TopkTable:
        """Return the k largest of each row, descending, of equal ones the lower latent first."""
        found = library().functions
        assert found is not None, "a compiled screen is made by compiled kernels"
        rough_x, pre = x.bfloat16(), memory[: len(x) * len(self.b)].view(len(x), -1)
        torch.addmm(self.rough_bias, rough_x, self.rough.T, out=pre)
        (rows, d_in), d_sae, most = x.shape, len(self.b), CROWDED * k
        candidates = torch.empty(rows, most, dtype=torch.int32)
        counts = torch.empty(rows, dtype=torch.int32)
        call(
            found.screen,
            pre, self.bound(x, rough_x), rows, d_sae, MEMBERS, self.coarser, k, most, ROUNDING,
            candidates, counts,
        )  # fmt: skip
        values, latents = x.new_empty(rows, k), torch.empty(rows, k, dtype=torch.long)
        call(
            found.rescore,
            x, self.W, self.b, candidates, counts, rows, d_in, d_sae, most, k, values, latents,
        )  # fmt: skip
        unsure = (counts == NOT_DECIDED).nonzero().squeeze(1)
        if len(unsure):
            values[unsure], latents[unsure] = self.table(x[unsure], self.W.T, self.b, k)
        return values, latents
