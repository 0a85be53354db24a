"""Reading and editing activations inside a model: the only file that knows about hooks and tuples.

A site is read where PyTorch hands the tensor over: at a module's input or at its output. Which
module that is differs by family only in a few child names (`Layout`). A block's output is a tensor
or a tuple that begins with one, depending on family and version; both are handled here. OPT's MLP
reads and writes all tokens of a batch as one row of them, [batch * seq, d_model]: what is captured
and edited there has that shape, and the caller folds it.

transformers' own `output_hidden_states` is never used: its last entry is taken after the final
norm, and the first call with it installs hooks that run before an edit registered later.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saefty.errors import MismatchError
from saefty.records import Site

Edit = Callable[[Float[Tensor, "*tokens d_model"]], Float[Tensor, "*tokens d_model"]]

OWN_FILE = "This family needs a file of its own in saefty/models."
VISION_NAMES = ("vision", "visual")
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "cross_attn")
MLP_NAMES = ("mlp", "feed_forward", "moe", "block_sparse_moe")
NORM_NAMES = (  # of the norm that the MLP reads
    "ln_2", "final_layer_norm", "pre_feedforward_layernorm", "feedforward_layernorm", "mlp_norm",
    "ffn_norm",
)  # fmt: skip
PARALLEL_FAMILIES = ("gptj", "phi", "cohere", "codegen", "gpt_neox", "falcon")


_is_aside: ContextVar[bool] = ContextVar("_is_aside", default=False)


class Captured(Exception):  # noqa: N818 - a signal that everything asked for is there, no error
    """Raised inside a forward pass to stop it after the deepest site."""


@dataclass(frozen=True)
class Layout:
    """The children of a block at which its parts are read. A name that is None does not exist."""

    attn_out: str
    """Its output is what attention adds to the residual (the post-norm, where there is one)."""
    mlp_out: str
    """Its output is what the MLP adds to the residual (the post-norm, where there is one)."""
    mlp_in: str
    """The first module after the attention add: its input is the residual there."""
    norm: bool
    """`mlp_in` is a norm, whose output the MLP reads; otherwise the MLP itself."""
    parallel: bool
    """Attention and MLP read the same residual: there is no place between them."""


@contextmanager
def aside() -> Iterator[None]:
    """Let parts of a model be computed beside the pass that runs: nobody who reads it sees them."""
    token = _is_aside.set(True)
    try:
        yield
    finally:
        _is_aside.reset(token)


def is_aside() -> bool:
    """Return whether what is computed now is no part of the pass that runs."""
    return _is_aside.get()


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """Return the list of decoder blocks: the ModuleList that is `n_layers` long.

    Lists inside another list (the experts of a block) are not looked at, and of two the one that is
    not part of a vision tower is taken.

    Raises:
        MismatchError: If no list, or more than one outside a vision tower, has that length.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found = {
        name: module
        for name, module in lists.items()
        if len(module) == n_layers and not any(name.startswith(f"{outer}.") for outer in lists)
    }
    text = {
        name: module
        for name, module in found.items()
        if not any(word in name for word in VISION_NAMES)
    } or found
    if len(text) != 1:
        raise MismatchError(
            f"{type(model).__name__} should have one list of {n_layers} blocks, but "
            f"{len(text)} were found: {', '.join(text) or 'none'}.",
            then=OWN_FILE,
        )
    return next(iter(text.values()))


def find_layout(block: nn.Module, config: Any) -> Layout:
    """Return where a block's parts are read, from the names of its children.

    Raises:
        MismatchError: If attention or MLP is not among the children under a known name.
    """
    children = dict(block.named_children())
    attn = next((name for name in ATTENTION_NAMES if name in children), None)
    mlp: str | None = next((name for name in MLP_NAMES if name in children), None)
    if mlp is None and {"fc1", "fc2", "final_layer_norm"} <= children.keys():
        mlp = "fc2"  # OPT: two layers in the block itself, and the norm that the first one reads
    if attn is None or mlp is None:
        raise MismatchError(
            f"{type(block).__name__} has the children {', '.join(children)}, among which attention "
            "and MLP are not recognised.",
            then="Use hook point resid_pre or resid_post, which every family has.",
        )
    sandwich = "post_feedforward_layernorm" in children  # Gemma 2 and 3, OLMo 2
    before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
    norm = next((name for name in (before, *NORM_NAMES) if name in children), None)
    return Layout(
        attn_out="post_attention_layernorm" if sandwich else attn,
        mlp_out="post_feedforward_layernorm" if sandwich else mlp,
        mlp_in=norm or mlp,
        norm=norm is not None,
        parallel=config.model_type in PARALLEL_FAMILIES
        and getattr(config, "use_parallel_residual", True),
    )


def place_of(site: Site, block: nn.Module, config: Any) -> tuple[nn.Module, Literal["in", "out"]]:
    """Return the module at whose input or output a site's activations can be read.

    Raises:
        MismatchError: If the family has no such place.
    """
    if site.part == "resid_pre":
        return block, "in"
    if site.part == "resid_post":
        return block, "out"
    layout = find_layout(block, config)
    if site.part == "attn_out":
        return block.get_submodule(layout.attn_out), "out"
    if site.part == "mlp_out":
        return block.get_submodule(layout.mlp_out), "out"
    if layout.parallel:
        raise MismatchError(
            f"{site.part} does not exist in {config.model_type} models: their attention and MLP "
            "run in parallel, so there is no residual between them.",
            then="Set extract.hook_point to attn_out or resid_post.",
        )
    module = block.get_submodule(layout.mlp_in)
    return module, "out" if site.part == "post_attn_ln" and layout.norm else "in"


@contextmanager
def reading(
    places: Sequence[tuple[Site, nn.Module, Literal["in", "out"]]],
    see: Callable[[Site, Tensor], None],
) -> Iterator[None]:
    """Hand each site's activations to a function, as the module has them, whenever it is called.

    The hooks run behind those of edits that were registered before, so that they read what the rest
    of the model reads.
    """
    with ExitStack() as hooks:
        for site, module, end in places:

            def read_output(_: nn.Module, __: Any, output: Any, site: Site = site) -> None:
                if not is_aside():
                    see(site, first_tensor(output))

            def read_input(_: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                if not is_aside():
                    see(site, hidden_input(args, kwargs))

            if end == "out":
                hooks.enter_context(_removing(module.register_forward_hook(read_output)))
            else:
                hooks.enter_context(
                    _removing(module.register_forward_pre_hook(read_input, with_kwargs=True))
                )
        yield


@contextmanager
def capturing(
    places: Sequence[tuple[Site, nn.Module, Literal["in", "out"]]],
    shape: tuple[int, int, int],
    rows: Bool[Tensor, "batch seq"] | None,
    into: dict[Site, Tensor],
) -> Iterator[None]:
    """Write each site's activations into a dict, and stop the forward pass once all are there.

    `shape` is [batch, seq, d_model], what each site must hold. Without `rows`, a tensor is kept as
    the module has it ([batch * seq, d_model] in OPT's MLP).

    Raises:
        MismatchError: If a site holds something else, or the forward pass does not come there.
    """

    def keep(site: Site, x: Tensor) -> None:
        into[site] = kept_rows(site, x, shape, rows)
        if len(into) == len(places):
            raise Captured

    with reading(places, keep), suppress(Captured):
        yield
    missed = [str(site) for site, _, _ in places if site not in into]
    if missed:
        raise MismatchError(
            f"a forward pass never comes to {', '.join(missed)}: the list that was found is not "
            "where this model computes.",
            then=OWN_FILE,
        )


def kept_rows(
    site: Site,
    x: Float[Tensor, "*tokens d_model"],
    shape: tuple[int, int, int],
    rows: Bool[Tensor, "batch seq"] | None,
) -> Float[Tensor, "*kept d_model"]:
    """Return the activations of the wanted tokens; of all, as the module has them, without `rows`.

    Raises:
        MismatchError: If they are not those of [batch, seq, d_model].
    """
    batch, seq, d_model = shape
    if x.shape not in {shape, (batch * seq, d_model)}:
        raise MismatchError(
            f"{site} holds a tensor of {list(x.shape)}, where [batch, seq, d_model] is "
            f"{list(shape)}: the list that was found is not this model's residual stream.",
            then=OWN_FILE,
        )
    x = x.detach()
    if rows is None:
        return x
    kept = rows.to(x.device)
    return x[kept] if x.ndim > 2 else x[kept.flatten()]


def editing(site: Site, block: nn.Module, config: Any, edit: Edit) -> AbstractContextManager[None]:
    """Return a context in which `edit` replaces the activations at a site.

    The residual after attention is no module's output and is read twice, by the norm and by the
    block's last add: the change is made at the norm's input and added to the block's output.
    """
    if site.part == "post_attn_resid":
        return _editing_between(block, place_of(site, block, config)[0], edit)
    module, end = place_of(site, block, config)
    return _editing_output(module, edit) if end == "out" else _editing_input(module, edit)


@contextmanager
def _editing_output(module: nn.Module, edit: Edit) -> Iterator[None]:
    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        return with_first(output, _applied(edit, first_tensor(output)))

    with _removing(module.register_forward_hook(replace)):
        yield


@contextmanager
def _editing_input(module: nn.Module, edit: Edit) -> Iterator[None]:
    def replace(_: nn.Module, args: Any, kwargs: Any) -> Any:
        edited = _applied(edit, hidden_input(args, kwargs))
        return _called_with(edited, args, kwargs)

    with _removing(module.register_forward_pre_hook(replace, with_kwargs=True)):
        yield


@contextmanager
def _editing_between(block: nn.Module, reader: nn.Module, edit: Edit) -> Iterator[None]:
    change: list[Tensor] = []

    def replace(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = hidden_input(args, kwargs)
        edited = _applied(edit, x)
        change[:] = [edited - x]
        return _called_with(edited, args, kwargs)

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        x = first_tensor(output)
        return with_first(output, x + change.pop().reshape(x.shape))

    with (
        _removing(reader.register_forward_pre_hook(replace, with_kwargs=True)),
        _removing(block.register_forward_hook(add, prepend=True)),  # before edits of the output
    ):
        yield


def first_tensor(output: Any) -> Tensor:
    """Return the activations in a module's output, a tensor or a tuple that begins with one."""
    return output if isinstance(output, Tensor) else output[0]


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the activations that a module was called with.

    Raises:
        MismatchError: If they are neither its first argument nor named `hidden_states`.
    """
    if args:
        return args[0]
    if "hidden_states" not in kwargs:
        raise MismatchError(
            f"a block is called with {', '.join(kwargs) or 'nothing'}, among which its input is "
            "not recognised.",
            then=OWN_FILE,
        )
    return kwargs["hidden_states"]


def _called_with(
    x: Float[Tensor, "*tokens d_model"], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def count_nonfinite(
    x: Float[Tensor, "*shape d_model"], mask: Bool[Tensor, "*shape"] | None = None
) -> int:
    """Return how many rows hold a NaN or an infinity; rows where `mask` is False do not count."""
    bad = ~torch.isfinite(x).all(dim=-1)
    return int((bad if mask is None else bad & mask.to(bad.device)).sum())


def _applied(edit: Edit, x: Tensor) -> Tensor:
    """Return the edit of a copy of `x` (at a block's input it is also the last block's output)."""
    edited = edit(x.clone())
    if edited.shape != x.shape:
        raise ValueError(
            f"an intervention must keep the shape {tuple(x.shape)}, but returned "
            f"{tuple(edited.shape)}"
        )
    return edited.to(device=x.device, dtype=x.dtype)


def with_first(output: Any, tensor: Tensor) -> Any:
    """Return a module's output with other activations in it."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
