"""Where an SAE that was trained on a contrast acts in the forward pass, and whether it fits there.

Such an SAE reads δ = h_on - h_off of an example, mostly a mean over its tokens. In the forward pass
it is applied to the δ_t of each text token while the model computes it: h'_t = h_t - c Σ z_k(δ_t)
W_k. Where OFF means that a layer's attention (or cross-attention) adds nothing, the residual behind
it would be what went into the layer, so that δ_t is known at once:

    contrast (per_layer)                trained at         δ_t is
    zero_attention, cross_attention     post_attn_resid    post_attn_resid less resid_pre
    zero_attention, cross_attention     attn_out           attn_out

The first is what attention adds, whatever norm or gate lies behind it; taking something out of it
is taking it out of the residual. Elsewhere h_off is computed beside the pass: `per_layer` the layer
once more, `joint` a second pass as far as the layer (`saefty.models.live_contrast`). The SAE saw
means; single tokens may lie far from those, and how far is measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefty import fsio
from saefty.config import build_config
from saefty.fidelity import measure_fidelity
from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.models.batching import plan_batches
from saefty.models.contrast import ContrastSection
from saefty.models.live_contrast import LiveContrast
from saefty.records import Site
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import UNKNOWN

METRICS = "metrics.json"
CHECKED = 2  # prompts that are read both ways
KNOWN_AT_ONCE = {"post_attn_resid": "resid_pre", "attn_out": None}
"""Where δ is known of a layer whose attention adds nothing -> what is taken from what is there."""
IN_WORDS = {
    "knockout": "with the image hidden from the text",
    "zero_attention": "with attention zero",
    "cross_attention": "with cross-attention zero",
}
TIMES, FURTHER = 2.0, 0.2
"""The FVU of single tokens is far from that of training above either of these."""


@dataclass(frozen=True)
class TokenFit:
    """How well an SAE of a contrast fits the δ of single tokens.

    Attributes:
        fvu: Fraction of variance unexplained of the tokens' δ; None where they do not vary.
        l0: Mean number of latents that fire on one.
        tokens: How many were read.
        training_fvu: What it was when the SAE was trained; None where that is not known.
    """

    fvu: float | None
    l0: float
    tokens: int
    training_fvu: float | None

    @property
    def far(self) -> bool:
        """Whether single tokens are explained much worse than what the SAE was trained on."""
        if self.fvu is None or self.training_fvu is None:
            return False
        return self.fvu > min(TIMES * self.training_fvu, self.training_fvu + FURTHER)

    def record(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "fvu": self.fvu,
            "l0_mean": self.l0,
            "tokens": self.tokens,
            "training_fvu": self.training_fvu,
            "far": self.far,
        }


@dataclass(frozen=True)
class ForwardPlace:
    """Where an SAE acts in the forward pass.

    Attributes:
        site: Where what its latents contribute is taken out.
        less: It reads what lies at `site` less what lies here; None: what lies at `site`.
        contrast: It reads this δ, whose OFF state is computed beside the pass; None where that is
            not needed.
    """

    site: Site
    less: Site | None = None
    contrast: LiveContrast | None = None

    @property
    def reads(self) -> str:
        """What δ is here, in words that go behind `the δ of each text token`."""
        if self.contrast is None:
            return "which is what attention adds"
        method, layer = self.contrast.section.method, self.site.layer
        if self.contrast.section.scope == "per_layer":
            return f"for which layer {layer} is computed a second time, {IN_WORDS[method]}"
        where = f"all layers up to {layer}"
        if method != "knockout":
            where = f"the layers {', '.join(map(str, self.contrast.layers))}"
        return f"for which the model is run a second time, {IN_WORDS[method]} in {where}"


def forward_place(
    site: Site, contrast: Mapping[str, str] | None, layers: Sequence[int]
) -> ForwardPlace | str:
    """Return where an SAE acts in the forward pass, or why it cannot.

    Args:
        site: Where it was trained.
        contrast: Method and scope of the contrast it was trained on; None for plain activations.
        layers: The layers that were read together.
    """
    if contrast is None:
        return ForwardPlace(site)
    if UNKNOWN in contrast.values():
        return (
            f"the SAE was trained on δ of the contrast {contrast['method']} and the scope "
            f"{contrast['scope']}: without both it is not known what was off"
        )
    section = build_config(ContrastSection, {key: contrast[key] for key in ("method", "scope")})
    if section.scope == "per_layer":
        if site.part == "resid_pre":
            return f"δ at {site} is zero: nothing there depends on the attention of its layer"
        if section.method != "knockout" and site.part in KNOWN_AT_ONCE:
            less = KNOWN_AT_ONCE[site.part]
            return ForwardPlace(site, None if less is None else Site(site.layer, less))
    return ForwardPlace(site, contrast=LiveContrast(site, section, tuple(layers)))


def measure_token_fit(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    place: ForwardPlace,
    items: Sequence[TokenizedExample],
) -> TokenFit:
    """Measure an SAE of a contrast on the δ of every text token that it will act on.

    Where the OFF state is computed beside the pass, the first prompts are also read both ways: as
    an extraction reads them, and as they are edited.

    Args:
        model: The model.
        sae: The SAE.
        place: Where it acts, from `forward_place`.
        items: The prompts; those that are not `ok` are left out.

    Raises:
        InputError: If no prompt has a text token.
        MismatchError: If the model has no such place, or its δ cannot be known while it runs.
        NumericError: If a δ is NaN or infinite.
    """
    usable = [item for item in items if item.status == "ok"]
    if place.contrast is not None and usable:
        place.contrast.check(model, model.collate(usable[:CHECKED]))
    found = measure_fidelity(sae, _text_rows(model, place, usable))
    return TokenFit(found.fvu, found.l0_mean, found.n_rows, training_fvu(sae))


def training_fvu(sae: SparseAutoencoder) -> float | None:
    """Return the FVU on held-out rows that training wrote beside the SAE, if it did."""
    if sae.folder is None or not (sae.folder / METRICS).is_file():
        return None
    value = fsio.read_json(sae.folder / METRICS).get("fvu")
    return float(value) if isinstance(value, int | float) else None


@torch.no_grad()
def _text_rows(
    model: ModelAdapter, place: ForwardPlace, items: Sequence[TokenizedExample]
) -> Iterator[Float[Tensor, "_ d_model"]]:
    sites = [place.site] if place.less is None else [place.less, place.site]
    lengths, patches = [len(item.ids) for item in items], [item.patches for item in items]
    for members in plan_batches(lengths, patches=patches):
        batch = model.collate([items[i] for i in members])
        text = batch.mask & ~batch.special & ~batch.image
        if place.contrast is not None:
            yield place.contrast.read(model, batch, text)
            continue
        found = model.capture(batch, sites, rows=text)
        delta = found[place.site].float()
        yield delta if place.less is None else delta - found[place.less].float()
