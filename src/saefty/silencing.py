"""Silencing a layer's latents: which ones, in the stored activations and in the forward pass.

Both ask about the same latents and the same controls, so that what a probe sees and what the model
writes can be read beside each other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.baselines import Labelled, pool_dense, task_of
from saefty.delta_gating import (
    ForwardPlace,
    TokenFit,
    forward_place,
    measure_token_fit,
)
from saefty.errors import MismatchError
from saefty.evaluation import LatentEvaluation
from saefty.evaluation_settings import EvalSection, InterventionSection
from saefty.gating import (
    GatePoint,
    Silencer,
    conditions,
    match_controls,
    measure_gating,
    reply_under,
)
from saefty.image_checks import check_same_images
from saefty.judges.base import JUDGES, Judge, make_judge
from saefty.latent_gating import GatedRows, LatentGating, gate_stored
from saefty.models.base import ModelAdapter
from saefty.models.chat import with_response
from saefty.records import Example, example_from
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore, Key, layer_of

log = logging.getLogger(__name__)

NONE_QUALIFIES = "no latent leans towards harm, so nothing was silenced"


@dataclass(frozen=True)
class GateResult:
    """The causal test of one layer.

    Attributes:
        points: Every condition, the ungated one first.
        targets: The latents whose effect is claimed, in the order in which they were silenced.
        controls: The equally active latents beside them.
        behaviour: What the judge looks for, in a word.
        fluency: The judge of fluency.
        strength: How many times what the latents contribute was taken out.
        site: Where that was done, by its TransformerLens name.
        token_fit: Of an SAE that was trained on a contrast: how well it fits single tokens.
        reads: Of such an SAE: what δ is there, in words.
    """

    points: tuple[GatePoint, ...]
    targets: tuple[int, ...]
    controls: tuple[int, ...]
    behaviour: str
    fluency: str
    strength: float = 1.0
    site: str = ""
    token_fit: TokenFit | None = None
    reads: str = ""


@dataclass(frozen=True)
class Silenced:
    """What silencing a layer's latents does.

    Attributes:
        gating: In the forward pass; None where it was left out.
        no_gating: Why; empty where it was not, or was not asked for.
        stored: In the stored activations; None where it was left out.
        no_stored: Why; empty where it was not.
    """

    gating: GateResult | None
    no_gating: str
    stored: LatentGating | None
    no_stored: str


@dataclass(frozen=True)
class Silencing:
    """What silencing needs to know of an evaluation.

    Attributes:
        folder: The run's folder.
        settings: How examples were evaluated.
        intervention: What to silence, and how to judge the replies.
        features: The latents of all examples.
        records: The example table.
        data: The labelled examples.
        model: The model; None where it is not run.
    """

    folder: Path
    settings: EvalSection
    intervention: InterventionSection
    features: FeatureStore
    records: Sequence[Mapping[str, Any]]
    data: Labelled
    model: ModelAdapter | None

    def of(
        self,
        key: Key,
        sae: SparseAutoencoder,
        evaluation: LatentEvaluation,
        activations: ActivationStore | None,
    ) -> Silenced:
        """Silence one SAE's latents.

        Args:
            key: The SAE.
            sae: The SAE itself.
            evaluation: Which latents were chosen on the selection half.
            activations: What the latents were encoded from; None where that is not at hand.
        """
        cfg = self.intervention
        wanted = max(cfg.counts)
        targets = list(cfg.latents) if cfg.latents is not None else evaluation.qualified(wanted)
        controls = match_controls(
            targets, latent_activity(self.features, key, sae), evaluation.scores["auroc"]
        )
        stored, no_stored = self._stored(key, sae, evaluation, activations, targets, controls)
        gating, no_gating = None, ""
        if cfg.forward:
            together = self.features.layers if activations is None else activations.layers
            gating, no_gating = self._forward(key, sae, evaluation, targets, controls, together)
        for what, reason in (("stored activations", no_stored), ("the forward pass", no_gating)):
            if reason:
                log.warning("layer %s: nothing was silenced in %s: %s", key, what, reason)
        return Silenced(gating, no_gating, stored, no_stored)

    def _stored(
        self,
        key: Key,
        sae: SparseAutoencoder,
        evaluation: LatentEvaluation,
        activations: ActivationStore | None,
        targets: Sequence[int],
        controls: Sequence[int],
    ) -> tuple[LatentGating | None, str]:
        if not targets:
            return None, NONE_QUALIFIES
        reason = self._no_rows(key, activations)
        if reason or activations is None:
            return None, reason
        latents = tuple(dict.fromkeys((*targets, *controls)))
        rows = GatedRows(
            x=pool_dense(self.data, activations, layer_of(key), "mean"),
            z=mean_latents(self.features, key, latents, self.data),
            latents=latents,
            decoder=sae.W_dec.detach()[list(latents)].double().cpu().numpy(),
        )
        cfg = self.settings
        found = gate_stored(
            rows,
            conditions(targets, controls, self.intervention.counts),
            task_of(self.data, evaluation, seed=cfg.seed, boots=cfg.boots),
            targets=targets,
            controls=controls,
            strength=self.intervention.strength,
            false_alarms=self.intervention.false_alarms,
        )
        return found, ""

    def _no_rows(self, key: Key, activations: ActivationStore | None) -> str:
        """Return why there are no activations that an SAE's latents could be taken out of."""
        if activations is None or layer_of(key) not in activations.layers:
            return (
                "there are no activations of the examples; name them with eval.store, or set "
                "eval.baselines=true, with which the model reads them again"
            )
        ours, theirs = self.features.site(key), activations.site(layer_of(key))
        if ours != theirs:
            return f"the activations are those of {theirs}, and the SAE reads {ours}"
        if not np.array_equal(self.features.tokens()["example"], activations.rows()["example"]):
            return (
                f"the activations have {activations.n_rows} rows and the features "
                f"{self.features.n_tokens}, not one for one"
            )
        return ""

    def _forward(
        self,
        key: Key,
        sae: SparseAutoencoder,
        evaluation: LatentEvaluation,
        targets: Sequence[int],
        controls: Sequence[int],
        together: Sequence[int],
    ) -> tuple[GateResult | None, str]:
        cfg, data = self.intervention, self.data
        contrast = contrast_of(self.features, sae)
        place = forward_place(sae.site or self.features.site(key), contrast, together)
        if isinstance(place, str):
            return None, place
        assert self.model is not None  # loaded wherever a layer can be silenced in it
        self._check_width(key, sae, self.model)
        chosen = _balanced(data.harmful, evaluation.report, cfg.prompts, self.settings.seed)
        asked = [self.records[data.rows[i]] for i in chosen]
        check_same_images(asked)
        prompts = [example_from(record) for record in asked]
        silencer = Silencer(sae, place.site, cfg.strength, place.less, place.contrast)
        fit = None if contrast is None else self._fit_to_tokens(key, sae, place, prompts)
        replies = reply_under(
            self.model,
            silencer,
            prompts,
            conditions(targets, controls, cfg.counts),
            self.folder / "intervention" / f"layer_{key}",
            max_new_tokens=cfg.max_new_tokens,
            seed=self.settings.seed,
            batch_size=cfg.batch_size,
        )
        points = measure_gating(
            prompts,
            data.harmful[chosen],
            None if data.clusters is None else data.clusters[chosen],
            replies,
            make_judge(cfg.judge, cfg.judge_options),
            self._fluency,
            seed=self.settings.seed,
            boots=self.settings.boots,
        )
        behaviour = "refusal" if "refusal" in cfg.judge else cfg.judge
        return GateResult(
            tuple(points), tuple(targets), tuple(controls), behaviour, cfg.fluency, cfg.strength,
            place.site.name, fit, "" if contrast is None else place.reads,
        ), ""  # fmt: skip

    def _fit_to_tokens(
        self, key: Key, sae: SparseAutoencoder, place: ForwardPlace, prompts: Sequence[Example]
    ) -> TokenFit:
        """Return how well an SAE of a contrast fits the tokens of prompts; warn if it does not.

        Raises:
            MismatchError: If the model has no such place.
        """
        assert self.model is not None  # asked before
        items = self.model.tokenize([with_response(prompt, None) for prompt in prompts])
        fit = measure_token_fit(self.model, sae, place, items)
        if fit.far:
            log.warning("layer %s: %s", key, far_from_training(fit))
        return fit

    def _check_width(self, key: Key, sae: SparseAutoencoder, model: ModelAdapter) -> None:
        if sae.d_in != model.d_model:
            raise MismatchError(
                f"the SAE of layer {key} reads activations {sae.d_in} wide, but those of "
                f"{model.name} are {model.d_model} wide.",
                then="Set model.name to the model that the features were made with.",
            )

    def _fluency(self, unsteered: Sequence[str]) -> Judge:
        name = self.intervention.fluency
        if name == "perplexity":
            return JUDGES[name](self.model, unsteered)
        return make_judge(name, self.intervention.fluency_options, "intervention.fluency")


def contrast_of(
    store: FeatureStore | ActivationStore, sae: SparseAutoencoder | None = None
) -> Mapping[str, str] | None:
    """Return method and scope of the contrast that latents are of; None for plain activations."""
    found = None if sae is None else sae.metadata.get("contrast")
    return found or store.manifest.get("contrast")


def can_act(source: FeatureStore | ActivationStore, layers: Sequence[int] | None) -> bool:
    """Return whether latents of some layer can be silenced in the forward pass."""
    contrast = contrast_of(source)
    return any(
        isinstance(forward_place(source.site(layer), contrast, source.layers), ForwardPlace)
        for layer in layers or source.layers
    )


def far_from_training(fit: TokenFit) -> str:
    """Say that single tokens are not what an SAE of a contrast was trained on."""
    return (
        f"of the δ of single tokens the SAE leaves {fit.fvu:.2f} of the variance unexplained, and "
        f"left {fit.training_fvu:.2f} in training: it is used on what it was not trained on, so "
        "its latents may not mean there what they mean in the table."
    )


def latent_activity(
    features: FeatureStore, key: Key, sae: SparseAutoencoder
) -> Float[np.ndarray, "d_sae"]:
    """Return what each latent contributes to a token on average, as a norm in raw units."""
    total, tokens = np.zeros(sae.d_sae), 0
    for chunk in features.chunks(key):
        total += np.asarray(abs(chunk).sum(axis=0)).ravel()
        tokens += chunk.shape[0]
    return total / max(tokens, 1) * sae.W_dec.detach().norm(dim=1).cpu().numpy()


def mean_latents(
    features: FeatureStore, key: Key, latents: Sequence[int], data: Labelled
) -> Float[np.ndarray, "examples chosen"]:
    """Return the mean of some latents over each example's rows, with their sign."""
    owners = data.owners(features.tokens()["example"])
    total, first = np.zeros((len(data.rows), len(latents))), 0
    for chunk in features.chunks(key):
        owner = owners[first : first + chunk.shape[0]]
        used = np.flatnonzero(owner >= 0)
        np.add.at(total, owner[used], chunk[used][:, list(latents)].toarray())
        first += chunk.shape[0]
    counts = np.bincount(owners[owners >= 0], minlength=len(data.rows))
    return total / counts.clip(min=1)[:, None]


def _balanced(
    harmful: Bool[np.ndarray, "examples"],
    report: Bool[np.ndarray, "examples"],
    most: int,
    seed: int,
) -> Int[np.ndarray, "chosen"]:
    """Return examples of the report half, as many of each label as there are of both, in order."""
    rng = np.random.default_rng([seed, 4])
    kinds = [np.flatnonzero(report & mask) for mask in (harmful, ~harmful)]
    n = min(most // 2, *(len(kind) for kind in kinds))
    return np.sort(np.concatenate([rng.permutation(kind)[:n] for kind in kinds]))
