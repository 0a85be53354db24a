"""Adding a vector to the activations, and taking a direction out of them or holding it down.

    method 1    h' = h + α e
    method 2    h' = ‖h‖ (h + α e) / ‖h + α e‖     keeps the norm; α = 0 changes nothing

One α of e is a length that has to be chosen (`Unit`): e as it is, or its direction times a length
that is kept with it. Measured on the same texts at the same place, that length is one for vectors
of all methods, and α means the same for them. A batch may carry another vector and another α for
each of its examples, so that a grid of them, or thousands of vectors, cost one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefty.errors import ConfigError, MismatchError
from saefty.interventions.base import (
    INTERVENTIONS,
    Intervention,
    Where,
    acting_at,
    chosen,
    require_where,
)
from saefty.interventions.vectors import SteeringVector
from saefty.models.base import Positions

Method = Literal[1, 2]
Unit = Literal["activation", "residual", "latent"]
"""What α = 1 means: `activation`: the vector as it is (α in units of the activations where it has
length 1); `residual`: its direction, times the mean norm of activations that is kept with the
vector (`norms`), which is of the texts that it was measured on: for one length for all vectors,
measure it on the same texts; `latent`: its direction, as long as what its latent adds at its
largest value."""

UNIT_WORDS = {
    "activation": "in activation units",
    "residual": "in multiples of the mean residual norm",
    "latent": "in multiples of the latent's maximum",
}
TINY = 1e-30
RANK = 1e-6
Directions = (
    SteeringVector
    | Sequence[SteeringVector]
    | Float[Tensor, "*n d_model"]
    | Float[np.ndarray, "*n d_model"]
)


@dataclass(frozen=True, eq=False)
class Steering:
    """Adds a vector, the same for all examples or another for each; made by `steer`.

    Attributes:
        alphas: How much of its vector each example gets, for messages; one serves all of them.
        moves: What is added, α e, likewise.
        method: 1 adds, 2 adds and keeps the norm.
        where: At which tokens to act.
        skip_special: Leave special tokens alone.
    """

    alphas: Float[Tensor, "examples"]
    moves: Float[Tensor, "examples d_model"]
    method: Method
    where: Where
    skip_special: bool
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The moves on the devices where they were needed: blocks of a model may lie on several."""

    @cached_property
    def _some_zero(self) -> bool:
        """Whether there is an example to which nothing is added, not even by method 2."""
        return not bool((self.moves != 0).any(dim=-1).all())

    def describe(self, example: int) -> str:
        """Say what happens to an example, for messages."""
        alpha = float(self.alphas[example % len(self.alphas)])
        return f"method {self.method} with alpha = {alpha:g}"

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the activations with the vector added at the chosen tokens."""
        if x.shape[-1] != self.moves.shape[-1]:
            raise MismatchError(
                f"the vector is {self.moves.shape[-1]} wide, but the activations are "
                f"{x.shape[-1]} wide.",
                then="Use a vector made on this model.",
            )
        if x.device not in self._placed:
            self._placed[x.device] = self.moves.to(x.device)
        move = self._placed[x.device]
        if len(move) > 1:
            rows = positions.examples
            if positions.is_prefill and int(rows.max()) >= len(move):
                raise ValueError(
                    f"{len(move)} vectors or alphas were given, one for each example, but there "
                    f"are at least {int(rows.max()) + 1} examples"
                )
            move = move[rows]
        acts = chosen(positions, self.where, skip_special=self.skip_special)
        if self._some_zero:
            acts = acts & (move != 0).any(dim=-1, keepdim=True)
        h = x.float()
        moved = h + move[:, None]
        if self.method == 2:
            norms = torch.linalg.vector_norm(moved, dim=-1, keepdim=True).clamp_min_(TINY)
            moved.mul_(torch.linalg.vector_norm(h, dim=-1, keepdim=True).div_(norms))
        return torch.where(acts[..., None], moved.to(x.dtype), x)


@INTERVENTIONS.register("steer")
def steer(
    vector: Directions,
    alpha: float | Sequence[float],
    *,
    method: Method = 1,
    unit: Unit = "activation",
    where: Where = "both",
    skip_special: bool = True,
) -> Intervention:
    """Return the intervention that adds α times a vector.

    Args:
        vector: A vector; or several, one for each example of a batch (for `generate`, of the
            examples it is given). A tensor or an array is [d_model] or [vectors, d_model].
        alpha: How much of it; or several, one for each example. 0 changes no bit.
        method: 1: h + α e. 2: the same, brought back to the norm of h.
        unit: What α = 1 means; see `Unit`.
        where: At which tokens to act.
        skip_special: Leave special tokens alone: a BOS has several times the norm of other tokens.

    Raises:
        ConfigError: If the unit's length was not measured for a vector.
        ValueError: If `method`, `unit` or `where` is none of those above, an alpha is not finite,
            or there are not as many alphas as vectors.

    Example:
        >>> with model.intervene(vector.site, steer(vector, 4.0)):  # doctest: +SKIP
        ...     model.generate(prompts, max_new_tokens=64)
    """
    if method not in (1, 2):
        raise ValueError(f"method is 1 (add) or 2 (add and keep the norm), not {method!r}")
    require_where(where)
    steps = _steps(vector, unit)
    alphas = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1)
    if not len(alphas) or not bool(torch.isfinite(alphas).all()):
        raise ValueError(f"alpha is a finite number, or a list of them, not {alpha!r}")
    if 1 < len(steps) != len(alphas) > 1:
        raise ValueError(f"{len(alphas)} alphas were given for {len(steps)} vectors")
    moves = (alphas[:, None] * steps.double()).float()
    return Steering(alphas.expand(len(moves)), moves, method, where, skip_special)


def step_of(vector: SteeringVector, unit: Unit) -> Float[Tensor, "d_model"]:
    """Return what α = 1 of a vector adds.

    Raises:
        ConfigError: If the unit's length was not measured for the vector.
        ValueError: If there is no such unit.
    """
    if unit == "activation":
        return vector.values
    if unit not in UNIT_WORDS:
        raise ValueError(f"unit is {', '.join(UNIT_WORDS)}, not {unit!r}")
    if unit not in vector.norms:
        known = ["activation", *vector.norms]
        what = "the mean norm of activations" if unit == "residual" else "the latent's maximum"
        raise ConfigError(
            f"the {vector.method} vector says nothing of {what}, so alpha cannot be counted in it.",
            then=f"Measure it and keep it with the vector (with_norms({unit}=...)), or take a unit "
            f"that it has: {', '.join(known)}.",
        )
    return vector.unit * vector.norms[unit]


@INTERVENTIONS.register("project_out")
def project_out(
    vectors: Directions, *, where: Where = "both", skip_special: bool = True
) -> Intervention:
    """Return the intervention that takes directions out: h' = h - Σ (h·q) q.

    The q are an orthonormal basis of the vectors' span, so that nothing of any of them is left.

    Args:
        vectors: One vector or several; their lengths do not matter.
        where: At which tokens to act.
        skip_special: Leave special tokens alone.
    """
    # Of one length each: beside one that is very long, another would pass for rounding.
    rows = torch.nn.functional.normalize(_steps(vectors, "activation").double(), dim=1, eps=TINY)
    basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((basis.S / basis.S.max() > RANK).sum())
    q: Float[Tensor, "directions d_model"] = basis.Vh[:rank].float()

    def edit(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        own = _fitting(q, x)
        return x - (x @ own.T) @ own

    return acting_at(edit, where, skip_special=skip_special)


@INTERVENTIONS.register("cap")
def cap(
    vector: SteeringVector | Float[Tensor, "d_model"] | Float[np.ndarray, "d_model"],
    most: float,
    *,
    where: Where = "both",
    skip_special: bool = True,
) -> Intervention:
    """Return the intervention that lets h go no further along a direction than c.

    h' = h - max(0, h·ê - c) ê, where ê is the vector with length 1. Rows that lie below keep their
    values.

    Args:
        vector: The direction; its length does not matter.
        most: c, in units of the activations.
        where: At which tokens to act.
        skip_special: Leave special tokens alone.
    """
    e = torch.nn.functional.normalize(_steps(vector, "activation"), dim=1)

    def edit(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        own = _fitting(e, x)
        return x - (x @ own.T - most).clamp_min(0.0) * own

    return acting_at(edit, where, skip_special=skip_special)


def _fitting(q: Float[Tensor, "n width"], x: Tensor) -> Tensor:
    if q.shape[-1] != x.shape[-1]:
        raise MismatchError(
            f"the vector is {q.shape[-1]} wide, but the activations are {x.shape[-1]} wide.",
            then="Use a vector made on this model.",
        )
    return q.to(x)


def _steps(vector: Directions, unit: Unit) -> Float[Tensor, "vectors d_model"]:
    """Return what α = 1 of each vector adds, [vectors, d_model]."""
    if isinstance(vector, np.ndarray):
        vector = torch.from_numpy(vector)
    if isinstance(vector, Tensor):
        if unit != "activation":
            raise ConfigError(
                f"alpha cannot be counted {UNIT_WORDS.get(unit, repr(unit))} of a bare tensor.",
                then="Make it a SteeringVector with norms, or count alpha in activation units.",
            )
        if not vector.ndim or not vector.numel():
            raise ValueError(f"a vector is [d_model] or [vectors, d_model], not {[*vector.shape]}")
        return vector.detach().float().reshape(-1, vector.shape[-1])
    several = [vector] if isinstance(vector, SteeringVector) else list(vector)
    if not several:
        raise ValueError("there is no vector")
    wrong = next((one for one in several if not isinstance(one, SteeringVector)), None)
    if wrong is not None:
        raise ValueError(
            "a vector is a SteeringVector, a tensor or an array, or several of the first; not a "
            f"list that holds a {type(wrong).__name__}"
        )
    return torch.stack([step_of(one, unit) for one in several])
