"""One forward pass in which some layers are computed twice: with their attention on, and off."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache

from saefty.errors import MismatchError
from saefty.models.attention_off import Switch
from saefty.models.base import TokenBatch
from saefty.models.hooks import Captured, kept_rows, reading
from saefty.models.transformer import TransformerModel
from saefty.records import Site


class TwiceComputed:
    """One forward pass in which each layer that is read is computed again with its attention off.

    A layer is computed again when it is done, by calling the block with what it was called with,
    so that interventions within it act on both. The deepest is called twice by its own hook, and
    the pass ends there: so both calls stop behind the last site in it.

    Args:
        model: The model.
        batch: What to read.
        sites: Where to look.
        rows: Keep only these tokens; None keeps all.
        switch: What turns attention off; within its `watching`.
    """

    def __init__(
        self,
        model: TransformerModel,
        batch: TokenBatch,
        sites: Sequence[Site],
        rows: Bool[Tensor, "batch seq"] | None,
        switch: Switch,
    ) -> None:
        self._model, self._batch, self._rows, self._switch = model, batch, rows, switch
        self._sites: dict[int, list[Site]] = defaultdict(list)
        for site in sites:
            self._sites[site.layer].append(site)
        self._shape = (*batch.ids.shape, model.d_model)
        self._called: dict[int, tuple[Any, Any]] = {}  # what a block was called with
        self._again: Literal["on", "off"] | None = None  # whether a hook is calling a block
        self._on: dict[Site, Tensor] = {}
        self._delta: dict[Site, Tensor] = {}

    def read(self) -> dict[Site, Tensor]:
        """Run the pass, and return δ at each site.

        Raises:
            MismatchError: If the pass does not come to a site.
        """
        places = [(site, *self._model._place(site)) for site in self._all]
        with ExitStack() as hooks:
            hooks.enter_context(reading(places, self._see))
            for layer in self._sites:
                block = self._model.blocks[layer]
                # Before the edits of what goes into the block: a second call has them again.
                enter = block.register_forward_pre_hook(
                    self._entering(layer), with_kwargs=True, prepend=True
                )
                leave = block.register_forward_hook(self._leaving(layer))
                hooks.callback(enter.remove)
                hooks.callback(leave.remove)
            with suppress(Captured):
                self._model._read(self._batch)
        missed = [str(site) for site in self._all if site not in self._delta]
        if missed:
            raise MismatchError(
                f"a forward pass of {self._model.name} never comes to {', '.join(missed)}.",
                then="Give the examples an image if the layer reads one from beside the sequence; "
                "otherwise use a family of docs/families.md.",
            )
        return self._delta

    @property
    def _all(self) -> list[Site]:
        return [site for sites in self._sites.values() for site in sites]

    def _see(self, site: Site, x: Float[Tensor, "*tokens d_model"]) -> None:
        kept = kept_rows(site, x, self._shape, self._rows)
        if self._again == "off":
            self._delta[site] = self._on[site].float() - kept.float()
            seen: Mapping[Site, Tensor] = self._delta
        else:
            self._on[site] = kept
            seen = self._on
        if self._again and all(other in seen for other in self._sites[site.layer]):
            raise Captured

    def _entering(self, layer: int) -> Any:
        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            if self._again:
                return
            self._called[layer] = args, kwargs
            if layer == max(self._sites):
                self._call(layer, block, "on")
                self._call(layer, block, "off")
                raise Captured

        return enter

    def _leaving(self, layer: int) -> Any:
        def leave(block: nn.Module, _: Any, __: Any) -> None:
            if not self._again:
                self._call(layer, block, "off")

        return leave

    def _call(self, layer: int, block: nn.Module, way: Literal["on", "off"]) -> None:
        args, kwargs = self._called[layer]
        if way == "off":  # a cache holds the keys of this layer already
            args = tuple(map(_no_cache, args))
            kwargs = {name: _no_cache(value) for name, value in kwargs.items()}
        self._again = way
        try:
            with self._switch.off([layer] if way == "off" else []), suppress(Captured):
                block(*args, **kwargs)
        finally:
            self._again = None
        if way == "off":
            del self._called[layer]
            for site in self._sites[layer]:
                self._on.pop(site, None)


def _no_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value
