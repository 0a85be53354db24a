"""What else a steered model does: other latents, other attributes, and text that is not steered to.

Latents are those of the replies, read again by the model without the vector, so that they say what
was written. On harmless text that is given, the steered model's next-token distribution is compared
with its own without the vector: KL(plain ‖ steered) and the perplexity of both.

Prompts of one cluster count as one wherever something is tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import ttest_1samp
from torch import Tensor

from saefty.baselines import names_to_codes
from saefty.errors import InputError, NumericError
from saefty.interventions.base import Intervention, Positions
from saefty.metrics.base import group_codes
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.significance import benjamini_hochberg, holm
from saefty.models.base import ModelAdapter
from saefty.models.batching import plan_batches
from saefty.records import Example, Site
from saefty.sae_ts.rollouts import mean_latents
from saefty.saes.base import SparseAutoencoder

TOKEN_BUDGET = 4096
"""Most tokens of harmless text in one forward pass."""
LOGITS_AT_ONCE = 1 << 27
"""Bounds that further where the vocabulary is large."""
LEVEL = 0.05
SIGNS = 100
"""At least so many draws of signs a test, so that the least p after Holm is 0.01."""


@dataclass(frozen=True)
class LatentShift:
    """How one latent's mean in the replies changed.

    Attributes:
        latent: Its number.
        before: Mean in the replies without steering.
        after: Mean in the steered replies.
        share: Of all that was written differently: |change| ‖W_dec,k‖ over the sum of these.
        q: False-discovery rate over all latents that fire, of means over clusters of prompts.
        target: Whether the vector was made to move it.
    """

    latent: int
    before: float
    after: float
    share: float
    q: float
    target: bool


@dataclass(frozen=True)
class LatentMap:
    """Which latents moved.

    Attributes:
        shifts: The latents that moved most, and all targets, the largest share first.
        moved: How many moved at a false-discovery rate of 5 %.
        fired: How many fired in any reply.
        on_target: Share of what was written differently that is the targets', in the direction in
            which they were to move.
        against_target: The targets' share in the other direction.
        clusters: The independent units that the tests rest on.
    """

    shifts: tuple[LatentShift, ...]
    moved: int
    fired: int
    on_target: float
    against_target: float
    clusters: int


@dataclass(frozen=True)
class HarmlessCost:
    """What a vector costs on harmless text.

    Attributes:
        kl: KL(plain ‖ steered) in nats a token; mean over texts.
        perplexity: Of the texts under the steered model.
        plain: The same without the vector.
        texts: How many texts.
        as_reply: Whether they were taken for replies, for what acts on replies alone.
    """

    kl: Interval
    perplexity: float
    plain: float
    texts: int
    as_reply: bool


def reply_latents(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    site: Site,
    prompts: Sequence[Example],
    replies: Sequence[str],
) -> Float[np.ndarray, "prompts d_sae"]:
    """Return each reply's mean latents, read without any vector; NaN for an empty reply."""
    owners = np.arange(len(replies))
    return mean_latents(model, sae, site, prompts, replies, owners, len(replies)).means


def latent_map(
    before: Float[np.ndarray, "prompts d_sae"],
    after: Float[np.ndarray, "prompts d_sae"],
    lengths: Float[np.ndarray, "d_sae"],
    targets: Mapping[int, float],
    clusters: Int[np.ndarray, "prompts"] | None = None,
    *,
    shown: int = 20,
) -> LatentMap:
    """Return which latents differ between two sets of replies to the same prompts.

    Args:
        before: Mean latents of the replies without steering.
        after: Those of the steered replies.
        lengths: ‖W_dec,k‖, so that latents are weighed by what they write.
        targets: The latents that were to move, up where the weight is above 0 and else down.
        clusters: A code a prompt, equal for prompts that belong together.
        shown: How many to list, beside the targets.
    """
    both = ~(np.isnan(before[:, 0]) | np.isnan(after[:, 0]))
    first, second = before[both], after[both]
    change = second - first
    fired = np.flatnonzero((first != 0).any(axis=0) | (second != 0).any(axis=0))
    q = np.ones(before.shape[1])
    codes = group_codes(None if clusters is None else clusters[both], len(change))
    units = len(np.unique(codes))
    if len(fired) and units > 1:
        with np.errstate(invalid="ignore", divide="ignore"):
            p = ttest_1samp(_cluster_means(change[:, fired], codes), 0.0).pvalue
        # Where every cluster has the same change there is no spread, and no test.
        q[fired] = benjamini_hochberg(np.nan_to_num(p, nan=1.0))
    mean = change.mean(axis=0) if both.any() else np.zeros(before.shape[1])
    strength = np.abs(mean) * lengths
    total = strength.sum()
    share = strength / total if total > 0 else strength
    listed = set(np.argsort(-share, kind="stable")[:shown].tolist()) | set(targets)
    shifts = [
        LatentShift(
            int(k),
            float(first[:, k].mean()) if both.any() else float("nan"),
            float(second[:, k].mean()) if both.any() else float("nan"),
            float(share[k]),
            float(q[k]),
            k in targets,
        )
        for k in listed
    ]
    wanted = {k for k, weight in targets.items() if weight * mean[k] > 0}
    return LatentMap(
        tuple(sorted(shifts, key=lambda one: (-one.share, one.latent))),
        int((q <= LEVEL).sum()),
        len(fired),
        float(share[sorted(wanted)].sum()),
        float(share[sorted(set(targets) - wanted)].sum()),
        units,
    )


def _cluster_means(
    values: Float[np.ndarray, "prompts latents"], codes: Int[np.ndarray, "prompts"]
) -> Float[np.ndarray, "clusters latents"]:
    groups, place = np.unique(codes, return_inverse=True)
    sums = np.zeros((len(groups), values.shape[1]))
    np.add.at(sums, place, values)
    return sums / np.bincount(place)[:, None]


@dataclass(frozen=True)
class AttributeShift:
    """How an attribute of the replies changed.

    Attributes:
        name: Of the attribute.
        before: Its mean without steering.
        change: Steered less unsteered, paired by prompt.
        p_holm: Two-sided, corrected for all attributes and ways that are compared.
    """

    name: str
    before: float
    change: Interval
    p_holm: float


def attribute_shifts(
    before: Mapping[str, Float[np.ndarray, "prompts"]],
    after: Mapping[str, Mapping[str, Float[np.ndarray, "prompts"]]],
    clusters: Int[np.ndarray, "prompts"] | None,
    *,
    boots: int,
    permutations: int,
    seed: int,
) -> dict[str, list[AttributeShift]]:
    """Return for each way to steer how every attribute changed.

    Args:
        before: Each attribute's scores without steering.
        after: For each way each attribute's scores.
        clusters: A code a prompt, equal for prompts that belong together.
        boots: Draws of the bootstrap.
        permutations: How often signs are drawn anew, cluster by cluster, at least.
        seed: Fixes both.
    """
    # Holm multiplies the least p by the number of tests: with few signs none could hold.
    permutations = max(permutations, SIGNS * sum(map(len, after.values())))
    found: list[tuple[str, str, Interval, float]] = []
    for way, scores in after.items():
        for name, values in scores.items():
            change = values - before[name]
            draws = Bootstrap(len(change), clusters, boots=boots, seed=seed)
            p = _sign_p(change, draws.codes, permutations=permutations, seed=seed)
            found.append((way, name, draws.mean(change, bounds=(-1.0, 1.0)), p))
    adjusted = holm(np.array([p for *_, p in found]))
    result: dict[str, list[AttributeShift]] = {way: [] for way in after}
    for (way, name, interval, _), p in zip(found, adjusted, strict=True):
        there = before[name][~np.isnan(before[name])]
        mean = float(there.mean()) if len(there) else float("nan")
        result[way].append(AttributeShift(name, mean, interval, float(p)))
    return result


def _sign_p(
    change: Float[np.ndarray, "prompts"],
    codes: Int[np.ndarray, "prompts"],
    *,
    permutations: int,
    seed: int,
) -> float:
    """Return the two-sided p of a mean change against signs drawn cluster by cluster."""
    kept = ~np.isnan(change)
    sums = np.bincount(codes[kept], change[kept], minlength=int(codes.max()) + 1)
    signs = np.random.default_rng([seed, 9]).choice([-1.0, 1.0], size=(permutations, len(sums)))
    as_large = int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-10).sum())
    return (1 + as_large) / (1 + permutations)


def harmless_cost(
    model: ModelAdapter,
    site: Site,
    edit: Intervention | None,
    texts: Sequence[Example],
    *,
    name: str = "the intervention",
    as_reply: bool = False,
    boots: int,
    seed: int,
) -> HarmlessCost:
    """Return what an intervention costs on text that has nothing to do with it.

    Args:
        model: The model.
        site: Where the intervention acts.
        edit: The intervention; None for the model as it is, which costs nothing.
        texts: Harmless text.
        name: What the intervention is called in messages, with its alpha.
        as_reply: Take every token of a text for one that the model wrote in reply, for an
            intervention that acts on these alone.
        boots: Draws of the bootstrap over texts, by whole groups.
        seed: Fixes them.

    Raises:
        InputError: If no text has two tokens.
        NumericError: If logits are NaN or infinite on a token.
    """
    items = [item for item in model.tokenize(texts, truncate="right") if item.status == "ok"]
    items = [item for item in items if len(item.ids) > 1]
    if not items:
        raise InputError(
            f"none of the {len(texts)} harmless texts has two tokens.", then="Give longer texts."
        )
    if edit is not None and as_reply:
        edit = _in_reply(edit)
    divergence = np.zeros(len(items))
    loss: Float[np.ndarray, "2"] = np.zeros(2)
    tokens = 0
    budget = min(TOKEN_BUDGET, max(LOGITS_AT_ONCE // model.info.vocab_size, 1))
    for batch in plan_batches([len(item.ids) for item in items], budget):
        read = model.collate([items[n] for n in batch])
        plain = model.logits(read)
        steered = plain
        if edit is not None:
            with model.intervene(site, edit):
                steered = model.logits(read)
        for place, n in enumerate(batch):
            real = read.mask[place].cpu()
            own = (real & ~read.special[place].cpu())[real]
            following = read.ids[place].cpu()[real][1:, None].long()
            p, q = (_log_p(one[place], real, items[n].example.id, who)
                    for one, who in ((plain, "the model as it is"), (steered, name)))  # fmt: skip
            gap = (p.exp() * (p - q)).sum(dim=-1)[own]
            divergence[n] = float(gap.mean()) if own.any() else np.nan
            loss -= [float(one[:-1].gather(1, following).sum()) for one in (p, q)]
            tokens += len(following)
    groups = names_to_codes([item.example.group for item in items])
    draws = Bootstrap(len(items), groups, boots=boots, seed=seed)
    plain_loss, steered_loss = (loss / tokens).tolist()
    return HarmlessCost(
        _mean_divergence(divergence, draws, changed=edit is not None),
        float(np.exp(steered_loss)),
        float(np.exp(plain_loss)),
        len(items),
        as_reply,
    )


def _in_reply(edit: Intervention) -> Intervention:
    """Return the intervention for text whose tokens all count as written in reply."""

    def intervention(
        x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        mask = positions.mask
        return edit(x, replace(positions, response=mask, generated=mask))

    return intervention


def _log_p(
    logits: Float[Tensor, "seq vocab"], real: Bool[Tensor, "seq"], text: str, name: str
) -> Float[Tensor, "real vocab"]:
    found = logits.cpu()[real].double().log_softmax(dim=-1)
    if torch.isnan(found).any():
        raise NumericError(
            f"under {name} the logits on harmless text {text} are NaN or infinite.",
            safe="The replies and their scores are kept.",
            then="Compare smaller alphas, or set model.dtype=bfloat16 or float32 if the model "
            "overflows in float16.",
        )
    return found


def _mean_divergence(
    divergence: Float[np.ndarray, "texts"], draws: Bootstrap, *, changed: bool
) -> Interval:
    """Return the mean over texts; a divergence has no largest value to bound it by."""
    if not changed:
        return Interval(0.0, 0.0, 0.0, "nothing is changed", draws.clusters, draws.level)
    kept = ~np.isnan(divergence)
    values = np.maximum(np.where(kept, divergence, 0.0), 0.0)

    def mean(weights: Float[np.ndarray, "draws texts"]) -> Float[np.ndarray, "draws"]:
        counts = weights @ kept
        return np.divide(
            weights @ values, counts, out=np.full(len(weights), np.nan), where=counts > 0
        )

    return draws.measured(mean)
