"""What an intervention is, and at which tokens it acts.

An intervention gets all activations of a forward pass and the `Positions` that go with them. Under
generation with a cache it sees the prompt once and then each new token once, so that every token is
edited exactly once, as in a pass without a cache. Interventions compose (`in_order`), at one site
and at several (`intervening`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty.models.base import Intervention, ModelAdapter, Positions
from saefty.records import Site
from saefty.registry import Registry

__all__ = [
    "INTERVENTIONS",
    "Edit",
    "InOrder",
    "Intervention",
    "Positions",
    "Where",
    "acting_at",
    "chosen",
    "in_order",
    "intervening",
    "require_where",
]

WORDS = ("both", "prefill", "decode", "response", "last")
Where = Literal["both", "prefill", "decode", "response", "last"] | tuple[int, ...]
"""`both`: every token; `prefill`: tokens given to the model; `decode`: tokens it generates;
`response`: tokens it generates and those of a response that is given (teacher forcing); `last`: the
last token of the prompt; numbers: the tokens at these places of each example, counted from 0 at its
first token, be they given or generated. Special tokens count, but see `skip_special`: `last` is
then the last token that is not special."""

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
        ValueError: If `where` is none of the words, nor places.
    """
    require_where(where)
    acts = positions.mask
    if skip_special:
        acts = acts & ~positions.special
    if isinstance(where, tuple):
        places = torch.tensor(where, device=acts.device)
        return acts & torch.isin(positions.index, places)
    if where == "response":
        return acts & positions.response
    if where == "decode":
        return acts & positions.written
    if where == "both":
        return acts
    given = acts & ~positions.written
    if where == "prefill":
        return given
    # The furthest token of each row that is neither of a response nor generated.
    place = torch.where(given & ~positions.response, positions.index, -1)
    return (place == place.amax(dim=1, keepdim=True)) & (place >= 0)


def require_where(where: Where) -> None:
    """Refuse what names no tokens.

    Raises:
        ValueError: If it is none of the words, nor a tuple of places from 0 on.
    """
    if isinstance(where, tuple):
        if not where or min(where) < 0:
            raise ValueError(f"places are counted from 0 and there is at least one, not {where}")
    elif where not in WORDS:
        raise ValueError(f"where is {', '.join(WORDS)}, or a tuple of places, not {where!r}")


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


@dataclass(frozen=True)
class InOrder:
    """Several interventions at one site, the first one first; see `in_order`."""

    parts: tuple[Intervention, ...]

    def __call__(
        self, x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the activations after all of them."""
        for part in self.parts:
            x = part(x, positions)
        return x

    def describe(self, example: int) -> str:
        """Say what the parts do to an example, as far as they tell."""
        told = [part.describe(example) for part in self.parts if hasattr(part, "describe")]
        return ", then ".join(told) or "an intervention"


def in_order(*parts: Intervention) -> Intervention:
    """Return the intervention that applies several at one site, the first one first.

    Each reads what the one before it wrote: `in_order(project_out(v), steer(v, 4))` takes a
    direction out and puts a fixed amount of it in, the other order takes both out. The same as
    nested contexts, the first one outermost.
    """
    return InOrder(parts)


@contextmanager
def intervening(model: ModelAdapter, edits: Sequence[tuple[Site, Intervention]]) -> Iterator[None]:
    """Edit the activations at several sites within the context; at one site, in the order given.

    Args:
        model: The model.
        edits: Where, and what.

    Raises:
        ConfigError: If a layer is out of range.
        MismatchError: If the model does not have a site.
    """
    with ExitStack() as held:
        for site, edit in edits:
            held.enter_context(model.intervene(site, edit))
        yield
