"""What gating latents does to what the model writes: the causal test of a claim about latents.

Chosen latents are silenced in the real forward pass while the model replies, first one, then two,
four, …; beside them, as many *control* latents that are equally active and do not track harm. If
behaviour on harmful prompts changes with the first and not with the second, the chosen latents
carry it. What either does to harmless prompts, and to fluency, is measured in the same replies.
What is taken out is c times what the latents contribute; silencing is c = 1.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty import fsio
from saefty.interventions.gate import subtract
from saefty.judges.base import Judge
from saefty.judges.coverage import Coverage, coverage
from saefty.log import progress
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.models.base import Intervention, ModelAdapter, Positions
from saefty.models.live_contrast import LiveContrast
from saefty.records import Example, Site
from saefty.saes.base import SparseAutoencoder

log = logging.getLogger(__name__)

Arm = Literal["target", "control"]
ARMS: tuple[Arm, ...] = ("target", "control")
NEUTRAL_AUROC = 0.1
"""A control latent's AUROC is at most this far from one half."""

PAIRED = (-1.0, 1.0)


@dataclass(frozen=True)
class Condition:
    """Which latents were silenced."""

    arm: Arm
    latents: tuple[int, ...]

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.arm}_{len(self.latents):03d}" if self.latents else "ungated"


@dataclass(frozen=True)
class Behaviour:
    """What one condition did, on the prompts of one label.

    Attributes:
        rate: Share of replies that show the behaviour.
        change: The same less the ungated replies' to the same prompts; None for the ungated.
        fluency: Mean fluency.
        judged: Replies that could be judged.
        prompts: Replies in all.
        coverage: How many replies have no score of behaviour, and what they could change.
        fluency_coverage: The same of fluency.
    """

    rate: Interval
    change: Interval | None
    fluency: Interval
    judged: int
    prompts: int
    coverage: Coverage
    fluency_coverage: Coverage


@dataclass(frozen=True)
class GatePoint:
    """One condition: how many latents were silenced, which, and what happened."""

    condition: Condition
    harmful: Behaviour
    harmless: Behaviour

    @property
    def count(self) -> int:
        """How many latents were silenced."""
        return len(self.condition.latents)


@dataclass(frozen=True)
class Silencer:
    """How latents are taken out of a forward pass.

    Attributes:
        sae: Whose latents.
        site: Where it is done: what the SAE reads must lie there.
        strength: How many times what they contribute is taken out.
        less: The SAE reads what lies at `site` less what lies here; None: what lies at `site`.
        contrast: The SAE reads this δ at `site`, which is computed beside each pass; None: what
            lies there.
    """

    sae: SparseAutoencoder
    site: Site
    strength: float = 1.0
    less: Site | None = None
    contrast: LiveContrast | None = None

    @classmethod
    def of(cls, sae: SparseAutoencoder, strength: float = 1.0) -> "Silencer":
        """Return the one that acts where the SAE was trained.

        Raises:
            MismatchError: If it is a transcoder, or scales each row by itself.
            ValueError: If the SAE does not know its site.
        """
        sae.require_autoencoder("gating")
        if sae.site is None:
            raise ValueError("the SAE does not know its site; set sae.site to where it was trained")
        return cls(sae, sae.site, strength)

    @contextmanager
    def acting(self, model: ModelAdapter, latents: Sequence[int]) -> Iterator[None]:
        """Silence some latents in every forward pass within the context."""
        edit = subtract(self.sae, latents, self.strength)
        with ExitStack() as held:
            if self.contrast is not None:
                if latents:  # otherwise the model is left as it is
                    held.enter_context(self.contrast.edited(model, edit))
                yield
                return
            if self.less is not None:
                edit, remember = _of_difference(edit)
                held.enter_context(model.intervene(self.less, remember))
            held.enter_context(model.intervene(self.site, edit))
            yield


def _of_difference(edit: Intervention) -> tuple[Intervention, Intervention]:
    """Return an edit of a place less one before it, and what notes the one before.

    What it changes of the difference, it changes of the later place.
    """
    noted: list[Tensor] = []

    def remember(
        x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        noted[:] = [x.float()]
        return x

    def changed(
        x: Float[Tensor, "batch seq d_model"], positions: Positions
    ) -> Float[Tensor, "batch seq d_model"]:
        difference = x.float() - noted.pop()
        return x.float() + (edit(difference, positions) - difference)

    return changed, remember


def match_controls(
    targets: Sequence[int],
    activity: Float[np.ndarray, "d_sae"],
    auroc: Float[np.ndarray, "d_sae"],
) -> list[int]:
    """Return for each target a latent that is as active and does not track harm.

    Targets are matched in order, each with the free latent whose activity is nearest by ratio,
    among those whose AUROC is within 0.1 of one half. There may be fewer than targets.

    Args:
        targets: The latents whose effect is claimed.
        activity: Mean contribution of each latent, in units of the activations.
        auroc: How each latent tells harmful examples from the rest, on the selection half.
    """
    free = (activity > 0) & (np.abs(auroc - 0.5) <= NEUTRAL_AUROC)
    free[list(targets)] = False
    controls: list[int] = []
    for target in targets:
        if not free.any():
            break
        distance = np.abs(np.log(np.maximum(activity, 1e-30) / max(activity[target], 1e-30)))
        nearest = int(np.argmin(np.where(free, distance, np.inf)))
        controls.append(nearest)
        free[nearest] = False
    return controls


def conditions(
    targets: Sequence[int], controls: Sequence[int], counts: Sequence[int]
) -> list[Condition]:
    """Return the conditions to run: ungated, then each arm at each count it has latents for.

    Where there are fewer targets than asked for, all there are make the last count.
    """
    found = [Condition("target", ())]
    for count in sorted({min(count, len(targets)) for count in counts}):
        for arm, latents in zip(ARMS, (targets, controls), strict=True):
            if 0 < count <= len(latents):
                found.append(Condition(arm, tuple(latents[:count])))
    return found


def reply_under(
    model: ModelAdapter,
    silencer: Silencer,
    prompts: Sequence[Example],
    wanted: Sequence[Condition],
    folder: Path,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
) -> dict[Condition, list[str]]:
    """Return the model's replies under each condition; those on disk are not generated again.

    Args:
        model: The model.
        silencer: Takes latents out of the forward pass.
        prompts: What to reply to, with their images where they have any.
        wanted: The conditions.
        folder: Where replies are kept, one file a condition.
        max_new_tokens: Longest reply.
        seed: Of sampling; replies are greedy.
        batch_size: Most prompts in one forward pass.
    """
    replies: dict[Condition, list[str]] = {}
    with progress("generating", len(wanted) * len(prompts), "replies") as bar:
        for condition in wanted:
            path = folder / f"{condition.name}.jsonl"
            if path.exists():
                replies[condition] = [record["reply"] for record in fsio.read_lines(path)]
            if len(replies.get(condition, ())) != len(prompts):
                with silencer.acting(model, condition.latents):
                    replies[condition] = model.generate(
                        prompts, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size
                    )
                lines = [
                    {"example_id": prompt.id, "label": prompt.label, "reply": reply}
                    for prompt, reply in zip(prompts, replies[condition], strict=True)
                ]
                fsio.commit_text(path, "".join(map(fsio.dump_json_line, lines)))
            bar.advance(len(prompts))
    return replies


def measure_gating(
    prompts: Sequence[Example],
    harmful: Bool[np.ndarray, "prompts"],
    clusters: Int[np.ndarray, "prompts"] | None,
    replies: Mapping[Condition, Sequence[str]],
    behaviour: Judge,
    fluency: Callable[[Sequence[str]], Judge],
    *,
    seed: int,
    boots: int,
) -> list[GatePoint]:
    """Judge the replies of every condition, and compare each with the ungated ones.

    Args:
        prompts: What was replied to.
        harmful: Their labels.
        clusters: A code a prompt, equal for prompts that belong together.
        replies: The replies by condition; the first condition is the ungated one.
        behaviour: Scores 1 where a reply shows the behaviour.
        fluency: Makes the judge of fluency, given the ungated replies.
        seed: Fixes the bootstrap.
        boots: Draws of each bootstrap.
    """
    ungated = next(iter(replies))
    fluent = fluency(replies[ungated])
    base = behaviour.score(prompts, replies[ungated])
    points = []
    for condition, texts in replies.items():
        shown, form = behaviour.score(prompts, texts), fluent.score(prompts, texts)
        groups = [
            _behaviour(
                shown, base if condition.latents else None, form, mask, clusters, seed, boots
            )
            for mask in (harmful, ~harmful)
        ]
        points.append(GatePoint(condition, groups[0], groups[1]))
    return points


def _behaviour(
    shown: Float[np.ndarray, "prompts"],
    base: Float[np.ndarray, "prompts"] | None,
    fluency: Float[np.ndarray, "prompts"],
    mask: Bool[np.ndarray, "prompts"],
    clusters: Int[np.ndarray, "prompts"] | None,
    seed: int,
    boots: int,
) -> Behaviour:
    codes = None if clusters is None else clusters[mask]
    draws = Bootstrap(int(mask.sum()), codes, boots=boots, seed=seed)
    return Behaviour(
        rate=draws.mean(shown[mask]),
        change=None if base is None else draws.mean((shown - base)[mask], bounds=PAIRED),
        fluency=draws.mean(fluency[mask]),
        judged=int((~np.isnan(shown[mask])).sum()),
        prompts=int(mask.sum()),
        coverage=coverage(shown[mask]),
        fluency_coverage=coverage(fluency[mask]),
    )
