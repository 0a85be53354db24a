"""The gradients of one training step, by hand where the code is sparse.

For the top-k families the gradient flows through the values of the firing latents alone, so with
the error e = x̂ - x of rows B by d_in, and g = 2 / (B d_in),

    dL/dW_dec[i] = g · sum over rows where i fires of z_i e       dL/db_dec = g · sum of e
    dL/dz_i      = g · e · W_dec[i]                               dL/db_enc[i] = sum of dL/dz_i
    dL/dW_enc[i] = sum over rows where i fires of dL/dz_i x

which are sparse sums; the only dense product of a step is the encoder's. The auxiliary loss has the
same form, with the dead latents in the place of all, and the residual in that of x; few dead
latents are multiplied densely. Where prefixes of the latents reconstruct by themselves, e of a
latent is the mean over the prefixes that hold it, so that each entry is still met once.

Architectures whose latents depend on their own pre-activations (`elementwise.py`) have sums of the
same form. Where few pre-activations exceed their floors they are sparse too; else a few hundred
rows are multiplied densely at a time, in memory that stays in cache, and x, which is data, gets no
gradient. All these gradients equal those of autograd on `SparseAutoencoder.loss`, which any other
architecture uses.

Where the encoder is to be learnt as one of x - b_dec, its pre-activations are (x - b_dec) W_enc + c
with c = b_enc + b_dec W_enc. They are the same, and so is the gradient of c; the others become

    dL/dW_enc[i] = sum over rows where i fires of dL/dz_i (x - b_dec)
    dL/db_dec    = g · sum of e - sum over i of dL/db_enc[i] W_enc[i]
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty.kernels.base import LatentGradients, SparseCode, SparseKernels, affine
from saefty.kernels.products import entries_of
from saefty.kernels.reaching import reach
from saefty.kernels.torch_sparse import remove_parallel
from saefty.matmul import products
from saefty.saes.base import SparseAutoencoder
from saefty.saes.elementwise import Elementwise, Entries, Slopes

DENSE_UP_TO = 4
"""Where at most this many times aux_k latents are dead, dense products are faster (measured)."""


SPARSE_UP_TO = 0.08
"""The largest share of entries above their floors for which sparse sums are faster (measured)."""

CHUNK_ROWS = 512
"""Rows multiplied densely at once."""


@dataclass(frozen=True)
class Step:
    """What one batch teaches: the gradients by parameter name, and what happened.

    The gradient of W_enc is [d_sae, d_in], latent by latent, like that of W_dec.
    """

    gradients: dict[str, Tensor]
    fired: Bool[Tensor, "d_sae"]
    """Which latents fired."""
    n_fired: int
    """How many entries of the batch did."""
    code: SparseCode | None
    """The code, where it was selected sparsely."""
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
    centred: bool = False,
) -> Step:
    """Return the gradients of the training loss on scaled activations.

    Args:
        sae: The SAE; nothing of it is changed.
        x: A batch of scaled activations.
        dead: Indices of the latents that count as dead.
        kernels: The sparse arithmetic to use.
        into: Memory that the gradients may take, until the next step.
        tangent: Take out of the decoder's gradient what would change the length of its unit rows.
        centred: Take the encoder's weights for those of x - b_dec; not for elementwise ones.
    """
    with torch.no_grad():
        unit = sae.W_dec if tangent else None
        code = sae.training_code(x, kernels)
        if code is not None:
            return _sparse(sae, x, dead, kernels, code, unit, into, centred=centred)
        if isinstance(sae, Elementwise):
            return _elementwise(sae, x, dead, kernels, unit, into)
    return _by_autograd(sae, x, dead, tangent, centred=centred)


def _sparse(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    kernels: SparseKernels,
    code: SparseCode,
    unit: Float[Tensor, "d_sae d_in"] | None,
    into: LatentGradients | None,
    *,
    centred: bool,
) -> Step:
    scale = 2.0 / x.numel()
    read = x - sae.b_dec if centred else x  # what the gradient of W_enc is made of
    if len(sae.prefixes) == 1:
        error, dots = kernels.errors(code, x, sae.W_dec, sae.b_dec)
        squared = error.square().sum()
        found = kernels.latent_gradients(
            code, dots * scale, read, error, scale, sae.d_sae, unit, into
        )
        by_bias = error.sum(dim=0) * scale
        loss = squared / x.numel()
    else:
        found, by_bias, loss, error = _nested(sae, x, read, kernels, code, unit, into)
        squared = error.square().sum()
    if len(dead) and sae.aux_k and sae.config.aux_weight:
        # The residual -error is held constant: only the dead latents learn to explain it.
        auxiliary, extra = _auxiliary(sae, x, read, error, dead, kernels, unit)
        loss = loss + auxiliary
        parts = ("W_enc", "b_enc", "W_dec")
        sums = [getattr(found, part)[dead] + getattr(extra, part) for part in parts]
        for part, total in zip(parts, sums, strict=True):
            getattr(found, part)[dead] = total
        found.squared[dead] = LatentGradients.of(*sums).squared
    if centred:
        by_bias = by_bias - sae.W_enc @ found.b_enc
    gradients = {"W_enc": found.W_enc, "b_enc": found.b_enc, "W_dec": found.W_dec, "b_dec": by_bias}
    length = (found.squared.double().sum() + by_bias.double().square().sum()).sqrt()
    fired = _fired(code.indices, sae.d_sae)
    return Step(gradients, fired, len(code.values), code, loss, squared, length)


def _nested(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    read: Float[Tensor, "rows d_in"],
    kernels: SparseKernels,
    code: SparseCode,
    unit: Float[Tensor, "d_sae d_in"] | None,
    into: LatentGradients | None,
) -> tuple[LatentGradients, Float[Tensor, "d_in"], Float[Tensor, ""], Float[Tensor, "rows d_in"]]:
    """Return the gradients of prefixes' mean loss, that of b_dec, the loss, and the whole's error.

    The latents that a prefix adds to the one before are met once for the prefixes' errors, and once
    for the gradients, which are those of the sum of the errors of all prefixes that hold them.
    """
    scale = 2.0 / x.numel() / len(sae.prefixes)
    ends = list(zip([0, *sae.prefixes[:-1]], sae.prefixes, strict=True))
    parts = [_between(code, start, stop) for start, stop in ends]
    error, errors = sae.b_dec - x, []
    for part, (start, stop) in zip(parts, ends, strict=True):
        error = kernels.decode(part, sae.W_dec[start:stop]).add_(error)
        errors.append(error)
    loss = torch.stack([one.square().sum() for one in errors]).sum() / x.numel() / len(errors)
    found = into or LatentGradients.empty(sae.d_sae, x)
    summed = torch.zeros_like(x)
    for part, (start, stop), own in zip(parts[::-1], ends[::-1], errors[::-1], strict=True):
        summed += own
        dots = kernels.row_dots(summed, part, sae.W_dec[start:stop]) * scale
        place = found.part(start, stop)
        rows = None if unit is None else unit[start:stop]
        place.take(
            kernels.latent_gradients(part, dots, read, summed, scale, stop - start, rows, place)
        )
    return found, summed.sum(dim=0) * scale, loss, error


def _between(code: SparseCode, start: int, stop: int) -> SparseCode:
    """Return the entries of latents from `start` on and before `stop`, counted from `start`."""
    inside = (code.indices >= start) & (code.indices < stop)
    ends = torch.cat([code.offsets.new_zeros(1), inside.cumsum(0)])
    return SparseCode(code.values[inside], code.indices[inside] - start, ends[code.offsets])


def _fired(latents: Int[Tensor, "nnz"], d_sae: int) -> Bool[Tensor, "d_sae"]:
    fired = torch.zeros(d_sae, dtype=torch.bool, device=latents.device)
    fired[latents] = True
    return fired


def _elementwise(
    sae: Elementwise,
    x: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    kernels: SparseKernels,
    unit: Float[Tensor, "d_sae d_in"] | None,
    into: LatentGradients | None,
) -> Step:
    reached = reach(kernels, x, sae.W_enc, sae.b_enc, sae.floors(), SPARSE_UP_TO)
    found = into or LatentGradients.empty(sae.d_sae, x)
    sums = _Sums(sae, x, found)
    if reached is None:
        sums.add_dense()
    else:
        sums.add_sparse(reached, kernels)
    if len(dead):
        sums.add_revival(dead)
    return sums.step(unit)


class _Sums:
    """The gradients of an elementwise architecture, as they come together."""

    def __init__(
        self, sae: Elementwise, x: Float[Tensor, "rows d_in"], found: LatentGradients
    ) -> None:
        self.sae, self.x, self.found = sae, x, found
        self.scale = 2.0 / x.numel()
        self.error = torch.empty_like(x)
        self.by_bias = torch.zeros_like(sae.b_dec)
        self.own: dict[str, Tensor] = {}
        self.loss = self.squared = x.new_zeros(())
        self.fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
        self.n_fired = 0

    def add_sparse(self, reached: SparseCode, kernels: SparseKernels) -> None:
        """Add what the entries above their floors teach."""
        sae, x, scale = self.sae, self.x, self.scale
        entries = Entries(reached.values, reached.indices, len(x))
        z, opened = sae.both(entries)
        code = SparseCode(z, reached.indices, reached.offsets)
        self.error, dots = kernels.errors(code, x, sae.W_dec, sae.b_dec)
        by_opened = None
        if opened is not None:
            second = SparseCode(opened, reached.indices, reached.offsets)
            error, by_opened = kernels.errors(second, x, sae.W_dec, sae.b_dec)
            by_opened = by_opened * scale
            self.loss = self.loss + error.square().mean()
        slopes = sae.slopes(entries, z, dots * scale, by_opened)
        self.found.take(
            kernels.latent_gradients(
                code, slopes.by_pre, x, self.error, scale, sae.d_sae, None, self.found
            )
        )
        self._learn(slopes)
        self.by_bias = self.error.sum(dim=0) * scale
        self.squared = self.error.square().sum()
        fires = z != 0
        self.n_fired = int(fires.sum())
        self.fired = _fired(reached.indices[fires], sae.d_sae)

    def add_dense(self) -> None:
        """Add what all entries teach, a few rows at a time."""
        sae, x, scale, found = self.sae, self.x, self.scale, self.found
        for part in (found.W_enc, found.b_enc, found.W_dec):
            part.zero_()
        pre = x.new_empty(min(CHUNK_ROWS, len(x)), sae.d_sae)
        by_z, by_opened = torch.empty_like(pre), None
        for start in range(0, len(x), CHUNK_ROWS):
            rows = x[start : start + CHUNK_ROWS]
            n = len(rows)
            entries = Entries(affine(rows, sae.W_enc, sae.b_enc, out=pre[:n]), None, len(x))
            z, opened = sae.both(entries)
            with products():
                error = self.error[start : start + n]
                torch.addmm(sae.b_dec, z, sae.W_dec, out=error).sub_(rows)
                scaled = error * scale
                torch.mm(scaled, sae.W_dec.T, out=by_z[:n])
                if opened is not None:
                    second = torch.addmm(sae.b_dec, opened, sae.W_dec).sub_(rows)
                    by_opened = (second * scale) @ sae.W_dec.T
                    self.loss = self.loss + second.square().sum() / x.numel()
                slopes = sae.slopes(entries, z, by_z[:n], by_opened)
                found.W_dec.addmm_(z.T, scaled)
                found.W_enc.addmm_(slopes.by_pre.T, rows)
            if "b_enc" not in slopes.own:
                found.b_enc.add_(slopes.by_pre.sum(dim=0))
            self._learn(slopes)
            self.by_bias += scaled.sum(dim=0)
            self.squared = self.squared + error.square().sum()
            counts = z.sign().sum(dim=0)  # quicker than counting what is not 0
            self.fired |= counts > 0
            self.n_fired += int(counts.sum())

    def add_revival(self, dead: Int[Tensor, "dead"]) -> None:
        """Add what pulls dead latents back; few are dead, so autograd does."""
        sae, found = self.sae, self.found
        pre = affine(self.x, sae.W_enc[:, dead], sae.b_enc[dead]).requires_grad_()
        with torch.enable_grad():
            loss = sae.revival(pre, self.error, dead)
            by_pre, by_decoder = torch.autograd.grad(
                loss, (pre, sae.W_dec), allow_unused=True, materialize_grads=True
            )
        found.W_enc[dead] += by_pre.T @ self.x
        bias = self.own.get("b_enc", found.b_enc)
        bias[dead] += by_pre.sum(dim=0)
        found.W_dec.add_(by_decoder)
        self.loss = self.loss + loss.detach()

    def step(self, unit: Float[Tensor, "d_sae d_in"] | None) -> Step:
        """Return the whole."""
        found = self.found
        if unit is not None:
            remove_parallel(found.W_dec, unit)
        gradients = {
            "W_enc": found.W_enc,
            "b_enc": found.b_enc,
            "W_dec": found.W_dec,
            "b_dec": self.by_bias,
            **self.own,
        }
        length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        loss = self.loss + self.squared / self.x.numel()
        return Step(gradients, self.fired, self.n_fired, None, loss, self.squared, length)

    def _learn(self, slopes: Slopes) -> None:
        self.loss = self.loss + slopes.penalty
        for name, gradient in slopes.own.items():
            self.own[name] = self.own[name] + gradient if name in self.own else gradient
        if slopes.along_decoder is not None:
            rows = self.sae.W_dec
            norms = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
            self.found.W_dec.addcmul_(rows, (slopes.along_decoder / norms)[:, None])


def _auxiliary(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    read: Float[Tensor, "rows d_in"],
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
        gradients = kernels.latent_gradients(code, dots * scale, read, rest, scale, len(dead), unit)
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
        gradients = LatentGradients.of(by_value.T @ read, by_value.sum(dim=0), by_decoder)
    return sae.config.aux_weight * rest.square().mean(), gradients


def _by_autograd(
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_in"],
    dead: Int[Tensor, "dead"],
    tangent: bool,
    *,
    centred: bool,
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
    if centred:
        gradients["W_enc"] = gradients["W_enc"].addr(gradients["b_enc"], sae.b_dec, alpha=-1)
        gradients["b_dec"] = gradients["b_dec"] - sae.W_enc @ gradients["b_enc"]
    if tangent:
        remove_parallel(gradients["W_dec"], sae.W_dec)
    code = entries_of(loss.z)
    length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    squared = loss.reconstruction.detach() * x.numel()
    fired = _fired(code.indices, sae.d_sae)
    total = loss.total.detach()
    return Step(gradients, fired, len(code.values), None, total, squared, length)
