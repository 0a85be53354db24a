"""Where an SAE that was trained on a contrast acts in the forward pass, and whether it fits there.

Such an SAE reads δ = h_on - h_off of an example, mostly a mean over its tokens. In the forward pass
it is applied to the δ_t of each text token while the model computes it: h'_t = h_t - c Σ z_k(δ_t)
W_k. Where OFF means that a layer's attention (or cross-attention) adds nothing, the residual behind
it would be what went into the layer, so that δ_t is known at once:

    contrast (per_layer)                trained at         δ_t is
    zero_attention, cross_attention     post_attn_resid    post_attn_resid less resid_pre
    zero_attention, cross_attention     attn_out           attn_out

The first is what attention adds, whatever norm or gate lies behind it; taking something out of it
is taking it out of the residual. Elsewhere h_off is known only from a second computation of the
layer, or of the model. The SAE saw means; single tokens may lie far from those, and how far is
measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty import fsio
from saefty.fidelity import measure_fidelity
from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.models.batching import plan_batches
from saefty.records import ROLES, Site
from saefty.saes.base import SparseAutoencoder

METRICS = "metrics.json"
KNOWN_AT_ONCE = {"post_attn_resid": "resid_pre", "attn_out": None}
"""Where δ is known of a layer whose attention adds nothing -> what is taken from what is there."""
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
    """

    site: Site
    less: Site | None = None


def forward_place(site: Site, contrast: Mapping[str, str] | None) -> ForwardPlace | str:
    """Return where an SAE acts in the forward pass, or why it cannot.

    Args:
        site: Where it was trained.
        contrast: Method and scope of the contrast it was trained on; None for plain activations.
    """
    if contrast is None:
        return ForwardPlace(site)
    method, scope = contrast.get("method"), contrast.get("scope")
    if method not in ("zero_attention", "cross_attention"):
        return (
            f"the SAE was trained on δ of the contrast {method}, whose OFF state is known only "
            "from computing the layer a second time, not while the model replies"
        )
    if scope != "per_layer":
        return (
            f"the SAE was trained on δ of the scope {scope}, in which the layers before this one "
            "are off too: its OFF state is known only from a second forward pass"
        )
    if site.part not in KNOWN_AT_ONCE:
        return (
            f"the SAE was trained on δ at {site.part}, which is more than what attention adds: its "
            "OFF state is known only from computing the layer a second time"
        )
    less = KNOWN_AT_ONCE[site.part]
    return ForwardPlace(site, None if less is None else Site(site.layer, less))


def images_of(items: Sequence[TokenizedExample]) -> Bool[np.ndarray, "prompts longest"]:
    """Return which tokens of each prompt stand for an image."""
    longest = max((len(item.ids) for item in items), default=0)
    found = np.zeros((len(items), longest), dtype=bool)
    for row, item in enumerate(items):
        found[row, : len(item.ids)] = item.roles == ROLES.index("image")
    return found


def measure_token_fit(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    place: ForwardPlace,
    items: Sequence[TokenizedExample],
) -> TokenFit:
    """Measure an SAE of a contrast on the δ of every text token that it will act on.

    Args:
        model: The model.
        sae: The SAE.
        place: Where it acts, from `forward_place`.
        items: The prompts; those that are not `ok` are left out.

    Raises:
        InputError: If no prompt has a text token.
        MismatchError: If the model has no such place.
        NumericError: If a δ is NaN or infinite.
    """
    usable = [item for item in items if item.status == "ok"]
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
    for members in plan_batches([len(item.ids) for item in items]):
        batch = model.collate([items[i] for i in members])
        text = batch.mask & ~batch.special & ~batch.image
        found = model.capture(batch, sites, rows=text)
        delta = found[place.site].float()
        yield delta if place.less is None else delta - found[place.less].float()
