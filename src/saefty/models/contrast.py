"""δ: what a model computes with something of its attention on, less the same with it off.

δ = fp32(h_on) − fp32(h_off), with three ways to be off:

- `zero_attention`: the attention of a layer returns zeros. That removes all mixing of tokens there,
  the text's as well as the image's.
- `knockout`: no token outside the image attends to a token of the image, and what is left is
  normalised anew. That removes the image's share alone.
- `cross_attention`: layers that read the image from beside the sequence (Mllama) return zeros.

With scope `per_layer` each layer's δ has that layer alone off. All before it is the same in both
passes, so one forward pass is enough, in which a layer that is read is computed once more, as far
as the last site in it. With `joint` there are two passes: off are all layers that are read, and for
`knockout` all layers up to the deepest of them.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import field_validator
from torch import Tensor

from saefty.config import Config
from saefty.errors import ConfigError, MismatchError
from saefty.models.attention_off import Switch, cross_layers, make_switch
from saefty.models.base import ModelAdapter, TokenBatch
from saefty.models.hooks import find_layout
from saefty.models.no_effect import cause_of_no_effect
from saefty.models.recomputation import TwiceComputed
from saefty.models.transformer import TransformerModel
from saefty.records import Site

log = logging.getLogger(__name__)

NO_EFFECT = 1e-6  # of ‖h‖: a smaller ‖δ‖ is none at all
MUCH_ROUNDING = 0.1  # of ‖δ‖
WRONG_SHARE = 1e-3  # of ‖δ‖ at a token: by so much δ may differ from that of two passes, and
ROUNDINGS = 4  # by so many times the rounding of both
LEFT_OVER = 0.1  # of what another image moves: so much of it may be left with all layers off
FINEST = 1e-5  # of a norm: what float32 rounds to over many layers
ALIASES = {"cross_attn_off": "cross_attention"}


class ContrastSection(Config):
    """Whether activations are read, or their difference δ from a pass with attention off."""

    method: Literal["none", "zero_attention", "knockout", "cross_attention"] = "none"
    """What is off. `zero_attention`: all of a layer's attention, so that δ holds what every token
    takes from every other, not the image's share; `knockout`: attention of other tokens to the
    image's, the image's share; `cross_attention` (also `cross_attn_off`): layers that read the
    image from beside the sequence, as Llama 3.2 Vision's; `none`: nothing, activations are read."""

    scope: Literal["per_layer", "joint"] = "per_layer"
    """`per_layer`: each layer's δ has that layer off alone, its direct effect. `joint`: all layers
    that are read are off at once, and for `knockout` those before them too: the total effect."""

    @field_validator("method", mode="before")
    @classmethod
    def _by_its_own_name(cls, given: Any) -> Any:
        return ALIASES.get(given, given) if isinstance(given, str) else given


def capture_contrast(
    model: ModelAdapter,
    batch: TokenBatch,
    sites: Sequence[Site],
    rows: Bool[Tensor, "batch seq"] | None,
    section: ContrastSection,
) -> dict[Site, Tensor]:
    """Return δ at some sites.

    It equals what two forward passes give, one with attention on and one with it off, under the
    interventions that hold: these edit both.

    Args:
        model: The model.
        batch: What to read.
        sites: Where to look; each once.
        rows: Keep only these tokens, in row-major order; None keeps all, padding included.
        section: What is off, and where.

    Returns:
        For each site [batch, seq, d_model], or [rows, d_model] if `rows` is given, in float32, on
        the device of its block.

    Raises:
        ConfigError: If a layer is out of range, a site occurs twice, or δ is zero there whatever
            the model computes.
        MismatchError: If the family has no such part, or nothing that the method could turn off.
    """
    decoder = require_contrast(model, sites, section)
    switch = make_switch(decoder.blocks, batch, layers_of(sites), section.method)
    with switch.watching():
        if section.scope == "per_layer":
            delta = TwiceComputed(decoder, batch, sites, rows, switch).read()
        else:
            on = decoder.capture(batch, sites, rows)
            with switch.off(switch.modules):
                off = decoder.capture(batch, sites, rows)
            delta = {site: on[site].float() - off[site].float() for site in sites}
    if rows is not None:
        return {site: delta[site] for site in sites}
    return {site: delta[site].reshape(*batch.ids.shape, -1) for site in sites}


def require_contrast(
    model: ModelAdapter, sites: Sequence[Site], section: ContrastSection
) -> TransformerModel:
    """Return the model if δ can be measured at the sites.

    Raises:
        ConfigError: If a layer is out of range, a site occurs twice, or δ is zero there whatever
            the model computes.
        MismatchError: If the family has no such part, or nothing that the method could turn off.
        ValueError: If the method is `none`, or there is no site.
    """
    if section.method == "none":
        raise ValueError("there is no δ with contrast method none")
    model.info.check_sites(sites)
    if not sites:
        raise ValueError("δ is measured at one site or more, but none is given")
    if not isinstance(model, TransformerModel):
        raise MismatchError(
            f"{model.name} is read by {type(model).__name__}, which knows of no attention that "
            "could be turned off.",
            then="Set extract.contrast.method=none.",
        )
    for site in sites:
        model._place(site)
        if section.scope == "per_layer" and _before_attention(model, site):
            raise ConfigError(
                f"δ at {site} is zero whatever the model computes: with scope per_layer only the "
                f"attention of layer {site.layer} is off, and {site.part} does not depend on it.",
                then="Set extract.hook_point to resid_post or post_attn_resid (attn_out where "
                "attention and MLP run in parallel), or extract.contrast.scope=joint.",
            )
    _require_method(model, layers_of(sites), section)
    return model


def _require_method(
    model: TransformerModel, layers: Sequence[int], section: ContrastSection
) -> None:
    cross = cross_layers(model.blocks)
    if section.method == "cross_attention":
        if not cross:
            raise MismatchError(
                f"{model.name} ({model.info.architecture}) has no cross-attention layers to turn "
                "off: what it reads of an image stands in the sequence.",
                then="Set extract.contrast.method=knockout for the image's share, or "
                "zero_attention for all that attention adds.",
            )
        without = [layer for layer in layers if layer not in cross]
        if without and (section.scope == "per_layer" or len(without) == len(layers)):
            raise MismatchError(
                f"{_named(without)} of {model.name} {'has' if len(without) == 1 else 'have'} no "
                f"cross-attention: it is in {_named(cross)}.",
                then=f"Set extract.layers to some of {cross}; with extract.contrast.scope=joint "
                "other layers may be read beside them.",
            )
        return
    if section.method == "knockout" and cross:
        raise MismatchError(
            f"{model.name} ({model.info.architecture}) keeps the image beside the sequence, so no "
            "token of the image could be hidden from the text.",
            then="Set extract.contrast.method=cross_attention.",
        )
    for layer in range(layers[-1] + 1) if section.method == "knockout" else layers:
        if layer in cross:
            continue
        try:
            model._place(Site(layer, "attn_out"))
        except MismatchError as error:
            raise MismatchError(
                f"{section.method} needs the attention of each layer by itself. {error.message}",
                then="Set extract.contrast.method=none, or use a family of docs/families.md.",
            ) from None


def _before_attention(model: TransformerModel, site: Site) -> bool:
    """Return whether what is read at a site does not depend on the attention of its own block."""
    if site.part == "mlp_out":
        return find_layout(model.blocks[site.layer], model.config).parallel
    return site.part == "resid_pre"


def layers_of(sites: Iterable[Site]) -> list[int]:
    """Return the layers of some sites, in order."""
    return sorted({site.layer for site in sites})


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


@dataclass(frozen=True)
class ContrastCheck:
    """What the self-check of a contrast measured."""

    rounding: Mapping[Site, float]
    """How much of ‖δ‖ the number format's rounding of both activations comes to, in the text."""
    image_seen: float | None
    """By how much another image moves a token of the text behind it at one of the sites, of its
    norm, at most; None where that cannot be tried."""
    image_seen_when_off: float | None
    """The same with every layer up to the deepest site off."""


def check_contrast(
    model: ModelAdapter, batch: TokenBatch, sites: Sequence[Site], section: ContrastSection
) -> ContrastCheck:
    """Check on a first batch that a contrast measures what it says.

    δ must not be zero at any site. With `per_layer`, that of the deepest layer must be what two
    forward passes give. For `knockout` and `cross_attention`, another image of equal size must
    leave the text behind it as it was once all layers up to the deepest are off. Three to seven
    forward passes.

    Args:
        model: The model.
        batch: What it is about to read; two examples are enough.
        sites: Where δ is to be measured.
        section: What is off, and where.

    Raises:
        ConfigError: As `capture_contrast`.
        MismatchError: If a check fails; it names the layer and the likely cause.
    """
    decoder = require_contrast(model, sites, section)
    delta = capture_contrast(model, batch, sites, batch.mask, section)
    deepest = max(site.layer for site in sites)
    switch = make_switch(decoder.blocks, batch, range(deepest + 1), section.method)
    with switch.watching():
        on = decoder.capture(batch, sites, batch.mask)
        _refuse_no_effect(decoder, batch, on, delta, section)
        if section.scope == "per_layer":
            _compare_with_two_passes(decoder, batch, on, delta, switch)
        seen = seen_when_off = None
        other = _with_another_image(batch)
        text = batch.mask & ~batch.image & (batch.image.cumsum(dim=1) > 0)
        if section.method != "zero_attention" and other is not None and text.any():
            seen = _largest_change(decoder, (batch, other), sites, text)
            with switch.off(switch.modules):
                seen_when_off = _largest_change(decoder, (batch, other), sites, text)
            _refuse_other_ways(decoder, deepest, seen, seen_when_off)
    told = ~batch.special[batch.mask]
    rounding = {site: _rounding_in_text(on[site], delta[site], told) for site in sites}
    for site, share in rounding.items():
        if share > MUCH_ROUNDING:
            log.warning(
                "rounding to %s comes to %.0f %% of δ at %s; set model.dtype=float32 to measure it "
                "more finely", str(decoder.dtype).removeprefix("torch."), 100 * share, site,
            )  # fmt: skip
    return ContrastCheck(rounding, seen, seen_when_off)


def rounding_share(h: Float[Tensor, "rows d_model"], delta: Float[Tensor, "rows d_model"]) -> float:
    """Return how large the rounding of two activations like `h` is beside their difference."""
    return float(rounding_of(h).norm() / delta.norm())


def rounding_of(h: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    """Return by how much the rounding of two activations like `h` moves their difference.

    The error of a rounded number is spread evenly over one step of its format, so it is step/√12 in
    the root mean square.
    """
    _, exponent = torch.frexp(h.float())
    step = torch.ldexp(
        torch.full_like(h, torch.finfo(h.dtype).eps, dtype=torch.float32), exponent - 1
    )
    return (2 / 12) ** 0.5 * step


def _rounding_in_text(
    h: Float[Tensor, "rows d_model"],
    delta: Float[Tensor, "rows d_model"],
    text: Bool[Tensor, "rows"],
) -> float:
    """Return `rounding_share` of the text tokens that have a δ; of all, if none has.

    A BOS is mostly not kept, and may be so large that it rounds in far larger steps than the text.
    """
    moved = text.to(delta.device) & delta.any(dim=-1)
    return rounding_share(h[moved], delta[moved]) if moved.any() else rounding_share(h, delta)


def _refuse_no_effect(
    model: TransformerModel,
    batch: TokenBatch,
    on: Mapping[Site, Tensor],
    delta: Mapping[Site, Tensor],
    section: ContrastSection,
) -> None:
    none = [site for site in delta if delta[site].norm() <= NO_EFFECT * on[site].float().norm()]
    if not none:
        return
    site, layers = none[0], layers_of(none)
    cause, then = cause_of_no_effect(model, batch, site, layers_of(delta), section.method)
    raise MismatchError(
        f"the intervention had no effect at {_named(layers)}: at {site}, ‖δ‖ is "
        f"{float(delta[site].norm()):.2g} and ‖h‖ {float(on[site].float().norm()):.2g}. {cause}",
        then=then,
    )


def _compare_with_two_passes(
    model: TransformerModel,
    batch: TokenBatch,
    on: Mapping[Site, Tensor],
    delta: Mapping[Site, Tensor],
    switch: Switch,
) -> None:
    deepest = max(site.layer for site in delta)
    sites = [site for site in delta if site.layer == deepest]
    with switch.off([deepest]):
        off = model.capture(batch, sites, batch.mask)
    for site in sites:
        gap = (on[site].float() - off[site].float() - delta[site]).norm(dim=-1)
        size = delta[site].norm(dim=-1)
        # Token by token: the first one's norm may be a hundred times the others', and hide them.
        rounding = ROUNDINGS * rounding_of(on[site]).norm(dim=-1)
        none_at_all = NO_EFFECT * on[site].float().norm(dim=-1)
        allowed = WRONG_SHARE * size + torch.maximum(rounding, none_at_all)
        if (gap > allowed).any():
            worst = int((gap - allowed).argmax())
            raise MismatchError(
                f"δ at {site} cannot be measured by computing the layer again: from that of a "
                f"whole pass with it off it differs by {float(gap[worst]):.2g} at a token where "
                f"‖δ‖ is {float(size[worst]):.2g}, in {model.name} ({model.info.architecture}).",
                then="Set extract.contrast.scope=joint with this layer alone.",
            )


def _with_another_image(batch: TokenBatch) -> TokenBatch | None:
    """Return the batch with noise for pixels; None if it holds none.

    Zeros stay: images of zeros alone fill up an example with fewer, and models leave them out.
    """
    stream, others = torch.Generator().manual_seed(0), {}
    for name, x in batch.inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            noise = torch.randn(x.shape, generator=stream).to(x)
            others[name] = torch.where(x != 0, noise, x)
    return replace(batch, inputs={**batch.inputs, **others}) if others else None


def _largest_change(
    model: TransformerModel,
    batches: tuple[TokenBatch, TokenBatch],
    sites: Sequence[Site],
    rows: Bool[Tensor, "batch seq"],
) -> float:
    one, other = (model.capture(batch, sites, rows) for batch in batches)
    moved = [(one[s].float() - other[s].float()).norm(dim=-1) for s in sites]
    return max(
        float((gap / one[s].float().norm(dim=-1)).nan_to_num().max())
        for gap, s in zip(moved, sites, strict=True)
    )


def _refuse_other_ways(
    model: TransformerModel, deepest: int, seen: float, seen_when_off: float
) -> None:
    rounding = max(torch.finfo(model.dtype).eps, FINEST)
    # What is seen is little in the first layers, so that a share of it must be left out there.
    if seen_when_off > min(_allowed(model), max(rounding, LEFT_OVER * seen)):
        raise MismatchError(
            f"with all layers up to {deepest} off, another image still moves the text behind it by "
            f"{seen_when_off:.2g} of its norm ({seen:.2g} with them on): {model.name} "
            f"({model.info.architecture}) takes the image to the text in another way too.",
            then="Use a family of docs/families.md, or extract.contrast.method=zero_attention.",
        )
    if seen <= rounding:
        log.warning(
            "another image moves the text of %s by %.2g of its norm only, with nothing off: what "
            "δ holds does not depend on the image (is its projector trained?)", model.name, seen,
        )  # fmt: skip


def _allowed(model: TransformerModel) -> float:
    return min(100 * torch.finfo(model.dtype).eps, 0.02)
