"""What a sparse autoencoder is: raw activations in, latents, raw activations out.

z = activate(x W_enc + b_enc),  x̂ = z W_dec + b_dec.  W_enc is [d_in, d_sae], W_dec [d_sae, d_in],
b_dec is not subtracted from the input, and any scaling is folded into the weights, so there is one
meaning of `encode`. A transcoder predicts another place than it reads: its W_dec is [d_sae, d_out],
and x W_skipᵀ may be added (`reconstruct`). An architecture is one file with a class that defines
`activate`; it overrides `loss` if it has a penalty, and `training_code` if its code during training
can be selected sparsely (then training never forms a dense rows x d_sae array).
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saefty.errors import ConfigError, MismatchError, NumericError
from saefty.kernels.base import SparseCode, SparseKernels, affine, choose_kernels
from saefty.kernels.products import differentiable_affine, differentiable_decode
from saefty.records import Site
from saefty.registry import Registry, nearest
from saefty.saes.published import RowNorm, row_norm_refused, transcoder_refused
from saefty.saes.scaler import Scaler

DENSE_ROWS = 256

__all__ = ["ARCHITECTURES", "SaeConfig", "SaeLoss", "SparseAutoencoder", "SparseCode"]


@dataclass(frozen=True)
class SaeConfig:
    """One SAE: its architecture, its shape and its sparsity."""

    arch: str
    d_in: int
    d_sae: int
    k: int
    aux_k: int | None = None
    aux_weight: float = 1 / 32
    options: Mapping[str, float] = field(default_factory=dict)
    d_out: int | None = None
    """Width of what a transcoder predicts; None: an autoencoder, which predicts what it reads."""
    skip: bool = False
    """Whether a transcoder adds a linear map of what it reads."""
    row_norm: str = "none"
    """What is done to each row before it is encoded; see `saes/published.py`."""

    def __str__(self) -> str:
        return f"{self.arch}, k {self.k}"

    def build(self) -> "SparseAutoencoder":
        """Return an SAE of this configuration, all weights zero.

        Raises:
            UnknownNameError: If no architecture has this name.
        """
        return ARCHITECTURES[self.arch](self)


@dataclass(frozen=True)
class SaeLoss:
    """A training loss and its parts, in units of the scaled activations' variance."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    z: Float[Tensor, "rows d_sae"]
    """The latents, held constant."""


class SparseAutoencoder(nn.Module):
    """Base of every architecture.

    Args:
        config: Shape and sparsity; the weights start at zero.

    Raises:
        ConfigError: If the architecture does not know one of its options.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = {}
    """The architecture's own settings and their defaults."""

    unit_decoder: ClassVar[bool] = True
    """Whether training keeps the rows of W_dec at norm 1."""

    uses_k: ClassVar[bool] = True
    """Whether k sets how many latents fire; otherwise the weight of a penalty does."""

    signed: ClassVar[bool] = False
    """Whether latents keep their sign; they then fire where they are not 0, and |z| ranks them."""

    saved_names: ClassVar[Mapping[str, str]] = {}
    """Weights that SAELens calls otherwise: our name -> the name in the saved file."""

    W_skip: nn.Parameter | None

    penalty_share = 1.0
    """How much of the penalty's weight applies yet; `schedule` sets it."""

    def __init__(self, config: SaeConfig) -> None:
        super().__init__()
        unknown = [name for name in config.options if name not in self.OPTIONS]
        if unknown:
            known = sorted(self.OPTIONS)
            raise ConfigError(
                f"sae.options.{unknown[0]}: the architecture {config.arch} has no such option."
                f"{nearest(unknown[0], known)} Known: {', '.join(known) or 'none'}."
            )
        self.config = config
        self.options = {**self.OPTIONS, **config.options}
        self.prefixes = [config.d_sae]  # of how many latents each reconstruct by themselves
        self.site: Site | None = None
        self.site_out: Site | None = None  # where a transcoder's prediction belongs
        self.metadata: dict[str, Any] = {}
        self.folder: Path | None = None  # where it was loaded from
        # W_enc lies in memory by latents, so that both weights update latent by latent.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        skip = nn.Parameter(torch.zeros(self.d_out, config.d_in)) if config.skip else None
        self.register_parameter("W_skip", skip)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of what is predicted: `d_in`, save for a transcoder."""
        return self.config.d_in if self.config.d_out is None else self.config.d_out

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another place than it reads."""
        return self.config.d_out is not None

    def require_autoencoder(self, use: str) -> None:
        """Check that what is decoded can be put, or taken out, where the activations were read.

        Raises:
            MismatchError: If it is a transcoder, or scales each row by that row's own numbers; it
                begins with the use ("gating").
        """
        if self.is_transcoder:
            transcoder_refused(use, self.site, self.d_in, self.site_out, self.d_out)
        if self.config.row_norm != "none":
            row_norm_refused(use, self.config.row_norm)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.config.d_sae

    @property
    def kernels(self) -> SparseKernels:
        """The sparse arithmetic for the device the weights are on."""
        return choose_kernels(self.W_dec.device)

    def activate(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Return the latents of pre-activations; this is what defines an architecture.

        They must scale with the pre-activations, activate(c · pre) = c · activate(pre) for c > 0,
        because a scale is folded into the weights; what does not is adapted in `rescale_latents`.
        """
        raise NotImplementedError

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the latents of raw activations, in the weights' precision.

        Raises:
            MismatchError: If the activations have another width.
            NumericError: If they hold NaN or infinity.
        """
        rows = self._checked(x)
        return self.activate(affine(rows, self.W_enc, self.b_enc)).view(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> SparseCode:
        """Return the latents that fire, values descending within a row.

        Raises:
            MismatchError: If the activations have another width.
            NumericError: If they hold NaN or infinity.
        """
        return self.select(self._checked(x), self.kernels)

    def select(self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels) -> SparseCode:
        """Return the code of rows that are known to be fit; the sparse twin of `activate`."""
        del kernels
        codes = [
            SparseCode.from_dense(self.activate(affine(part, self.W_enc, self.b_enc)))
            for part in x.split(DENSE_ROWS)
        ]
        counts = torch.cat([code.l0 for code in codes])
        return SparseCode(
            torch.cat([code.values for code in codes]),
            torch.cat([code.indices for code in codes]),
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )

    def decode(self, z: Float[Tensor, "*rows d_sae"] | SparseCode) -> Float[Tensor, "*rows d_out"]:
        """Return raw activations from latents; a transcoder's skip connection is not among them.

        Raises:
            MismatchError: If latents alone do not say them: each row was scaled by its own numbers.
        """
        if self.config.row_norm != "none":
            row_norm_refused("decoding latents alone", self.config.row_norm)
        return self._decoded(z)

    def _decoded(self, z: Tensor | SparseCode) -> Float[Tensor, "*rows d_out"]:
        if isinstance(z, SparseCode):
            return self.kernels.decode(z, self.W_dec) + self.b_dec
        return z.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def reconstruct(
        self, x: Float[Tensor, "*rows d_in"], z: Tensor | SparseCode | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """Return what the SAE makes of raw activations, a transcoder's skip connection included.

        Args:
            x: The activations.
            z: Their latents, dense or sparse, where they are known already; see `encode`.
        """
        out = self._decoded(self.encode(x) if z is None else z)
        x = x.to(self.W_dec.dtype)
        if self.config.row_norm != "none":
            out = RowNorm.of(x, self.config.row_norm).undo(out)
        return out if self.W_skip is None else out + x @ self.W_skip.T

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return the reconstruction of raw activations."""
        return self.reconstruct(x)

    def contribution(
        self, z: Float[Tensor, "*rows d_sae"], latents: Int[Tensor, "chosen"] | list[int]
    ) -> Float[Tensor, "*rows d_out"]:
        """Return what the chosen latents add to the reconstruction, in raw activation units.

        The sum over the chosen k of z_k W_dec[k]; the bias is not part of it.

        Raises:
            MismatchError: If the SAE scales every row by that row's own numbers.
        """
        if self.config.row_norm != "none":
            row_norm_refused("what single latents add", self.config.row_norm)
        chosen = torch.as_tensor(latents, dtype=torch.long, device=z.device)
        return z[..., chosen].to(self.W_dec.dtype) @ self.W_dec[chosen]

    def training_code(
        self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels
    ) -> SparseCode | None:
        """Return the code of a training batch, or None to train on `loss` by autograd.

        A code may be returned only where the gradient flows through the firing latents' values
        alone, as in the top-k families.
        """
        del x, kernels
        return None

    def activate_in_training(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Return the latents of a training batch; the dense twin of `training_code`."""
        return self.activate(pre)

    def penalty(
        self, pre: Float[Tensor, "rows d_sae"], z: Float[Tensor, "rows d_sae"]
    ) -> Float[Tensor, ""]:
        """Return what the architecture adds to the loss; none here."""
        del z
        return pre.new_zeros(())

    def schedule(self, step: int, n_steps: int) -> None:
        """Raise the penalty from 0 over the share `warmup` (an option) of the steps."""
        warmup = self.options.get("warmup", 0.0) * n_steps
        self.penalty_share = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0

    def begin(self) -> None:
        """Set the first values of an architecture's own weights; called after W_enc changed."""

    def loss(
        self, x: Float[Tensor, "rows d_in"], *, dead: Int[Tensor, "dead"] | None = None
    ) -> SaeLoss:
        """Return the training loss by the dense formula, differentiable.

        mean((x - x̂)²) + aux_weight · mean((e - ê)²) + penalty, where e = x - x̂ is held constant
        and ê is decoded from the aux_k dead latents with the largest pre-activations.

        Args:
            x: Scaled activations.
            dead: Indices of the dead latents; None or none of them leaves that term out.
        """
        pre = differentiable_affine(x, self.W_enc, self.b_enc)
        z = self.activate_in_training(pre)
        error = differentiable_decode(z, self.W_dec, self.reached(pre)) + self.b_dec - x
        reconstruction, auxiliary = error.square().mean(), self.auxiliary(x, pre)
        if dead is not None and len(dead):
            auxiliary = auxiliary + self.revival(pre[:, dead], error.detach(), dead)
        penalty = self.penalty(pre, z)
        total = reconstruction + auxiliary + penalty
        return SaeLoss(total, reconstruction, auxiliary, penalty, z.detach())

    def auxiliary(
        self, x: Float[Tensor, "rows d_in"], pre: Float[Tensor, "rows d_sae"]
    ) -> Float[Tensor, ""]:
        """Return a second reconstruction's loss; none here."""
        del pre
        return x.new_zeros(())

    def reached(self, pre: Float[Tensor, "rows d_sae"]) -> Bool[Tensor, "rows d_sae"] | None:
        """Return where a latent has a gradient though it may be 0; None where no such place is."""
        del pre
        return None

    def revival(
        self,
        pre: Float[Tensor, "rows dead"],
        error: Float[Tensor, "rows d_in"],
        dead: Int[Tensor, "dead"],
    ) -> Float[Tensor, ""]:
        """Return the loss from which dead latents learn, weighted: AuxK."""
        if not self.aux_k:
            return pre.new_zeros(())
        strength = pre.abs() if self.signed else pre
        places = strength.topk(min(self.aux_k, len(dead)), dim=1).indices
        values = pre.gather(1, places)
        values = values if self.signed else values.relu()
        z_dead = torch.zeros_like(pre).scatter(1, places, values)
        rest = z_dead @ self.W_dec[dead] + error
        return self.config.aux_weight * rest.square().mean()

    @property
    def aux_k(self) -> int:
        """How many dead latents learn from a row's residual: half of d_in unless set."""
        return self.d_in // 2 if self.config.aux_k is None else self.config.aux_k

    def observe(self, code: SparseCode | None) -> None:
        """Learn from a batch's code, if there is one, what no gradient teaches; nothing here."""

    def calibrate(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Set, after training, what depends on held-out rows; nothing here."""

    def rescale_latents(self, factor: float) -> None:
        """Adapt what is measured in units of z, besides the weights; nothing here."""

    def shift_input(self, shift: Float[Tensor, "d_sae"]) -> None:
        """Adapt other biases than b_enc to x W_enc having grown by `shift`; nothing here."""

    @torch.no_grad()
    def folded(self, scaler: Scaler) -> "SparseAutoencoder":
        """Return a copy that reads and writes raw activations instead of scaled ones.

        The latents are multiplied by the scaler's unit, so that they too are in raw units; with a
        scalar scale the rows of W_dec keep their norm.
        """
        raw = deepcopy(self)
        mean, scale = scaler.mean.to(self.W_dec), scaler.scale.to(self.W_dec)
        W_enc, unit = self.W_enc.double(), scaler.unit
        shift = (scaler.mean / scaler.scale).to(W_enc) @ W_enc
        raw.W_enc.copy_(W_enc / scaler.scale.to(W_enc)[:, None] * unit)
        raw.b_enc.copy_((self.b_enc.double() - shift) * unit)
        raw.W_dec.copy_(self.W_dec * (scale / unit))
        raw.b_dec.copy_(self.b_dec * scale + mean)
        raw.shift_input(shift)
        raw.rescale_latents(unit)
        return raw

    def saelens(self) -> dict[str, Any]:
        """Return what cfg.json says besides the shape: the architecture as SAELens names it.

        Unless overridden it is named as here, and SAELens does not know it.
        """
        return {"architecture": self.config.arch}

    def _checked(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "rows d_in"]:
        if x.shape[-1] != self.d_in:
            raise MismatchError(
                f"the SAE reads activations {self.d_in} wide, but these are {x.shape[-1]} wide. "
                "Use an SAE trained on this model and layer."
            )
        rows = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(dim=1).sum())
            raise NumericError(
                f"{bad} of {len(rows)} activations to encode hold NaN or infinity. "
                "Set extract.nonfinite=mask to leave such rows out, or model.dtype=bfloat16 if "
                "they come from float16."
            )
        kind = self.config.row_norm
        return rows if kind == "none" else RowNorm.of(rows, kind).apply(rows)


ARCHITECTURES: Registry[type[SparseAutoencoder]] = Registry("SAE architecture", "saefty.saes")
