"""The oracle: every kernel written as the dense formula, in whatever precision its input has."""

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.kernels.base import KERNELS, AdamStep, LatentGradients, SparseCode


@KERNELS.register("reference")
class Reference:
    """Dense torch; memory grows with rows x d_sae."""

    def topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Sort each row stably, so that of equal values the lower index comes first."""
        values, indices = torch.sort(x @ W_enc + b_enc, dim=1, descending=True, stable=True)
        return SparseCode.from_table(values[:, :k], indices[:, :k])

    def topk_abs(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        k: int,
    ) -> SparseCode:
        """Sort the magnitudes of each row stably; the values keep their signs."""
        pre = x @ W_enc + b_enc
        indices = torch.sort(pre.abs(), dim=1, descending=True, stable=True).indices[:, :k]
        return SparseCode.from_table(pre.gather(1, indices), indices, signed=True)

    def batch_topk(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        n: int,
    ) -> SparseCode:
        """Sort all pre-activations stably: of equal values the earlier row comes first."""
        pre = (x @ W_enc + b_enc).relu()
        chosen = torch.sort(pre.flatten(), descending=True, stable=True).indices[:n]
        z = torch.zeros_like(pre).flatten()
        z[chosen] = pre.flatten()[chosen]
        return SparseCode.from_dense(z.view_as(pre))

    def above(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        threshold: Float[Tensor, "d_sae"],
    ) -> SparseCode:
        """Compare every pre-activation with its threshold."""
        pre = x @ W_enc + b_enc
        return SparseCode.from_dense(pre.relu() * (pre > threshold))

    def decode(
        self, code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """Multiply the dense code."""
        return code.dense(len(W_dec)) @ W_dec

    def row_dots(
        self,
        rows: Float[Tensor, "rows d_in"],
        code: SparseCode,
        W_dec: Float[Tensor, "d_sae d_in"],
    ) -> Float[Tensor, "nnz"]:
        """Multiply everything and keep the entries of the code."""
        return (rows @ W_dec.T)[code.row_of, code.indices]

    def weight_grad(
        self,
        weights: Float[Tensor, "nnz"],
        code: SparseCode,
        rows: Float[Tensor, "rows d"],
        d_sae: int,
    ) -> Float[Tensor, "d_sae d"]:
        """Multiply the dense weights by the rows."""
        dense = rows.new_zeros(code.n_rows, d_sae)
        dense[code.row_of, code.indices] = weights
        return dense.T @ rows

    def errors(
        self,
        code: SparseCode,
        x: Float[Tensor, "rows d_in"],
        W_dec: Float[Tensor, "latents d_in"],
        b_dec: Float[Tensor, "d_in"],
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "nnz"]]:
        """Decode densely, and multiply everything."""
        error = self.decode(code, W_dec) + b_dec - x
        return error, self.row_dots(error, code, W_dec)

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
        """Multiply dense arrays."""
        dense = x.new_zeros(code.n_rows, d_sae)
        dense[code.row_of, code.indices] = by_value
        W_dec = code.dense(d_sae).T @ error * scale
        if unit is not None:
            W_dec = W_dec - (W_dec * unit).sum(dim=1, keepdim=True) * unit
        return LatentGradients.of(dense.T @ x, dense.sum(dim=0), W_dec)

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
        """Write the formula out."""
        slope = gradient * step.factor
        mean.copy_(step.beta1 * mean + (1 - step.beta1) * slope)
        power.copy_(step.beta2 * power + (1 - step.beta2) * slope.square())
        first = mean / (1 - step.beta1**step.number)
        second = power / (1 - step.beta2**step.number)
        decayed = weights * (1 - step.rate * step.weight_decay)
        weights.copy_(decayed - step.rate * first / (second.sqrt() + step.eps))
        if unit:
            weights.copy_(weights / weights.square().sum(dim=1, keepdim=True).sqrt())
