"""Many rows that begin alike: what they begin with is read once, and each goes on in its own way.

A grid of vectors or strengths gives one prompt to many rows. Up to the first place where an
intervention acts they all compute the same, so one row goes in. It is repeated where the rows part:
at that place, and in the cache behind the pass. Mask and positions of the one row hold for all, as
none is padded. Whether a family's blocks take that is tried on four tokens.
"""

import abc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from saefty.errors import MismatchError
from saefty.models.base import Positions, TokenBatch
from saefty.models.batching import whole_pass
from saefty.models.hooks import capturing, first_tensor, hidden_input, with_first
from saefty.models.transformer import TransformerModel
from saefty.records import Site

Place = tuple[nn.Module, Literal["in", "out"]]
STREAM = frozenset({"resid_pre", "resid_post"})
"""Parts at which rows may part: what a block holds beside them would still be one row's."""


class SharedPrompts(TransformerModel):
    """What a causal language model does for rows that begin alike."""

    @abc.abstractmethod
    def _forward(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch total"],
        positions: Positions,
        **options: Any,
    ) -> Any:
        """Run the model over tokens, with `_positions` set."""

    @abc.abstractmethod
    def _read_ids(
        self, places: Sequence[tuple[Site, nn.Module, Literal["in", "out"]]], ids: list[int]
    ) -> dict[Site, Tensor]:
        """Return what some token ids give at some places."""

    @cached_property
    def causal(self) -> bool:
        """Whether a token's activations depend on it and those before it alone.

        Tried on four tokens: another last one must leave the others as they were. Rotary angles
        that depend on the length of what is read are told by the configuration.
        """
        if _depends_on_length(getattr(self.config, "rope_parameters", None)):
            return False
        last = Site(self.n_layers - 1)
        places = [(last, *super()._place(last))]
        one, other = (
            self._read_ids(places, ids)[last].float()[0, :3] for ids in ([0, 1, 2, 3], [0, 1, 2, 4])
        )
        allowed = min(1000 * torch.finfo(self.dtype).eps, 0.02)  # experts see other batches
        # Token by token: the first one's norm may be a hundred times the others'.
        return bool(((one - other).norm(dim=1) <= allowed * one.norm(dim=1)).all())

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether rows that begin alike may be read as one.

        Tried on two rows of four tokens, of which block 0 moves one: their logits must be those of
        a pass in which each is read by itself, from its first token to its last.
        """
        if self.reads_images:
            return False
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]], device=self.device)
        mask, where = torch.ones_like(ids, dtype=torch.bool), torch.arange(4, device=self.device)
        positions = Positions(mask, where.expand(2, 4), ~mask, ~mask, is_prefill=True)
        given, more = _columns(positions, 0, 2), _columns(positions, 2, 4)
        place: Place = (self.blocks[0], "out")
        try:
            with _hooked(place, lambda x: torch.cat([x[:1], 1.5 * x[1:]])):
                each = self._forward(ids, mask, positions, use_cache=False).logits[:, -1].float()
                begun = self._begin(ids[:, :2], given, [place], room=2)
                keys = {"use_cache": True, "past_key_values": begun.past_key_values}
                found = self._forward(ids[:, 2:], mask, more, **keys).logits[:, -1].float()
            allowed = min(1000 * torch.finfo(self.dtype).eps, 0.02)
            return bool(((found - each).norm(dim=1) <= allowed * each.norm(dim=1)).all())
        except (MismatchError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # a family that is put together in another way, or no numbers to compare

    def begins_alike(self, batch: TokenBatch) -> bool:
        """Return whether several rows hold the same tokens, and may be read as one."""
        return (
            len(batch.ids) > 1
            and bool(batch.mask.all())
            and bool((batch.ids == batch.ids[:1]).all())
            and {site.part for site, _ in self._edits} <= STREAM
            and self.shares_prompts
        )

    def begin(self, batch: TokenBatch, positions: Positions, room: int) -> Any:
        """Read the one prompt of all rows, and return the output with a cache of all rows.

        Args:
            batch: Rows of the same tokens.
            positions: Those of all rows, as interventions are told them.
            room: How many tokens are to follow.
        """
        places = [self._place(site) for site, _ in self._edits]
        return self._begin(batch.ids, positions, places, room)

    def _begin(
        self,
        ids: Int[Tensor, "rows seq"],
        positions: Positions,
        places: Sequence[Place],
        room: int,
        layers: int | None = None,
    ) -> Any:
        rows = len(ids)
        with ExitStack() as held:
            for place in places:
                held.enter_context(_hooked(place, lambda x: _repeated(x, rows), first=True))
            output = self._forward(
                ids[:1],
                positions.mask[:1],
                positions,
                position_ids=positions.index[:1],
                use_cache=True,
                logits_to_keep=1,
            )
        output.logits = _repeated(output.logits, rows)
        _make_room(output.past_key_values, rows, room, layers)
        return output

    def capture_behind(
        self, batch: TokenBatch, sites: Sequence[Site], rows: Bool[Tensor, "batch seq"]
    ) -> dict[Site, Tensor]:
        """Return what `capture` does; the tokens that all rows begin with are read once.

        Raises:
            ConfigError: If a layer is out of range or a site occurs twice.
            MismatchError: If the family does not have the part.
        """
        alike = ((batch.ids == batch.ids[:1]) & batch.mask & ~rows).all(dim=0)
        shared = int(alike.long().cumprod(dim=0).sum())
        if (
            self._edits
            or len(batch.ids) < 2
            or not shared
            or not (self.causal and self.shares_prompts)
        ):
            return self.capture(batch, sites, rows)
        self.info.check_sites(sites)
        places = [(site, *self._place(site)) for site in sites]
        positions = whole_pass(batch)
        given = _columns(positions, 0, shared)
        length = batch.ids.shape[1] - shared
        deepest = 1 + max(site.layer for site in sites)
        begun = self._begin(batch.ids[:, :shared], given, [], length, deepest)
        found: dict[Site, Tensor] = {}
        with capturing(places, (len(batch.ids), length, self.d_model), rows[:, shared:], found):
            self._forward(
                batch.ids[:, shared:],
                batch.mask,
                replace(_columns(positions, shared, shared + length), is_prefill=False),
                use_cache=True,
                past_key_values=begun.past_key_values,
            )
        return {site: found[site] for site in sites}


class _Room(DynamicLayer):
    """A layer of a cache with room for tokens to come: adding one copies none of those before."""

    def __init__(self, layer: DynamicLayer, rows: int, room: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self._length = layer.keys.shape[-2]
        self._space = [_with_room(one, rows, room) for one in (layer.keys, layer.values)]
        self.keys, self.values = (one[..., : self._length, :] for one in self._space)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, and return all."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._space[0].shape[-2]:
            return super().update(key_states, value_states)
        for space, new in zip(self._space, (key_states, value_states), strict=True):
            space[..., start : self._length, :] = new
        self.keys, self.values = (one[..., : self._length, :] for one in self._space)
        return self.keys, self.values


def _with_room(x: Tensor, rows: int, room: int) -> Tensor:
    _, heads, length, width = x.shape
    space = x.new_empty(rows, heads, length + room, width)
    space[..., :length, :] = x
    return space


def _make_room(cache: Any, rows: int, room: int, layers: int | None) -> None:
    """Give every layer of a cache, or the first ones, all rows, and room for tokens to come.

    Raises:
        MismatchError: If the cache holds something else than keys and values.
    """
    kinds = {type(layer) for layer in cache.layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise MismatchError(f"a cache of {names} is not repeated by rows.")
    for place, layer in enumerate(cache.layers[:layers]):
        if not layer.is_initialized:
            continue
        if type(layer) is DynamicLayer:
            cache.layers[place] = _Room(layer, rows, room)
        elif len(layer.keys) < rows:
            layer.batch_repeat_interleave(rows)


def _repeated(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else x.repeat(rows, 1, 1)


def _columns(positions: Positions, start: int, stop: int) -> Positions:
    """Return the positions of some tokens of every row."""
    return replace(
        positions,
        mask=positions.mask[:, start:stop],
        index=positions.index[:, start:stop],
        special=positions.special[:, start:stop],
        response=positions.response[:, start:stop],
    )


@contextmanager
def _hooked(place: Place, change: Any, *, first: bool = False) -> Iterator[None]:
    """Change the activations at a place; `first`: before what was registered earlier."""
    module, end = place

    def output(_: nn.Module, __: Any, given: Any) -> Any:
        return with_first(given, change(first_tensor(given)))

    def input_(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = change(hidden_input(args, kwargs))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    if end == "out":
        handle = module.register_forward_hook(output, prepend=first)
    else:
        handle = module.register_forward_pre_hook(input_, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


def _depends_on_length(rope: Any) -> bool:
    """Return whether rotary angles are chosen by how long the text is that is read."""
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type") or rope.get("type")
    return kind in {"dynamic", "longrope"} or any(map(_depends_on_length, rope.values()))
