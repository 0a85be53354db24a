"""Whether a contrast measures what it says: a check on the first examples, before any is kept."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty.errors import MismatchError
from saefty.models.attention_off import Switch, make_switch
from saefty.models.base import ModelAdapter, TokenBatch
from saefty.models.contrast import (
    ContrastSection,
    capture_contrast,
    layers_of,
    named_layers,
    require_contrast,
)
from saefty.models.no_effect import cause_of_no_effect
from saefty.models.transformer import TransformerModel
from saefty.records import Site

log = logging.getLogger(__name__)

NO_EFFECT = 1e-6  # of ‖h‖: a smaller ‖δ‖ is none at all
MUCH_ROUNDING = 0.1  # of ‖δ‖
WRONG_SHARE = 1e-3  # of ‖δ‖ at a token: by so much δ may differ from that of two passes, and
ROUNDINGS = 4  # by so many times the rounding of both
LEFT_OVER = 0.1  # of what another image moves: so much of it may be left with all layers off
FINEST = 1e-5  # of a norm: what float32 rounds to over many layers


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
    model: ModelAdapter,
    batch: TokenBatch,
    sites: Sequence[Site],
    section: ContrastSection,
    name: str = "extract",
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
        name: The section of the settings that messages name.

    Raises:
        ConfigError: As `capture_contrast`.
        MismatchError: If a check fails; it names the layer and the likely cause.
    """
    decoder = require_contrast(model, sites, section, name)
    delta = capture_contrast(model, batch, sites, batch.mask, section, name)
    deepest = max(site.layer for site in sites)
    switch = make_switch(decoder.blocks, batch, range(deepest + 1), section.method, name)
    with switch.watching():
        on = decoder.capture(batch, sites, batch.mask)
        _refuse_no_effect(decoder, batch, on, delta, section, name)
        if section.scope == "per_layer":
            _compare_with_two_passes(decoder, batch, on, delta, switch, name)
        seen = seen_when_off = None
        other = _with_another_image(batch)
        text = batch.mask & ~batch.image & (batch.image.cumsum(dim=1) > 0)
        if section.method != "zero_attention" and other is not None and text.any():
            seen = _largest_change(decoder, (batch, other), sites, text)
            with switch.off(switch.modules):
                seen_when_off = _largest_change(decoder, (batch, other), sites, text)
            _refuse_other_ways(decoder, deepest, seen, seen_when_off, name)
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
    name: str,
) -> None:
    none = [site for site in delta if delta[site].norm() <= NO_EFFECT * on[site].float().norm()]
    if not none:
        return
    site, layers = none[0], layers_of(none)
    cause, then = cause_of_no_effect(model, batch, site, layers_of(delta), section.method, name)
    raise MismatchError(
        f"the intervention had no effect at {named_layers(layers)}: at {site}, ‖δ‖ is "
        f"{float(delta[site].norm()):.2g} and ‖h‖ {float(on[site].float().norm()):.2g}. {cause}",
        then=then,
    )


def _compare_with_two_passes(
    model: TransformerModel,
    batch: TokenBatch,
    on: Mapping[Site, Tensor],
    delta: Mapping[Site, Tensor],
    switch: Switch,
    name: str,
) -> None:
    deepest = max(site.layer for site in delta)
    sites = [site for site in delta if site.layer == deepest]
    with switch.off([deepest]):
        off = model.capture(batch, sites, batch.mask)
    for site in sites:
        worst = worst_gap(on[site], on[site].float() - off[site].float(), delta[site])
        if worst is not None:
            raise MismatchError(
                f"δ at {site} cannot be measured by computing the layer again: from that of a "
                f"whole pass with it off it differs by {worst[0]:.2g} at a token where "
                f"‖δ‖ is {worst[1]:.2g}, in {model.name} ({model.info.architecture}).",
                then=f"Set {name}.contrast.scope=joint with this layer alone.",
            )


def worst_gap(
    on: Float[Tensor, "rows d_model"],
    one: Float[Tensor, "rows d_model"],
    other: Float[Tensor, "rows d_model"],
) -> tuple[float, float] | None:
    """Return by how much two measurements of a δ differ where they do most, and ‖δ‖ there.

    None where that is within what rounding explains. Token by token: the first one's norm may be
    a hundred times the others', and hide them.

    Args:
        on: The activations, in the model's dtype.
        one: Their δ.
        other: Their δ, measured in another way.
    """
    gap, size = (one - other).norm(dim=-1), other.norm(dim=-1)
    rounding = ROUNDINGS * rounding_of(on).norm(dim=-1)
    none_at_all = NO_EFFECT * on.float().norm(dim=-1)
    over = gap - WRONG_SHARE * size - torch.maximum(rounding, none_at_all)
    if not (over > 0).any():
        return None
    worst = int(over.argmax())
    return float(gap[worst]), float(size[worst])


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
    model: TransformerModel, deepest: int, seen: float, seen_when_off: float, name: str
) -> None:
    rounding = max(torch.finfo(model.dtype).eps, FINEST)
    # What is seen is little in the first layers, so that a share of it must be left out there.
    if seen_when_off > min(_allowed(model), max(rounding, LEFT_OVER * seen)):
        raise MismatchError(
            f"with all layers up to {deepest} off, another image still moves the text behind it by "
            f"{seen_when_off:.2g} of its norm ({seen:.2g} with them on): {model.name} "
            f"({model.info.architecture}) takes the image to the text in another way too.",
            then=f"Use a family of docs/families.md, or {name}.contrast.method=zero_attention.",
        )
    if seen <= rounding:
        log.warning(
            "another image moves the text of %s by %.2g of its norm only, with nothing off: what "
            "δ holds does not depend on the image (is its projector trained?)", model.name, seen,
        )  # fmt: skip


def _allowed(model: TransformerModel) -> float:
    return min(100 * torch.finfo(model.dtype).eps, 0.02)
