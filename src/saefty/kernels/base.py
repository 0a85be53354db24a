"""What every set of kernels offers, and the sparse code it speaks in.

A code holds only the latents that fire, row by row, magnitudes descending within a row. Values are
above 0, but for `topk_abs`, whose latents keep their sign: there every value but 0 fires. Equal
magnitudes are settled the same way everywhere: the lower latent index goes first, and when a
selection over a whole batch must choose between equal values, the earlier row does. `reference`
does all of it with dense torch and is the oracle; the others must agree with it.
"""

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.matmul import products
from saefty.registry import Registry


@dataclass(frozen=True)
class SparseCode:
    """The latents that fire, as compressed rows: row r owns entries offsets[r] : offsets[r + 1]."""

    values: Float[Tensor, "nnz"]
    indices: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "rows_plus_1"]

    @property
    def n_rows(self) -> int:
        """Rows encoded, those without any firing latent included."""
        return len(self.offsets) - 1

    @cached_property
    def l0(self) -> Int[Tensor, "rows"]:
        """How many latents fire in each row."""
        return self.offsets.diff()

    @cached_property
    def row_of(self) -> Int[Tensor, "nnz"]:
        """The row of each entry."""
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.l0, output_size=len(self.values))

    @cached_property
    def feature_order(self) -> Int[Tensor, "nnz"]:
        """The entries sorted by latent, and by row within a latent."""
        return torch.sort(self.indices.int(), stable=True).indices

    def dense(self, d_sae: int) -> Float[Tensor, "rows d_sae"]:
        """Return the code as one dense row of latents for each row."""
        z = self.values.new_zeros(self.n_rows, d_sae)
        z[self.row_of, self.indices] = self.values
        return z

    @classmethod
    def from_dense(cls, z: Float[Tensor, "rows d_sae"]) -> "SparseCode":
        """Return the entries of z that are not 0."""
        rows, indices = z.nonzero(as_tuple=True)
        return cls.from_entries(z[rows, indices], rows, indices, len(z))

    @classmethod
    def from_entries(
        cls,
        values: Float[Tensor, "nnz"],
        rows: Int[Tensor, "nnz"],
        indices: Int[Tensor, "nnz"],
        n_rows: int,
    ) -> "SparseCode":
        """Return the code of entries given by ascending row and index within the row."""
        order = torch.sort(values.abs(), descending=True, stable=True).indices
        order = order[torch.sort(rows[order], stable=True).indices]
        counts = torch.bincount(rows, minlength=n_rows)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(values[order], indices[order], offsets)

    @classmethod
    def from_table(
        cls,
        values: Float[Tensor, "rows k"],
        indices: Int[Tensor, "rows k"],
        *,
        signed: bool = False,
    ) -> "SparseCode":
        """Return the code of k candidates a row, magnitudes descending.

        Those not above 0 drop out; with `signed`, only those that are 0.
        """
        fires = values != 0 if signed else values > 0
        n_rows, k = values.shape
        if bool(fires.all()):
            offsets = torch.arange(0, (n_rows + 1) * k, max(k, 1), device=values.device)
            return cls(values.reshape(-1), indices.reshape(-1), offsets[: n_rows + 1])
        counts = fires.sum(dim=1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(values[fires], indices[fires], offsets)


@dataclass(frozen=True)
class LatentGradients:
    """The gradients of an encoder and a decoder, both latent by latent."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    squared: Float[Tensor, "d_sae"]
    """The squared length of each latent's three gradients together."""

    @classmethod
    def empty(cls, d_sae: int, like: Float[Tensor, "rows d_in"]) -> "LatentGradients":
        """Return memory for them."""
        wide, narrow = (d_sae, like.shape[1]), d_sae
        new = like.new_empty
        return cls(new(wide), new(narrow), new(wide), new(narrow))

    def part(self, start: int, stop: int) -> "LatentGradients":
        """Return those of some latents; they are the same memory."""
        here = slice(start, stop)
        return LatentGradients(
            self.W_enc[here], self.b_enc[here], self.W_dec[here], self.squared[here]
        )

    def take(self, other: "LatentGradients") -> None:
        """Copy what is not in this memory already."""
        for name in ("W_enc", "b_enc", "W_dec", "squared"):
            mine, given = getattr(self, name), getattr(other, name)
            if mine.data_ptr() != given.data_ptr():
                mine.copy_(given)

    @classmethod
    def of(
        cls,
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, "d_sae"],
        W_dec: Float[Tensor, "d_sae d_in"],
    ) -> "LatentGradients":
        """Return gradients with their lengths."""
        squared = torch.linalg.vecdot(W_enc, W_enc) + torch.linalg.vecdot(W_dec, W_dec)
        return cls(W_enc, b_enc, W_dec, squared + b_enc.square())


@dataclass(frozen=True)
class AdamStep:
    """One step of AdamW: which it is, and how far it goes."""

    number: int
    """Counted from 1."""
    rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    factor: float = 1.0
    """The gradient is multiplied by it first."""


@runtime_checkable
class SparseKernels(Protocol):
    """The arithmetic of sparse codes; W_enc is [d_in, d_sae], W_dec is [d_sae, d_in].

    The selections act on the pre-activations x W_enc + b_enc; all but `topk_abs` keep positive ones
    only. None of them is differentiable: the gradients are built from `row_dots` and `weight_grad`.
    """

    def topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Return the k largest positive pre-activations of each row."""
        ...

    def topk_abs(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Return the k pre-activations of each row that are farthest from 0, with their signs."""
        ...

    def batch_topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        n: int,
    ) -> SparseCode:
        """Return the n largest positive pre-activations of all rows together."""
        ...

    def above(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        threshold: Float[Tensor, "d_sae"],
    ) -> SparseCode:
        """Return the positive pre-activations above each latent's threshold."""
        ...

    def decode(
        self, code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """Return z W_dec, without a bias."""
        ...

    def row_dots(
        self,
        rows: Float[Tensor, "rows d_in"],
        code: SparseCode,
        W_dec: Float[Tensor, "d_sae d_in"],
    ) -> Float[Tensor, "nnz"]:
        """Return, for each entry of the code, its row of `rows` times its latent's row of W_dec."""
        ...

    def weight_grad(
        self,
        weights: Float[Tensor, "nnz"],
        code: SparseCode,
        rows: Float[Tensor, "rows d"],
        d_sae: int,
    ) -> Float[Tensor, "d_sae d"]:
        """Return, for each latent, the sum of its entries' weights times their rows of `rows`."""
        ...

    def errors(
        self,
        code: SparseCode,
        x: Float[Tensor, "rows d_in"],
        W_dec: Float[Tensor, "latents d_in"],
        b_dec: Float[Tensor, "d_in"],
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "nnz"]]:
        """Return the error z W_dec + b_dec - x, and each entry's `row_dots` of it."""
        ...

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
        """Return the gradients of the weights, given those of the code's values.

        Args:
            code: The code.
            by_value: The gradient of each entry's value.
            x: What was encoded.
            error: What the decoder missed it by.
            scale: The gradient of the decoder is the entries' values times this, times the error.
            d_sae: How many latents there are.
            unit: A decoder whose rows are to keep length 1: what would change their length is taken
                out of its gradient.
            into: Memory that may be used for the result, so that none is made anew.
        """
        ...

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
        """Move weights and both moments in place.

        Args:
            weights: What learns.
            mean: The moving mean of its gradient.
            power: That of the gradient's square.
            gradient: The gradient; it may be overwritten.
            step: How to move.
            unit: Bring each row of the weights back to length 1.
        """
        ...


KERNELS: Registry[type[SparseKernels]] = Registry("set of kernels", "saefty.kernels")


def affine(
    x: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "d_in d_out"],
    b: Float[Tensor, "d_out"],
    out: Float[Tensor, "rows d_out"] | None = None,
) -> Float[Tensor, "rows d_out"]:
    """Return x W + b, the large product of an encoder, multiplied in the way that was chosen."""
    with products():
        return torch.addmm(b, x, W, out=out) if out is not None else torch.addmm(b, x, W)


def largest(
    pre: Float[Tensor, "rows columns"],
    k: int,
    latents: Int[Tensor, "rows columns"] | None = None,
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Return the k largest of each row, descending; of equal positive values the lower index first.

    `torch.topk` is free to choose among equal values, so rows where that could matter (two equal
    neighbours among the k + 1 largest) are sorted stably instead. They are rare.

    Args:
        pre: Pre-activations.
        k: How many to return.
        latents: The latent of each column, row by row; None if the columns are all latents.
    """
    values, indices = pre.topk(min(k + 1, pre.shape[1]), dim=1)
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).any(dim=1)
    if latents is not None:
        indices = latents.gather(1, indices)
    if bool(tied.any()):
        rows = pre[tied]
        if latents is not None:
            names = latents[tied].sort(dim=1)
            rows = rows.gather(1, names.indices)
        exact = torch.sort(rows, dim=1, descending=True, stable=True)
        chosen = exact.indices if latents is None else names.values.gather(1, exact.indices)
        values[tied] = exact.values[:, : values.shape[1]]
        indices[tied] = chosen[:, : values.shape[1]]
    return values[:, :k], indices[:, :k]


def has_bfloat16_units() -> bool:
    """Return whether this machine's processor multiplies faster in bfloat16 than in float32."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def choose_kernels(device: torch.device | str, wanted: str | None = None) -> SparseKernels:
    """Return the fastest kernels that run on a device.

    Args:
        device: Where the arithmetic is done.
        wanted: The class of the kernels to use if they run here, such as what a run began with.
    """
    faster = {"cpu": ["cpu", "screened"], "cuda": ["triton"]}
    names = [*faster.get(torch.device(device).type, []), "torch_sparse"]
    usable = [KERNELS[name] for name in names if _runs(name)]
    return next((kind for kind in usable if kind.__name__ == wanted), usable[0])()


def _runs(name: str) -> bool:
    """Return whether a set of kernels can be used on this machine, and is worth it."""
    if name == "cpu":
        return importlib.import_module("saefty.kernels.compiled").library().functions is not None
    if name == "triton":
        found = importlib.import_module("saefty.kernels.triton_sparse").programs()
        return found.sums is not None and not found.interpreted
    return name == "torch_sparse" or has_bfloat16_units()
