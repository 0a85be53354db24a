"""Kernels for a GPU, in Triton: selecting, errors, both gradients of a latent, and AdamW.

The encoder's product stays torch's, a chunk of rows at a time, so that no rows x d_sae array is
kept; what follows it is one program for each row or each latent (`programs/`). Sums are made in a
fixed order without atomic additions, so a run on the same GPU gives the same bits again. What the
programs do not read (other formats, memory that is not contiguous) is left to the kernels in torch.

With `rough`, the product is done in bfloat16, which GPUs do many times as fast: it proposes a few
latents more than are asked for, and their float32 pre-activations decide. Unlike `screened` this
has no certificate, so a latent whose pre-activation is within bfloat16's rounding of the last ones
can be missed: for training alone.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.kernels.base import KERNELS, AdamStep, LatentGradients, SparseCode, affine
from saefty.kernels.torch_sparse import TopkTable, TorchSparse

CHUNK_BYTES = 1 << 30
"""Pre-activations held at once: enough rows for a product at full speed."""

TILE = 4096
"""Entries of a row that a program reads at once; also how many groups have a maximum, at most."""

MOST_K = 512
"""With a larger k, torch's selection is used: ranking takes k² comparisons a row."""

ROOM, LEAST_ROOM = 2, 128
"""Candidates kept of a row: this many times k, and no fewer than this."""

COMPARED = 8192
"""Comparisons of candidates at once."""

SPARE = 8
"""How many more latents than k a product in bfloat16 proposes."""

SEGMENT = 512
"""A latent with more entries than this is summed by several programs: always-on ones are common."""

ADAM_SIZE = 1024
"""Numbers that one program of AdamW moves, unless they are a row."""


@dataclass(frozen=True)
class Programs:
    """The programs in Triton's language, or why there are none."""

    selection: Any
    sums: Any
    interpreted: bool
    """Whether they run, slowly, in Triton's interpreter, where tensors of the CPU will do."""
    reason: str
    """In a run's record: why these kernels are used, or why they are not."""


@cache
def programs() -> Programs:
    """Return the programs, if Triton is installed."""
    try:
        triton = importlib.import_module("triton")
        selection = importlib.import_module("saefty.kernels.programs.selection")
        sums = importlib.import_module("saefty.kernels.programs.sums")
    except ImportError as error:
        return Programs(None, None, False, f"Triton cannot be imported ({error})")
    interpreted = not isinstance(sums.adamw, triton.runtime.JITFunction)
    how = " in its interpreter" if interpreted else ""
    return Programs(selection, sums, interpreted, f"Triton {triton.__version__}{how}")


@KERNELS.register("triton")
class Triton(TorchSparse):
    """The kernels in Triton.

    Args:
        rough: Whether the encoder's product is done in bfloat16.

    Raises:
        RuntimeError: If Triton cannot be imported.
    """

    def __init__(self, *, rough: bool = False) -> None:
        found = programs()
        if found.sums is None:
            raise RuntimeError(f"there are no kernels in Triton here: {found.reason}")
        self._programs = found
        self.rough = rough
        self._halved = torch.empty(0, 0, dtype=torch.bfloat16)

    def in_bfloat16(self) -> "Triton":
        """Return kernels that do the encoder's product in bfloat16."""
        return Triton(rough=True)

    def table(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> TopkTable:
        """Return the k largest pre-activations of each row with their latents, descending."""
        if not (self._there(x, W_enc) and 0 < k <= MOST_K):
            return super().table(x, W_enc, b_enc, k)
        return self._selected(x.detach(), W_enc.detach(), b_enc.detach(), k, signed=False)

    def topk_abs(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Select by magnitude, chunk by chunk."""
        k = min(k, len(b_enc))
        if not (self._there(x, W_enc) and 0 < k <= MOST_K):
            return super().topk_abs(x, W_enc, b_enc, k)
        table = self._selected(x.detach(), W_enc.detach(), b_enc.detach(), k, signed=True)
        return SparseCode.from_table(*table, signed=True)

    def batch_topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        n: int,
    ) -> SparseCode:
        """Select with torch, chunk by chunk; if rough, by a product in bfloat16."""
        x, W_enc, b_enc = x.detach(), W_enc.detach(), b_enc.detach()
        if not self._halves(x, W_enc):
            return super().batch_topk(x, W_enc, b_enc, n)
        code = super().batch_topk(x.bfloat16(), self._rounded(W_enc), b_enc.bfloat16(), n)
        rows, latents = code.row_of, code.indices
        values = self.row_dots(x.contiguous(), code, W_enc.T) + b_enc[latents]
        fires = values > 0
        by_latent = torch.argsort(rows * len(b_enc) + latents)
        by_latent = by_latent[fires[by_latent]]
        return SparseCode.from_entries(
            values[by_latent], rows[by_latent], latents[by_latent], len(x)
        )

    def decode(
        self, code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """Sum each row's decoder rows; torch does where a gradient may be asked for."""
        learning = torch.is_grad_enabled() and (W_dec.requires_grad or code.values.requires_grad)
        if learning or not self._fits(code.values, W_dec):
            return super().decode(code, W_dec)
        out = W_dec.new_empty(code.n_rows, W_dec.shape[1])
        self._decode(code, W_dec, out)
        return out

    def row_dots(
        self,
        rows: Float[Tensor, "rows d_in"],
        code: SparseCode,
        W_dec: Float[Tensor, "d_sae d_in"],
    ) -> Float[Tensor, "nnz"]:
        """Dot each row with the weights of its latents."""
        if not self._fits(rows, W_dec):
            return super().row_dots(rows, code, W_dec)
        dots = rows.new_empty(len(code.indices))
        self._run(
            self._programs.sums.row_dots, code.n_rows, rows,
            code.indices, code.offsets, W_dec, rows.shape[1], dots, **_wide(rows),
        )  # fmt: skip
        return dots

    def errors(
        self,
        code: SparseCode,
        x: Float[Tensor, "rows d_in"],
        W_dec: Float[Tensor, "latents d_in"],
        b_dec: Float[Tensor, "d_in"],
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "nnz"]]:
        """Decode, subtract and multiply row by row."""
        if not self._fits(x, W_dec, b_dec, code.values):
            return super().errors(code, x, W_dec, b_dec)
        error, dots = torch.empty_like(x), torch.empty_like(code.values)
        self._decode(code, W_dec, error, b_dec, x, dots)
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
        if not self._fits(x, error, code.values, by_value, *([] if unit is None else [unit])):
            return super().latent_gradients(code, by_value, x, error, scale, d_sae, unit)
        found = into or LatentGradients.empty(d_sae, x)
        order = code.feature_order
        latents = torch.arange(d_sae + 1, device=x.device)
        starts = torch.searchsorted(code.indices[order], latents)
        entries = (
            code.row_of[order], (code.values * scale)[order], by_value[order], x, error,
        )  # fmt: skip
        out = (found.W_enc, found.b_enc, found.W_dec, found.squared)
        direction, sums = x if unit is None else unit, self._programs.sums
        how: dict[str, Any] = {"UNIT": unit is not None, **_wide(x)}
        self._run(
            sums.latent_gradients, d_sae, starts, *entries, direction, x.shape[1], SEGMENT, *out,
            **how,
        )  # fmt: skip
        counts = starts.diff()
        many = (counts > SEGMENT).nonzero().squeeze(1)
        if len(many):
            n_parts = (counts[many] + SEGMENT - 1) // SEGMENT
            ends = torch.cat([n_parts.new_zeros(1), n_parts.cumsum(0)])
            whose = many.repeat_interleave(n_parts)
            turn = torch.arange(len(whose), device=x.device) - ends[:-1].repeat_interleave(n_parts)
            firsts = starts[whose] + turn * SEGMENT
            lasts = torch.minimum(firsts + SEGMENT, starts[whose + 1])
            parts = LatentGradients.empty(len(whose), x)
            partial = (parts.W_enc, parts.b_enc, parts.W_dec)
            self._run(
                sums.gradient_parts, len(whose), firsts, lasts, *entries, x.shape[1], *partial,
                **_wide(x),
            )  # fmt: skip
            self._run(
                sums.gradients_of_parts, len(many), many, ends, *partial, direction, x.shape[1],
                *out, **how,
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
        single = weights.dtype == torch.float32  # in which the numbers of a step arrive
        if not (single and self._fits(weights, mean, power, gradient)):
            super().adamw(weights, mean, power, gradient, step, unit=unit)
            return
        size = weights.numel()
        each = weights.shape[1] if unit else ADAM_SIZE
        self._run(
            self._programs.sums.adamw, -(-size // each), weights, mean, power, gradient, size, each,
            float(step.factor), float(step.rate), step.beta1, 1 - step.beta1, step.beta2,
            1 - step.beta2, step.eps, 1 - step.rate * step.weight_decay,
            1 - step.beta1**step.number, 1 - step.beta2**step.number,
            UNIT=unit, **_shape(each),
        )  # fmt: skip

    def _selected(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
        *,
        signed: bool,
    ) -> TopkTable:
        rough = self._halves(x, W_enc)
        left, right, bias = x, W_enc, b_enc
        if rough:
            left, right, bias = x.bfloat16(), self._rounded(W_enc), b_enc.bfloat16()
        values = x.new_empty(len(x), k)
        latents = torch.empty(len(x), k, dtype=torch.long, device=x.device)
        d_sae = len(b_enc)
        rows = max(1, min(len(x), CHUNK_BYTES // (d_sae * left.element_size())))
        buffer = left.new_empty(rows, d_sae)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            pre = affine(left[part], right, bias, out=buffer[: len(left[part])])
            if rough:
                proposed = self._largest(pre, min(k + SPARE, d_sae), signed=signed)
                values[part], latents[part] = self._decided(
                    x[part], W_enc, b_enc, *proposed, k, signed=signed
                )
            else:
                values[part], latents[part] = self._largest(pre, k, signed=signed)
        return values, latents

    def _largest(self, pre: Float[Tensor, "rows d_sae"], k: int, *, signed: bool) -> TopkTable:
        """Return the k first of each row in the oracle's order; what is missing is 0."""
        rows, d_sae = pre.shape
        wide, most = pre.dtype == torch.float64, _power(max(LEAST_ROOM, ROOM * k))
        keys = torch.empty(
            rows, most, dtype=torch.int64 if wide else torch.int32, device=pre.device
        )
        places = torch.empty(rows, most, dtype=torch.int32, device=pre.device)
        counts = torch.empty(rows, dtype=torch.int32, device=pre.device)
        values = pre.new_zeros(rows, k)
        latents = torch.zeros(rows, k, dtype=torch.long, device=pre.device)
        selection = self._programs.selection
        self._run(
            selection.candidates, rows, pre, d_sae, d_sae, k, most, keys, places, counts,
            SIGNED=signed, WIDE=wide, TILE=min(TILE, _power(d_sae)), num_warps=8,
        )  # fmt: skip
        self._run(
            selection.ranked, rows, pre, d_sae, keys, places, counts, most, k, values, latents,
            ROOM=most, PART=max(1, COMPARED // most), num_warps=4,
        )  # fmt: skip
        return values, latents

    def _decided(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        proposed: Float[Tensor, "rows most"],
        latents: Int[Tensor, "rows most"],
        k: int,
        *,
        signed: bool,
    ) -> TopkTable:
        """Return the k largest of a row's proposed latents by their float32 pre-activations."""
        rows, most = latents.shape
        offsets = torch.arange(0, (rows + 1) * most, most, device=x.device)[: rows + 1]
        code = SparseCode(proposed.reshape(-1), latents.reshape(-1), offsets)
        values = self.row_dots(x.contiguous(), code, W_enc.T).view(rows, most) + b_enc[latents]
        values = torch.where(proposed == 0, 0.0, values)
        by_latent = torch.sort(latents, dim=1)
        values = values.gather(1, by_latent.indices)
        strength = values.abs() if signed else values
        order = torch.sort(strength, dim=1, descending=True, stable=True).indices[:, :k]
        return values.gather(1, order), by_latent.values.gather(1, order)

    def _rounded(self, W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
        """Round an encoder into memory that is kept for the next one."""
        W = W_enc.T
        if self._halved.shape != W.shape or self._halved.device != W.device:
            self._halved = torch.empty_like(W, dtype=torch.bfloat16)
        return self._halved.copy_(W).T

    def _decode(
        self,
        code: SparseCode,
        W_dec: Float[Tensor, "d_sae d_in"],
        out: Float[Tensor, "rows d_in"],
        b_dec: Float[Tensor, "d_in"] | None = None,
        x: Float[Tensor, "rows d_in"] | None = None,
        dots: Float[Tensor, "nnz"] | None = None,
    ) -> None:
        """Decode into `out`; with b_dec, x and dots, as the error and its products."""
        self._run(
            self._programs.sums.decoded, code.n_rows, code.values, code.indices, code.offsets,
            W_dec, out if b_dec is None else b_dec, out if x is None else x, W_dec.shape[1], out,
            out if dots is None else dots, ERROR=x is not None, **_wide(out),
        )  # fmt: skip

    def _halves(self, x: Float[Tensor, "rows d_in"], W_enc: Float[Tensor, "d_in d_sae"]) -> bool:
        """Return whether the product is done in bfloat16."""
        return self.rough and x.dtype == torch.float32 and self._fits(W_enc.T)

    def _there(self, *tensors: Tensor) -> bool:
        """Return whether tensors are where the programs run."""
        return all(t.device.type == "cuda" or self._programs.interpreted for t in tensors)

    def _fits(self, *tensors: Tensor) -> bool:
        """Return whether these are what the programs of sums read."""
        formats = {tensor.dtype for tensor in tensors}
        return (
            formats in ({torch.float32}, {torch.float64})
            and all(t.is_contiguous() for t in tensors)
            and self._there(*tensors)
        )

    def _run(self, program: Any, n: int, *arguments: Any, **constants: Any) -> None:
        """Start n programs on the device of the tensors."""
        if n:
            with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
                program[(n,)](*arguments, **constants)


def _power(n: int) -> int:
    """Return the least power of 2 that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _shape(width: int) -> dict[str, int]:
    """Return how a program holds a row of this width: 16 numbers a thread, where it can."""
    wide = _power(width)
    return {"WIDTH": wide, "num_warps": max(1, min(16, wide // 512))}


def _wide(rows: Float[Tensor, "rows width"]) -> dict[str, int]:
    return _shape(rows.shape[1])
