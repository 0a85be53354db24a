"""What an intervention is, and at which tokens it acts.

An intervention gets all activations of a forward pass and the `Positions` that go with them. Under
generation with a cache it sees the prompt once and then each new token once, so that every token is
edited exactly once, as in a pass without a cache.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty.models.base import Intervention, Positions
from saefty.registry import Registry

__all__ = ["INTERVENTIONS", "Edit", "Intervention", "Positions", "Where", "acting_at", "chosen"]

Where = Literal["both", "prefill", "decode", "response"]
"""`both`: every token; `prefill`: tokens given to the model; `decode`: tokens it generates;
`response`: tokens it generates and those of a response that is given (teacher forcing)."""

Edit = Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]
"""A change of single rows, whatever token they belong to."""

INTERVENTIONS: Registry[Callable[..., Intervention]] = Registry(
    "intervention", "saefty.interventions"
)


def chosen(
    positions: Positions, where: Where = "both", *, skip_special: bool = True
) -> Bool[Tensor, "batch seq"]:
    """Return which tokens an intervention acts on; padding is never among them.

    Args:
        positions: What the forward pass reads.
        where: See `Where`.
        skip_special: Leave out special tokens, which SAEs are not trained on (a BOS has several
            times the norm of other tokens).

    Raises:
        ValueError: If `where` is none of the four words.
    """
    acts = positions.mask
    if skip_special:
        acts = acts & ~positions.special
    if where == "response":
        return acts & positions.response
    if where in {"prefill", "decode"}:
        return acts if positions.is_prefill == (where == "prefill") else torch.zeros_like(acts)
    if where != "both":
        raise ValueError(f"where is both, prefill, decode or response, not {where!r}")
    return acts


def acting_at(edit: Edit, where: Where = "both", *, skip_special: bool = True) -> Intervention:
    """Return the intervention that changes the rows of the chosen tokens and no others.

    The rows not chosen keep their bits.

    Args:
        edit: Gets the chosen rows as float32 and returns what replaces them.
        where: At which tokens to act.
        skip_special: Leave special tokens as they are.
    """

    def intervention(
        x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        acts = chosen(positions, where, skip_special=skip_special).to(x.device)
        if not acts.any():
            return x
        edited = x.clone()
        edited[acts] = edit(x[acts].float()).to(x.dtype)
        return edited

    return intervention
