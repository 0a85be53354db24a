"""The gradients of one training step, by hand where the code is sparse.

For the top-k families the gradient flows through the values of the firing latents alone, so with
the error e = x̂ - x of rows B by d_in, and g = 2 / (B d_in),

    dL/dW_dec[i] = g · sum over rows where i fires of z_i e       dL/db_dec = g · sum of e
    dL/dz_i      = g · e · W_dec[i]                               dL/db_enc[i] = sum of dL/dz_i
    dL/dW_enc[i] = sum over rows where i fires of dL/dz_i x

which are sparse sums; the only dense product of a step is the encoder's. The auxiliary loss has the
same form, with the dead latents in the place of all, and the residual in that of x; few dead
latents are multiplied densely. The gradients equal those of autograd on `SparseAutoencoder.loss`.
Other architectures use that autograd, whose own large products turn sparse where few latents fire.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.kernels.base import LatentGradients, SparseCode, SparseKernels, affine
from saefty.kernels.products import entries_of
from saefty.kernels.torch_sparse import remove_parallel
from saefty.saes.base import SparseAutoencoder

DENSE_UP_TO = 4
"""Where at most this many times aux_k latents are dead, dense products are faster (measured)."""


@dataclass(frozen=True)
class Step:
    """What one batch teaches: the gradients by parameter name, and what happened.

    The gradient of W_enc is [d_sae, d_in], latent by latent, like that of W_dec.
    """

    gradients: dict[str, Tensor]
    code: SparseCode
    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    """Sum over rows and dimensions of (x - x̂)²."""
    length: Float[Tensor, ""]
    """The norm of all gradients together."""


def training_step(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    kernels: SparseKernels,
    into: LatentGradients | None = None,
    *,
    tangent: bool = False,
) -> Step:
    """Return the gradients of the training loss on scaled activations.

    Args:
        sae: The SAE; nothing of it is changed.
        x: A batch of scaled activations.
        dead: Indices of the latents that count as dead.
        kernels: The sparse arithmetic to use.
        into: Memory that the gradients may take, until the next step.
        tangent: Take out of the decoder's gradient what would change the length of its unit rows.
    """
    with torch.no_grad():
        code = sae.training_code(x, kernels)
        if code is not None:
            unit = sae.W_dec if tangent else None
            return _sparse(sae, x, dead, kernels, code, unit, into)
    return _dense(sae, x, dead, tangent)


def _sparse(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    kernels: SparseKernels,
    code: SparseCode,
    unit: Float[Tensor, "d_sae d_in"] | None,
    into: LatentGradients | None,
) -> Step:
    error, dots = kernels.errors(code, x, sae.W_dec, sae.b_dec)
    squared = error.square().sum()
    scale = 2.0 / x.numel()
    found = kernels.latent_gradients(code, dots * scale, x, error, scale, sae.d_sae, unit, into)
    by_bias = error.sum(dim=0) * scale
    loss = squared / x.numel()
    if len(dead) and sae.aux_k and sae.config.aux_weight:
        # The residual -error is held constant: only the dead latents learn to explain it.
        auxiliary, extra = _auxiliary(sae, x, error, dead, kernels, unit)
        loss = loss + auxiliary
        parts = ("W_enc", "b_enc", "W_dec")
        sums = [getattr(found, part)[dead] + getattr(extra, part) for part in parts]
        for part, total in zip(parts, sums, strict=True):
            getattr(found, part)[dead] = total
        found.squared[dead] = LatentGradients.of(*sums).squared
    gradients = {"W_enc": found.W_enc, "b_enc": found.b_enc, "W_dec": found.W_dec, "b_dec": by_bias}
    length = (found.squared.double().sum() + by_bias.double().square().sum()).sqrt()
    return Step(gradients, code, loss, squared, length)


def _auxiliary(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    error: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    kernels: SparseKernels,
    unit: Float[Tensor, "d_sae d_in"] | None,
) -> tuple[Float[Tensor, ""], LatentGradients]:
    """Return the auxiliary loss and its gradients for the dead latents."""
    W_enc, b_enc, W_dec = sae.W_enc.T[dead].T, sae.b_enc[dead], sae.W_dec[dead]
    unit = None if unit is None else W_dec
    k = min(sae.aux_k, len(dead))
    scale = 2.0 / x.numel() * sae.config.aux_weight
    if len(dead) > DENSE_UP_TO * k:
        select = kernels.topk_abs if sae.signed else kernels.topk
        code = select(x, W_enc, b_enc, k)
        rest, dots = kernels.errors(code, -error, W_dec, torch.zeros_like(sae.b_dec))
        gradients = kernels.latent_gradients(code, dots * scale, x, rest, scale, len(dead), unit)
    else:
        z = affine(x, W_enc, b_enc)
        z = z if sae.signed else z.relu()
        if len(dead) > k:
            chosen = (z.abs() if sae.signed else z).topk(k, dim=1).indices
            z = torch.zeros_like(z).scatter_(1, chosen, z.gather(1, chosen))
        rest = z @ W_dec + error
        by_value = (rest @ W_dec.T) * (z != 0) * scale
        by_decoder = z.T @ rest * scale
        if unit is not None:
            remove_parallel(by_decoder, unit)
        gradients = LatentGradients.of(by_value.T @ x, by_value.sum(dim=0), by_decoder)
    return sae.config.aux_weight * rest.square().mean(), gradients


def _dense(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    tangent: bool,
) -> Step:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    with torch.enable_grad():
        loss = sae.loss(x, dead=dead)
        found = torch.autograd.grad(loss.total, parameters, allow_unused=True)
    gradients = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }
    gradients["W_enc"] = gradients["W_enc"].T
    if tangent:
        remove_parallel(gradients["W_dec"], sae.W_dec)
    code = entries_of(loss.z)
    length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    squared = loss.reconstruction.detach() * x.numel()
    return Step(gradients, code, loss.total.detach(), squared, length)
