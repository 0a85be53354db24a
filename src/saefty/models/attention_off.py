"""Turning off the attention of chosen blocks, or hiding the image from it, within a forward pass.

A *switch* is told the blocks in which it may act. `watching` sets the hooks that must be there in
the pass with attention on as well: one notes the form of an attention's output, so that zeros of
the same form can stand in its place without computing it; the other makes every mask explicit, so
that both passes run the same kernel. `off` turns chosen blocks off, in whatever forward pass runs
inside it.
"""

import abc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import Cache

from saefty.errors import MismatchError
from saefty.models.base import TokenBatch
from saefty.models.hooks import ATTENTION_NAMES, first_tensor, with_first

CROSS_ATTENTION = "cross_attn"
"""The child of a block that reads the image from beside the sequence (Mllama)."""


def cross_layers(blocks: Iterable[nn.Module]) -> list[int]:
    """Return which blocks read the image from beside the sequence."""
    return [i for i, block in enumerate(blocks) if hasattr(block, CROSS_ATTENTION)]


def make_switch(
    blocks: nn.ModuleList,
    batch: TokenBatch,
    layers: Sequence[int],
    method: str,
    name: str = "extract",
) -> "Switch":
    """Return what turns attention off in some blocks, or with `knockout` in those before them too.

    Blocks without what `cross_attention` turns off are passed over.

    Args:
        blocks: All blocks of the model.
        batch: What is read.
        layers: The blocks.
        method: How they are off.
        name: The section of the settings that messages name.
    """
    if method == "knockout":
        switch = HiddenImage(attention_of(blocks, range(max(layers) + 1)), name)
        switch.reading(batch.mask & ~batch.image, batch.image)
        return switch
    if method == "cross_attention":
        layers = sorted(set(layers) & set(cross_layers(blocks)))
    return ZeroedAttention(attention_of(blocks, layers))


def attention_of(blocks: nn.ModuleList, layers: Iterable[int]) -> dict[int, nn.Module]:
    """Return the attention of blocks: over the sequence, or over the image beside it."""
    found = {}
    for layer in layers:
        children = dict(blocks[layer].named_children())
        name = next(n for n in ATTENTION_NAMES if n in children)
        found[layer] = children[name]
    return found


class Switch(abc.ABC):
    """Something in the attention of blocks that can be turned off.

    Args:
        modules: The attention module of each block in which it may be.
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self.modules = modules

    @abc.abstractmethod
    def watching(self) -> AbstractContextManager[None]:
        """Return a context in which passes with attention on and off can be compared."""

    @abc.abstractmethod
    def off(self, layers: Collection[int]) -> AbstractContextManager[None]:
        """Return a context, within `watching`, in which these blocks are off.

        Each of them must have been on in that context before.
        """


class ZeroedAttention(Switch):
    """The attention of a block returns zeros.

    Args:
        modules: The attention module of each block in which it may be.
        computed: Compute it, so that its keys get into a cache, before zeros take its place. Then
            a block need not have been on before.
    """

    def __init__(self, modules: Mapping[int, nn.Module], *, computed: bool = False) -> None:
        super().__init__(modules)
        self._computed = computed
        self._zeros: dict[nn.Module, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the form of what each attention returns."""

        def note(module: nn.Module, _: Any, output: Any) -> None:
            first = first_tensor(output)
            zeros = first.new_zeros(()).expand_as(first)  # one number, whatever the shape
            rest = None if isinstance(output, Tensor) else (None,) * len(output)
            self._zeros[module] = zeros if rest is None else with_first(rest, zeros)

        with ExitStack() as hooks:
            for module in self.modules.values():
                hooks.callback(module.register_forward_hook(note).remove)
            yield

    @contextmanager
    def off(self, layers: Collection[int]) -> Iterator[None]:
        """Return zeros where these blocks' attention would be computed."""
        with ExitStack() as changes:
            for layer in layers:
                module = self.modules[layer]
                if self._computed:
                    # Before all other hooks: what they edit is what the attention gives.
                    handle = module.register_forward_hook(_zeroed, prepend=True)
                    changes.callback(handle.remove)
                elif module in self._zeros:  # otherwise a pass ends before it
                    changes.enter_context(_returning(module, self._zeros[module]))
            yield


class HiddenImage(Switch):
    """No token outside the image attends to a token of the image; the rest is normalised anew.

    Special tokens count as text: they would pass the image on. What tokens of the image attend to
    stays, and so does what padding attends to, which nothing reads.

    Args:
        modules: The attention module of each block in which it may be.
        name: The section of the settings that messages name.
    """

    def __init__(self, modules: Mapping[int, nn.Module], name: str = "extract") -> None:
        super().__init__(modules)
        self._name = name
        self._off: frozenset[int] = frozenset()
        self._hidden: Bool[Tensor, "batch 1 query key"] | None = None

    def reading(self, text: Bool[Tensor, "batch query"], image: Bool[Tensor, "batch key"]) -> None:
        """Say what is read next.

        Args:
            text: Which tokens that are read are not of an image, nor padding.
            image: Which tokens that can be attended to are of an image: those, behind all that a
                cache holds.
        """
        self._hidden = text[:, None, :, None] & image[:, None, None, :]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Give each attention a mask of one form, with the image hidden where it is off.

        Raises:
            MismatchError: If an attention module takes no such mask.
        """

        def hook(layer: int, module: nn.Module) -> Any:
            def put(_: nn.Module, args: Any, kwargs: Any) -> Any:
                mask = self._mask(module, kwargs, hide=layer in self._off)
                return args, {**kwargs, "attention_mask": mask}

            return module.register_forward_pre_hook(put, with_kwargs=True)

        with ExitStack() as hooks:
            for layer, module in self.modules.items():
                hooks.callback(hook(layer, module).remove)
            yield

    @contextmanager
    def off(self, layers: Collection[int]) -> Iterator[None]:
        """Hide the image in these blocks."""
        before, self._off = self._off, self._off | frozenset(layers)
        try:
            yield
        finally:
            self._off = before

    def _mask(self, module: nn.Module, kwargs: Mapping[str, Any], *, hide: bool) -> Tensor:
        """Return the mask of a call for each example, query and key."""
        assert self._hidden is not None, "nobody said what is read"
        if "attention_mask" not in kwargs:
            raise MismatchError(
                f"{type(module).__name__} is not given its attention mask by name, so the image "
                "cannot be hidden from it.",
                then=f"Set {self._name}.contrast.method=zero_attention, or use a family of "
                "docs/families.md.",
            )
        hidden = _in_reach(self._hidden, module, kwargs)
        mask = kwargs["attention_mask"]
        kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if mask is None and kind == "sdpa":  # sdpa's own rule for a mask that is left out
            mask = _left_out(hidden, getattr(module, "is_causal", True))
        if not isinstance(mask, Tensor) or mask.shape[-2:] != hidden.shape[-2:] or mask.ndim != 4:
            raise MismatchError(
                f"attention of the kind {kind} takes no mask for each pair of tokens, so the image "
                "cannot be hidden from the text alone.",
                then="Set model.attn=sdpa or eager.",
            )
        hidden = hidden.to(mask.device) & hide
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _in_reach(
    hidden: Bool[Tensor, "batch 1 query total"], module: Any, kwargs: Mapping[str, Any]
) -> Bool[Tensor, "batch 1 query key"]:
    """Return what is hidden among the keys that an attention has: a window's are the last."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache):
        return hidden
    keys, _ = cache.get_mask_sizes(hidden.shape[-2], module.layer_idx)
    return hidden[..., -keys:]


def _left_out(hidden: Bool[Tensor, "batch 1 query key"], causal: bool) -> Bool[Tensor, "..."]:
    query, key = hidden.shape[-2:]
    mask = torch.ones(1, 1, query, key, dtype=torch.bool, device=hidden.device)
    return mask.tril(key - query) if causal else mask


def _zeroed(_: nn.Module, __: Any, output: Any) -> Any:
    return with_first(output, torch.zeros_like(first_tensor(output)))


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module's hooks run as ever, but return `output` where it would compute."""
    own = module.__dict__.get("forward")  # accelerate puts one there
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
