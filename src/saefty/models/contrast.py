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

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jaxtyping import Bool
from pydantic import field_validator
from torch import Tensor

from saefty.config import Config
from saefty.errors import ConfigError, MismatchError
from saefty.models.attention_off import cross_layers, make_switch
from saefty.models.base import ModelAdapter, TokenBatch
from saefty.models.hooks import find_layout
from saefty.models.recomputation import TwiceComputed
from saefty.models.transformer import TransformerModel
from saefty.records import Site

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
    name: str = "extract",
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
        name: The section of the settings that messages name.

    Returns:
        For each site [batch, seq, d_model], or [rows, d_model] if `rows` is given, in float32, on
        the device of its block.

    Raises:
        ConfigError: If a layer is out of range, a site occurs twice, or δ is zero there whatever
            the model computes.
        MismatchError: If the family has no such part, or nothing that the method could turn off.
    """
    decoder = require_contrast(model, sites, section, name)
    switch = make_switch(decoder.blocks, batch, layers_of(sites), section.method, name)
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
    model: ModelAdapter, sites: Sequence[Site], section: ContrastSection, name: str = "extract"
) -> TransformerModel:
    """Return the model if δ can be measured at the sites.

    Args:
        model: The model.
        sites: Where to look; each once.
        section: What is off, and where.
        name: The section of the settings that messages name, such as `encode`.

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
            then=f"Set {name}.contrast.method=none.",
        )
    for site in sites:
        model._place(site)
        if section.scope == "per_layer" and _before_attention(model, site):
            raise ConfigError(
                f"δ at {site} is zero whatever the model computes: with scope per_layer only the "
                f"attention of layer {site.layer} is off, and {site.part} does not depend on it.",
                then=f"Set {name}.hook_point to resid_post or post_attn_resid (attn_out where "
                f"attention and MLP run in parallel), or {name}.contrast.scope=joint.",
            )
    _require_method(model, layers_of(sites), section, name)
    return model


def _require_method(
    model: TransformerModel, layers: Sequence[int], section: ContrastSection, name: str
) -> None:
    cross = cross_layers(model.blocks)
    if section.method == "cross_attention":
        if not cross:
            raise MismatchError(
                f"{model.name} ({model.info.architecture}) has no cross-attention layers to turn "
                "off: what it reads of an image stands in the sequence.",
                then=f"Set {name}.contrast.method=knockout for the image's share, or "
                "zero_attention for all that attention adds.",
            )
        without = [layer for layer in layers if layer not in cross]
        if without and (section.scope == "per_layer" or len(without) == len(layers)):
            raise MismatchError(
                f"{named_layers(without)} of {model.name} "
                f"{'has' if len(without) == 1 else 'have'} no cross-attention: it is in "
                f"{named_layers(cross)}.",
                then=f"Set {name}.layers to some of {cross}; with {name}.contrast.scope=joint "
                "other layers may be read beside them.",
            )
        return
    if section.method == "knockout" and cross:
        raise MismatchError(
            f"{model.name} ({model.info.architecture}) keeps the image beside the sequence, so no "
            "token of the image could be hidden from the text.",
            then=f"Set {name}.contrast.method=cross_attention.",
        )
    for layer in range(layers[-1] + 1) if section.method == "knockout" else layers:
        if layer in cross:
            continue
        try:
            model._place(Site(layer, "attn_out"))
        except MismatchError as error:
            raise MismatchError(
                f"{section.method} needs the attention of each layer by itself. {error.message}",
                then=f"Set {name}.contrast.method=none, or use a family of docs/families.md.",
            ) from None


def _before_attention(model: TransformerModel, site: Site) -> bool:
    """Return whether what is read at a site does not depend on the attention of its own block."""
    if site.part == "mlp_out":
        return find_layout(model.blocks[site.layer], model.config).parallel
    return site.part == "resid_pre"


def layers_of(sites: Iterable[Site]) -> list[int]:
    """Return the layers of some sites, in order."""
    return sorted({site.layer for site in sites})


def named_layers(layers: Sequence[int]) -> str:
    """Return some layers in words."""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
