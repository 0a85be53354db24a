"""δ while the model runs: read it, and edit it, in the forward pass that it belongs to.

An edit of δ changes what lies at the site by as much: h := h + (edit(δ) - δ), in the pass with
attention on. With attention off, nothing is edited. The OFF state is computed beside that pass:

- `per_layer`: when the pass comes to the layer, its block is called a second time with what it is
  called with, its attention off, as far as the site. It reads a copy of the cache, so that keys are
  kept once. One block more a pass.
- `joint`: before the pass, the model runs a second time, all layers of the contrast off, as far as
  the site, with a cache of its own. A second pass to the site, image tower included, and its keys.

Other interventions edit both, and act in both; what is computed beside the pass is seen by nobody
who reads the model.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache

from saefty.errors import MismatchError
from saefty.models.attention_off import (
    HiddenImage,
    Switch,
    ZeroedAttention,
    attention_of,
    cross_layers,
)
from saefty.models.base import Intervention, ModelAdapter, Positions, TokenBatch
from saefty.models.contrast import ContrastSection, capture_contrast, require_contrast
from saefty.models.contrast_check import worst_gap
from saefty.models.decoder import Decoder
from saefty.models.hooks import aside, is_aside
from saefty.records import Site


class _Known(Exception):  # noqa: N818 - a signal that the OFF state is there, no error
    """Raised at the site, beside the pass, to go no further."""


@dataclass(frozen=True)
class LiveContrast:
    """δ at one site.

    Attributes:
        site: Where.
        section: What is off, and where.
        layers: The layers that were read together, which with `joint` are off together.
    """

    site: Site
    section: ContrastSection
    layers: tuple[int, ...]

    @contextmanager
    def edited(self, model: ModelAdapter, edit: Intervention) -> Iterator[None]:
        """Edit δ in every forward pass within the context.

        Args:
            model: The model.
            edit: Returns what is to be in δ's place. Gets it in float32.

        Raises:
            ConfigError: If the layer is out of range, or δ is zero there whatever is computed.
            MismatchError: If the family has no such part, or nothing that could be turned off; or,
                in a pass, if the OFF state cannot be known.
        """
        with _Pass(self._decoder(model), self, edit).running():
            yield

    def read(
        self, model: ModelAdapter, batch: TokenBatch, rows: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "rows d_model"]:
        """Return δ of some tokens as an extraction does, under no intervention."""
        sites = [Site(layer, self.site.part) for layer in self._read_together]
        return capture_contrast(model, batch, sites, rows, self.section)[self.site]

    def check(self, model: ModelAdapter, batch: TokenBatch) -> None:
        """Check on a first batch that δ while the model runs is what an extraction reads.

        Args:
            model: The model.
            batch: Some of what it is about to read.

        Raises:
            MismatchError: If it is not.
        """
        seen: list[Tensor] = []

        def watch(x: Float[Tensor, "batch seq d_model"], _: Positions) -> Tensor:
            seen[:] = [x[batch.mask.to(x.device)].clone()]
            return x

        decoder = self._decoder(model)
        on = decoder.capture(batch, [self.site], batch.mask)[self.site]
        extracted = self.read(model, batch, batch.mask)
        with self.edited(model, watch):
            decoder.capture(batch, [self.site], batch.mask)
        worst = worst_gap(on, seen[0].to(on.device), extracted)
        if worst is not None:
            raise MismatchError(
                f"δ at {self.site} cannot be known while {model.name} "
                f"({model.info.architecture}) replies: from what an extraction reads it differs by "
                f"{worst[0]:.2g} at a token where ‖δ‖ is {worst[1]:.2g}.",
                then="Set intervention.forward=false to silence latents in the stored activations "
                "alone.",
            )

    @property
    def _read_together(self) -> tuple[int, ...]:
        """The layers whose being off matters at the site."""
        if self.section.scope == "per_layer":
            return (self.site.layer,)
        return tuple(sorted({self.site.layer, *(i for i in self.layers if i <= self.site.layer)}))

    def _decoder(self, model: ModelAdapter) -> Decoder:
        if not isinstance(model, Decoder):
            raise MismatchError(
                f"{model.name} is read by {type(model).__name__}, which writes no replies in which "
                "δ could be edited.",
                then="Set intervention.forward=false.",
            )
        sites = [Site(layer, self.site.part) for layer in self._read_together]
        require_contrast(model, sites, self.section)
        return model

    def _switch(self, blocks: nn.ModuleList) -> Switch:
        layers = self._read_together
        if self.section.method == "knockout":
            if self.section.scope == "joint":
                layers = tuple(range(self.site.layer + 1))
            return HiddenImage(attention_of(blocks, layers))
        if self.section.method == "cross_attention":
            layers = tuple(i for i in layers if i in cross_layers(blocks))
        return ZeroedAttention(attention_of(blocks, layers), computed=True)


class _Pass:
    """One site's δ in all passes of a model, until the context ends."""

    def __init__(self, model: Decoder, place: LiveContrast, edit: Intervention) -> None:
        self._model, self._place, self._change = model, place, edit
        self._switch = place._switch(model.blocks)
        self._joint = place.section.scope == "joint"
        self._noting = False  # whether the OFF state is computed now
        self._off: Tensor | None = None
        self._off_cache: Cache | None = None  # of `joint`
        self._image: Tensor | None = None  # which tokens that were read are of an image

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hook into the model."""
        model, site = self._model, self._place.site
        block = model.blocks[site.layer]
        with ExitStack() as held:
            held.enter_context(self._switch.watching())
            held.enter_context(model.intervene(site, self._at_site))
            # Behind what tells the model where its tokens stand, which `intervene` has set.
            before = model._stack.register_forward_pre_hook(self._before_pass, with_kwargs=True)
            # Before the edits of what goes into the block: a second call has them again.
            enter = block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            held.callback(before.remove)
            held.callback(enter.remove)
            yield

    def _at_site(
        self, x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        if self._noting:
            self._off = x.float()
            raise _Known
        if is_aside():
            return x
        assert self._off is not None, "the pass came to a site of which nothing is known"
        delta = x.float() - self._off
        self._off = None
        return x.float() + (self._change(delta, positions) - delta)

    def _before_pass(self, stack: nn.Module, args: Any, kwargs: Any) -> None:
        if is_aside():
            return
        cache = _cache_in(args, kwargs)
        goes_on = cache is not None and cache.get_seq_length() > 0
        if isinstance(self._switch, HiddenImage):
            self._look_for_images(kwargs.get("input_ids", args[0] if args else None), goes_on)
        if not self._joint:
            return
        if goes_on and not self._model._ours:
            raise MismatchError(
                f"δ of the scope joint at {self._place.site} is edited in replies of saefty's own "
                "generate alone: of another's it is not known which cached tokens go on.",
                then="Call model.generate, or generate with use_cache=False.",
            )
        off, self._off_cache = self._off_cache if goes_on else None, None
        if off is not None and self._model._positions is not None:
            _of_rows(off, len(self._model._positions.mask))
        with_off = _replacing(off)
        self._note(stack, tuple(map(with_off, args)), _each(with_off, kwargs))

    def _look_for_images(self, ids: Any, goes_on: bool) -> None:
        positions = self._model._positions
        if not isinstance(ids, Tensor) or positions is None:
            raise MismatchError(
                f"a forward pass of {self._model.name} is given no token ids, so it is not known "
                "which of its tokens are of an image.",
                then="Call it with input_ids.",
            )
        new = self._model.image_tokens(ids)
        before = self._image
        self._image = torch.cat([before, new], dim=1) if goes_on and before is not None else new
        assert isinstance(self._switch, HiddenImage)
        self._switch.reading(positions.mask.to(new.device) & ~new, self._image)

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if self._joint:
            if self._noting:  # the model has made one, where it keeps any
                self._off_cache = _cache_in(args, kwargs)
        elif not is_aside():
            self._note(block, tuple(map(_copied, args)), _each(_copied, kwargs))

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Call a module with attention off, as far as the site."""
        self._noting = True
        try:
            with aside(), self._switch.off(self._switch.modules), suppress(_Known):
                module(*args, **kwargs)
        finally:
            self._noting = False


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    return next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)


def _of_rows(cache: Cache, rows: int) -> None:
    """Give a cache as many rows as go on: a prompt that several begin with was read as one."""
    first: Any = cache.layers[0]
    if first.keys.shape[0] < rows:
        cache.batch_repeat_interleave(rows)


def _replacing(cache: Cache | None) -> Callable[[Any], Any]:
    """Return what puts a cache in the place of another."""
    return lambda value: cache if isinstance(value, Cache) else value


def _copied(value: Any) -> Any:
    """Return a cache to which keys can be added without that they are in the other too."""
    if not isinstance(value, Cache):
        return value
    clone = copy.copy(value)
    clone.layers = [copy.copy(layer) for layer in value.layers]
    return clone


def _each(change: Callable[[Any], Any], named: dict[str, Any]) -> dict[str, Any]:
    return {name: change(value) for name, value in named.items()}
