"""Vectors to steer with: of decoder rows, of contrasts, of chance.

    decoder            Σ w_k W_dec,k: what the chosen latents write
    caa                mean activation of one set of texts less that of another (Rimsky et al. 2024)
    latent_difference  the same difference taken of the latents, and decoded
    random             a direction drawn at random, as a measure for the others

Vectors that are fitted to measured effects (SAE-TS) are in `saefty.sae_ts.vectors`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty import fsio
from saefty.encoding import check_saes
from saefty.errors import ConfigError, InputError, MismatchError, NumericError
from saefty.interventions.vectors import SteeringVector
from saefty.latent_targets import listed, sae_facts, target_weights
from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.models.batching import plan_batches
from saefty.records import ROLES, Example, Site, example_record
from saefty.sae_sets import SaeRecord, open_saes, warn_of_other_model
from saefty.saes.base import SparseAutoencoder

log = logging.getLogger(__name__)

Pooling = Literal["last", "response", "mean"]
"""Which tokens of a text count: its `last`; those of its `response`; their `mean` over all."""
POOLING: Pooling = "mean"
"""What is taken of texts of any kind; `last` is for answers that end in what differs (the A or B of
multiple choice), and reads a full stop where texts end in one."""
UNEQUAL = 4
"""How many times as many texts one side of a contrast may have before it is told."""
ENCODED_ROWS = 4096
DENSE_ROWS = 256
"""Bounds the dense latents of a long text."""
TOKEN_BUDGET = 8192


def open_sae(source: str, sae_id: str | None = None, layer: int | None = None) -> SparseAutoencoder:
    """Return the one SAE that a source holds, with the place where it reads.

    Args:
        source: A training run, one SAE's folder, a repository of the hub or a release.
        sae_id: Which SAE of a repository or release.
        layer: Which of several, by the block it reads.

    Raises:
        ConfigError: If there are several.
        SaeftyError: As `open_saes`.
    """
    found = open_saes([source], [sae_id] if sae_id else (), None if layer is None else [layer])
    if len(found) > 1:
        names = ", ".join(str(key) for key in found)
        raise ConfigError(
            f"{source} holds {len(found)} SAEs: {names}.",
            then="Name one: its folder, or its layer.",
        )
    return found[next(iter(found))]


def check_sae(sae: SparseAutoencoder, model: ModelAdapter) -> Site:
    """Check that an SAE and a model belong together; return the place where the SAE reads.

    Raises:
        ConfigError: If the model has no such layer.
        MismatchError: If the SAE reads activations of another width, is a transcoder, or scales
            each row by itself; or does not know its place.
    """
    sae.require_autoencoder("steering")
    if sae.site is None:
        raise MismatchError(
            "the SAE does not say which block it reads.", then="Set sae.site, or name the layer."
        )
    check_saes({sae.site.layer: sae}, model.d_model, model.name)
    model.info.check_sites([sae.site])
    warn_of_other_model({sae.site.layer: SaeRecord.of(sae, sae.site)}, model.name)
    return sae.site


def decoder_vector(
    sae: SparseAutoencoder, weights: Mapping[int, float], facts: Mapping[str, Any] | None = None
) -> SteeringVector:
    """Return the weighted sum of the decoder rows of latents, in units of the activations.

    Args:
        sae: Whose rows; its `site` says where.
        weights: Latents and their weights.
        facts: Further provenance.

    Raises:
        ConfigError: If a latent is out of range, or a weight is not usable.
        MismatchError: If it is a transcoder, or scales each row by itself.
        NumericError: If the rows add up to nothing.
    """
    sae.require_autoencoder("steering")
    row = torch.from_numpy(target_weights(weights, sae.d_sae))
    values = row @ sae.W_dec.detach().double().cpu()
    provenance = {"latents": listed(weights), **sae_facts(sae), **(facts or {})}
    return SteeringVector(values, _site(sae), "decoder", provenance=provenance)


def random_vector(
    d_model: int, site: Site, *, norm: float = 1.0, seed: int = 0, draw: int = 0
) -> SteeringVector:
    """Return a direction drawn at random, of a given length.

    Args:
        d_model: Its width.
        site: Where it is to be added.
        norm: Its length; that of the vector it is to be compared with.
        seed: The same seed and draw give the same direction; other seeds share none.
        draw: Which of the directions of a seed.
    """
    drawn = torch.from_numpy(np.random.default_rng([seed, 10, draw]).normal(size=d_model))
    facts = {"seed": seed, "draw": draw}
    return SteeringVector(drawn / drawn.norm() * norm, site, "random", provenance=facts)


def caa_vector(
    model: ModelAdapter,
    site: Site,
    positive: Sequence[Example],
    negative: Sequence[Example],
    *,
    pooling: Pooling = POOLING,
) -> SteeringVector:
    """Return the mean activation of positive texts less that of negative ones.

    Args:
        model: The model.
        site: Where to read.
        positive: Texts that show the behaviour.
        negative: Texts that do not; best the same but for that.
        pooling: Which tokens of each text count; each text counts the same.

    Raises:
        InputError: If one side has no texts, or none that can be read.
        NumericError: If the two sides have the same mean.
    """
    sides = contrast(positive, negative)
    means = [_mean_activation(model, site, texts, pooling) for texts in sides]
    provenance = {
        "model": model.name,
        **_sides_record(positive, negative),
        "pooling": pooling,
    }
    return SteeringVector(means[0] - means[1], site, "caa", provenance=provenance)


def latent_difference(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    positive: Sequence[Example],
    negative: Sequence[Example],
    *,
    top: int | None = None,
    pooling: Pooling = POOLING,
) -> SteeringVector:
    """Return Σ_k (mean z_k of positive - mean z_k of negative) W_dec,k, the bias left out.

    Args:
        model: The model.
        sae: Whose latents; its `site` says where to read.
        positive: Texts that show the behaviour.
        negative: Texts that do not.
        top: Only the latents that differ most, by what they write (|Δz_k| ‖W_dec,k‖); None: all.
        pooling: Which tokens of each text count; each text counts the same.

    Raises:
        ConfigError: If `top` is not above 0.
        InputError: If one side has no texts, or none that can be read.
        MismatchError: If SAE and model do not belong together.
    """
    if top is not None and top < 1:
        raise ConfigError(f"{top} latents were asked for.", then="Ask for at least one.")
    site = check_sae(sae, model)
    difference = mean_difference(model, sae, contrast(positive, negative), pooling)
    decoder = sae.W_dec.detach().double().cpu()
    strength = difference.abs() * decoder.norm(dim=1)
    kept = strength.argsort(descending=True)[: top or sae.d_sae]
    kept = kept[strength[kept] > 0]
    provenance = {
        "model": model.name,
        **_sides_record(positive, negative),
        "pooling": pooling,
        "latents": [[int(k), float(difference[k])] for k in kept[:64]],
        "latents_used": len(kept),
        **sae_facts(sae),
    }
    values = difference[kept] @ decoder[kept]
    return SteeringVector(values, site, "latent_difference", provenance=provenance)


def mean_difference(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    sides: tuple[Sequence[Example], Sequence[Example]],
    pooling: Pooling,
) -> Float[Tensor, "d_sae"]:
    """Return each latent's mean on positive texts less that on negative ones; float64."""
    site = check_sae(sae, model)

    def mean(texts: Sequence[Example]) -> Float[Tensor, "d_sae"]:
        total = torch.zeros(sae.d_sae, dtype=torch.float64)
        number = 0
        for x, owners, count in _read(model, site, texts, pooling):
            each = torch.bincount(owners, minlength=count).double()
            for part, whose in zip(x.split(ENCODED_ROWS), owners.split(ENCODED_ROWS), strict=True):
                code = sae.encode_sparse(part.to(sae.W_enc.device))
                weight = (1 / each[whose])[code.row_of.cpu()]
                total.index_add_(0, code.indices.cpu().long(), code.values.cpu().double() * weight)
            number += count
        return total / number

    return mean(sides[0]) - mean(sides[1])


def contrast(
    positive: Sequence[Example], negative: Sequence[Example]
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return both sides of a contrast.

    Raises:
        InputError: If one of them is empty.
    """
    if not positive or not negative:
        missing = "negative" if positive else "positive"
        raise InputError(
            f"a contrast has two sides, but there are {len(positive)} positive and "
            f"{len(negative)} negative texts.",
            then=f"Give {missing} texts: --{missing} FILE, best the same as the others but for "
            "what is to be steered.",
        )
    return positive, negative


def _sides_record(positive: Sequence[Example], negative: Sequence[Example]) -> dict[str, Any]:
    """Return how many texts each side has, and a checksum of all they hold; tell unequal sides."""
    counts = len(positive), len(negative)
    if max(counts) >= UNEQUAL * min(counts):
        log.warning(
            "the sides of the contrast are very unequal, %d positive and %d negative texts: the "
            "vector holds what is peculiar to the %d; give about as many of each",
            *counts, min(counts),
        )  # fmt: skip
    found: dict[str, Any] = {}
    for name, side in (("positive", positive), ("negative", negative)):
        lines = (fsio.dump_json_line(example_record(one)).encode("utf-8") for one in side)
        found |= {name: len(side), f"{name}_xxh3_128": fsio.digest_blocks(lines)}
    return found


def latent_maximum(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    weights: Mapping[int, float],
    texts: Sequence[Example],
) -> float:
    """Return the largest length of what the chosen latents, each times its weight, add to a token.

    Raises:
        InputError: If no text can be read.
        NumericError: If none of the latents fires on them.
    """
    site = check_sae(sae, model)
    chosen = torch.tensor(sorted(weights))
    row = torch.from_numpy(target_weights(weights, sae.d_sae))
    longest = 0.0
    for x, _, _ in _read(model, site, texts, "mean"):
        for part in x.split(DENSE_ROWS):
            z = sae.encode(part.to(sae.W_enc.device)).detach()
            added = sae.contribution(z * row.to(z), chosen.to(z.device)).detach()
            longest = max(longest, float(added.norm(dim=1).max()))
    if longest == 0:
        raise NumericError(
            f"none of the latents {', '.join(map(str, sorted(weights)))} fires on these "
            f"{len(texts)} texts, so they have no largest value.",
            then="Give texts on which they fire, or count alpha in another unit.",
        )
    return longest


def _site(sae: SparseAutoencoder) -> Site:
    if sae.site is None:
        raise MismatchError(
            "the SAE does not say which block it reads.", then="Set sae.site, or name the layer."
        )
    return sae.site


def _mean_activation(
    model: ModelAdapter, site: Site, texts: Sequence[Example], pooling: Pooling
) -> Float[Tensor, "d_model"]:
    """Return the mean over texts of each text's mean over the tokens that count."""
    total, number = torch.zeros(model.d_model, dtype=torch.float64), 0
    for x, owners, count in _read(model, site, texts, pooling):
        sums = torch.zeros(count, model.d_model, dtype=torch.float64)
        sums.index_add_(0, owners, x.cpu().double())
        total += (sums / torch.bincount(owners, minlength=count)[:, None]).sum(dim=0)
        number += count
    return total / number


def _read(
    model: ModelAdapter, site: Site, texts: Sequence[Example], pooling: Pooling
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the rows of the tokens that count, whose they are, and how many texts there are."""
    items = model.tokenize(texts)
    usable = [item for item in items if item.status == "ok" and tokens_of(item, pooling).any()]
    if not usable:
        raise InputError(
            f"none of the {len(texts)} texts has a token to look at ({pooling}).",
            then="Give texts with a response, or set pooling to last."
            if pooling == "response"
            else "Give texts that hold words and fit into the model's context.",
        )
    if len(usable) < len(items):
        log.warning("%d of %d texts are left out: empty or too long", len(items) - len(usable),
                    len(items))  # fmt: skip
    for batch in plan_batches([len(item.ids) for item in usable], TOKEN_BUDGET):
        members = [usable[n] for n in batch]
        read = model.collate(members)
        rows = torch.zeros_like(read.mask)
        for place, item in enumerate(members):
            chosen = tokens_of(item, pooling)
            rows[place, : len(chosen)] = torch.from_numpy(chosen).to(rows.device)
        x = model.capture(read, [site], rows=rows)[site]
        owners = torch.arange(len(members)).repeat_interleave(rows.sum(dim=1).cpu())
        yield x, owners, len(members)


def tokens_of(item: TokenizedExample, pooling: Pooling) -> Bool[np.ndarray, "tokens"]:
    """Return which tokens of a text count; special tokens never do."""
    plain = ~item.special
    if pooling == "mean":
        return plain
    if pooling == "response":
        return plain & (item.roles == ROLES.index("response"))
    last = np.zeros_like(plain)
    last[np.flatnonzero(plain)[-1:]] = True
    return last
