"""One SAE in training: its first weights, its steps, its dead latents, and its whole state.

A step is AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on gradients that are first made
orthogonal to the decoder rows they would otherwise lengthen, then clipped by their global norm; the
decoder rows are brought back to norm 1 afterwards. Latents that have not fired for long learn from
what the others leave unexplained (AuxK: Gao et al. 2024, arXiv:2406.04093, appendix A.2).

The top-k families learn the bias c of an encoder of x - b_dec, as that paper's TopK does. It is
kept as the b_enc of an encoder of x, c - b_dec W_enc, which computes the same. Adam moves weights
one by one, so the coordinates matter: in these the weights do not all learn what b_dec explains,
and the code stays as it is while b_dec moves. docs/performance.md has what it gains, and where not.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.errors import NumericError
from saefty.kernels.base import AdamStep, LatentGradients, SparseKernels, choose_kernels
from saefty.kernels.rough import in_bfloat16
from saefty.saes.base import SaeConfig
from saefty.saes.elementwise import Elementwise
from saefty.saes.gradients import training_step
from saefty.training_settings import OptimizerSection

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class EarlyStopping:
    """When to stop: after `patience` measurements without a new best; None never stops."""

    patience: int | None
    best_fvu: float | None = None
    best_step: int = 0
    misses: int = 0
    stopped_at: int | None = None

    def is_best(self, step: int, fvu: float | None) -> bool:
        """Take note of a measurement; return whether it is the best so far."""
        if self.patience is None or fvu is None:
            return False
        if self.best_fvu is None or fvu < self.best_fvu:
            self.best_fvu, self.best_step, self.misses = fvu, step, 0
            return True
        self.misses += 1
        if self.misses >= self.patience:
            self.stopped_at = step
        return False


class Trainee:
    """An SAE with its optimiser and what is known about its latents.

    Args:
        config: The SAE to train.
        optimizer: How its weights move.
        grad_clip: Largest global norm of a gradient; None leaves it as it is.
        n_steps: Length of the schedule.
        dead_after: Rows without firing after which a latent counts as dead.
        device: Where to train.
        kernels: The class of the kernels that carry out the arithmetic; None takes the fastest.
        rough: Whether the k largest latents are proposed in bfloat16, where these kernels can.
    """

    def __init__(
        self,
        config: SaeConfig,
        optimizer: OptimizerSection,
        *,
        grad_clip: float | None,
        n_steps: int,
        dead_after: int,
        device: torch.device | str = "cpu",
        kernels: str | None = None,
        rough: bool = False,
    ) -> None:
        self.sae = config.build().to(device)
        exact = choose_kernels(device, kernels)
        # An estimated gradient has a window narrower than what bfloat16 rounds off.
        rough = rough and self.sae.uses_k
        self.kernels: SparseKernels = (in_bfloat16(exact) if rough else None) or exact
        self.section = optimizer
        self.grad_clip = grad_clip
        self.n_steps = n_steps
        self.dead_after = dead_after
        self.since_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        # W_enc is trained by latents, as it lies in memory; this is the same memory.
        self.parameters = {
            name: value.data.T if name == "W_enc" else value.data
            for name, value in self.sae.named_parameters()
        }
        self.moments = {
            name: {moment: torch.zeros_like(weights) for moment in ADAM_MOMENTS}
            for name, weights in self.parameters.items()
        }
        self.steps = 0
        self._gradients = LatentGradients.empty(config.d_sae, self.sae.W_dec)
        self._offset: Tensor | None = None  # c - b_enc, once it is known

    @property
    def dead(self) -> Int[Tensor, "dead"]:
        """Indices of the latents that have not fired for `dead_after` rows."""
        return (self.since_fired >= self.dead_after).nonzero().squeeze(1)

    @torch.no_grad()
    def start(self, x: Float[Tensor, "rows d_in"], seed: int) -> None:
        """Set the first weights.

        Decoder rows are random unit vectors, the encoder is their transpose times the one factor
        that minimises the reconstruction error of a first batch (measured: a wrong factor costs
        hundreds of steps). The factor has a closed form, because the activations scale with it.
        """
        sae = self.sae
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(sae.d_sae, sae.d_in, generator=generator).to(x)
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.b_dec.copy_(x.mean(dim=0))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.copy_(-(sae.b_dec @ sae.W_enc))
        sae.begin()
        code = sae.training_code(x, self.kernels)
        z = sae.activate_in_training(x @ sae.W_enc + sae.b_enc) if code is None else code
        explained = sae.decode(z) - sae.b_dec
        power = float(explained.square().sum())
        factor = float(((x - sae.b_dec) * explained).sum()) / power if power > 0 else 1.0
        sae.W_enc.mul_(factor)
        sae.b_enc.mul_(factor)
        self._offset = None
        sae.begin()

    @torch.no_grad()
    def step(self, x: Float[Tensor, "rows d_in"], step: int) -> dict[str, float]:
        """Learn from one batch of scaled activations.

        Args:
            x: The batch.
            step: Number of the step, counted from 0.

        Returns:
            Figures of the batch, before the weights moved: loss, squared_error (the sum over rows
            and dimensions), l0, dead_share, lr and grad_norm.

        Raises:
            NumericError: If loss or gradient is not finite; the weights are as before the step.
        """
        dead = self.dead
        self.sae.schedule(step, self.n_steps)
        result = training_step(
            self.sae,
            x,
            dead,
            self.kernels,
            self._gradients,
            tangent=self.sae.unit_decoder,
            centred=self._centred,
        )
        loss, norm = float(result.loss), float(result.length)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericError(f"the loss is {loss} and the gradient's norm {norm}.")
        rate = self.section.rate(step, self.n_steps)
        clip = math.inf if self.grad_clip is None else self.grad_clip
        self._move(result.gradients, rate, clip / norm if norm > clip else 1.0)
        self.since_fired += len(x)
        self.since_fired[result.fired] = 0
        self.sae.observe(result.code)
        return {
            "loss": loss,
            "squared_error": float(result.squared_error),
            "l0": result.n_fired / len(x),
            "dead_share": len(dead) / self.sae.d_sae,
            "lr": rate,
            "grad_norm": norm,
        }

    @property
    def _centred(self) -> bool:
        """Whether the bias that is learnt is that of an encoder of x - b_dec."""
        return self.sae.uses_k and not isinstance(self.sae, Elementwise)

    def _move(self, gradients: dict[str, Tensor], rate: float, factor: float) -> None:
        self.steps += 1
        if self._centred:
            offset = self._between_biases() if self._offset is None else self._offset
            self.sae.b_enc.add_(offset)
        section = self.section
        step = AdamStep(
            self.steps,
            rate,
            section.beta1,
            section.beta2,
            section.eps,
            section.weight_decay,
            factor,
        )
        for name, weights in self.parameters.items():
            mean, power = (self.moments[name][moment] for moment in ADAM_MOMENTS)
            unit = name == "W_dec" and self.sae.unit_decoder
            self.kernels.adamw(weights, mean, power, gradients[name], step, unit=unit)
        if self._centred:
            self._offset = self._between_biases()
            self.sae.b_enc.sub_(self._offset)

    def _between_biases(self) -> Float[Tensor, "d_sae"]:
        """Return by how much the bias of an encoder of x - b_dec is larger than b_enc."""
        return self.parameters["W_enc"] @ self.sae.b_dec

    def weights(self) -> dict[str, Tensor]:
        """Return everything that makes the SAE, by name."""
        return self.sae.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Set what `weights` returned, in place: the optimiser moves the same memory."""
        for name, value in self.sae.state_dict().items():
            value.copy_(weights[name])
        self._offset = None

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next steps depend on."""
        tensors = {**self.weights(), "since_fired": self.since_fired}
        for name, moments in self.moments.items():
            tensors[f"{name}.step"] = torch.tensor(float(self.steps))
            tensors.update({f"{name}.{moment}": value for moment, value in moments.items()})
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set what `state` returned."""
        self.load_weights(tensors)
        self.since_fired.copy_(tensors["since_fired"])
        for name, moments in self.moments.items():
            self.steps = int(tensors[f"{name}.step"])
            for moment, value in moments.items():
                value.copy_(tensors[f"{name}.{moment}"])
