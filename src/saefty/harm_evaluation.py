"""Evaluating latents from end to end: examples, chosen latents, baselines, and the causal test."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from saefty.baselines import (
    dense_probes,
    luck_controls,
    task_of,
    text_and_latent_probes,
)
from saefty.errors import ConfigError, MismatchError
from saefty.evaluation import LatentEvaluation, evaluate_latents
from saefty.evaluation_inputs import encoded, labelled_examples, read_again
from saefty.evaluation_settings import EvalSection, InterventionSection
from saefty.gating import (
    GatePoint,
    conditions,
    match_controls,
    measure_gating,
    reply_under,
)
from saefty.judges.base import JUDGES, Judge, make_judge
from saefty.metrics.firing import FiringStats, firing_stats
from saefty.metrics.intervals import Interval
from saefty.metrics.leaks import LeakWarning, find_leaks
from saefty.models.base import ModelAdapter
from saefty.probes import ProbeResult
from saefty.reading import ReadingSection
from saefty.records import Site, example_from
from saefty.runs import Ledger
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

log = logging.getLogger(__name__)

K_SPARSE = 8
"""Latents that the k-sparse probe may read: as many as are usually gated."""


@dataclass(frozen=True)
class GateResult:
    """The causal test of one layer.

    Attributes:
        points: Every condition, the ungated one first.
        targets: The latents whose effect is claimed, in the order in which they were silenced.
        controls: The equally active latents beside them.
        behaviour: What the judge looks for, in a word.
        fluency: The judge of fluency.
    """

    points: tuple[GatePoint, ...]
    targets: tuple[int, ...]
    controls: tuple[int, ...]
    behaviour: str
    fluency: str


@dataclass(frozen=True)
class LayerResult:
    """Everything found out about one layer's latents.

    Attributes:
        layer: The block.
        site: Where the SAE reads, by its TransformerLens name.
        evaluation: Which latents were chosen, and how they did on the report half.
        probes: Detectors on other inputs, on the same split.
        controls: Held-out AUROC of the best latent of each control for luck.
        leaks: Shortcuts found in the data.
        firing: Activity of every latent.
        gating: The causal test; None where it was left out.
        sae_folder: Where the SAE lies.
    """

    layer: int
    site: str
    evaluation: LatentEvaluation
    probes: tuple[ProbeResult, ...]
    controls: Mapping[str, Interval]
    leaks: tuple[LeakWarning, ...]
    firing: FiringStats
    gating: GateResult | None
    sae_folder: str | None


class HarmEvaluation:
    """One evaluation: its stores, its labelled examples, and what is found layer by layer.

    Args:
        folder: The run's folder; what must be extracted or encoded on the way is kept in it.
        fingerprint: A checksum of everything the run depends on.
        settings: Which features to evaluate, and how.
        intervention: What to silence, and how to judge the replies.
        source: Features, or activations that are encoded first.
        saes: With activations, the SAE of each layer.
        load_saes: Loads the SAEs of a folder that a feature store names.
        model: The model, where one is needed.
        reading: How the examples were read, so that they are read alike again.
        ledger: Takes down what became of each example.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        settings: EvalSection,
        intervention: InterventionSection,
        source: ActivationStore | FeatureStore,
        *,
        saes: Mapping[int, SparseAutoencoder],
        load_saes: Callable[[Path], Mapping[int, SparseAutoencoder]],
        model: ModelAdapter | None,
        reading: ReadingSection,
        ledger: Ledger,
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.settings, self.intervention = settings, intervention
        self.model, self.reading, self.ledger = model, reading, ledger
        self.saes, self.load_saes = dict(saes), load_saes
        self.activations: ActivationStore | None = None
        if isinstance(source, ActivationStore):
            self.activations = source
            self.features = encoded(source, self.saes, folder / "features", fingerprint)
        else:
            self.features = source
        self.records = self.features.examples()
        self.data = labelled_examples(
            self.records, ledger, drop_missing=settings.drop_missing_labels, section="eval"
        )
        self.layers = settings.layers or self.features.layers

    def run(self) -> list[LayerResult]:
        """Evaluate every layer."""
        if self.intervention.enabled:
            self._check_latents()
        embedding = self._activations_if_wanted()
        return [self._layer(layer, embedding) for layer in self.layers]

    def _check_latents(self) -> None:
        for layer in self.layers:
            d_sae = self.features.d_sae(layer)
            absent = [i for i in self.intervention.latents or () if not 0 <= i < d_sae]
            if absent:
                raise ConfigError(
                    f"intervention.latents names latent {absent[0]}, but the SAE of layer {layer} "
                    f"has {d_sae}: 0..{d_sae - 1}.",
                    then="Name latents in that range; layer_<i>.csv of an earlier report lists "
                    "them.",
                )

    def _activations_if_wanted(self) -> ActivationStore | None:
        """Extract what the dense baselines need; return the store of the embedding's output."""
        if not self.settings.baselines or self.model is None:
            return None
        if self.activations is None:
            sites = [self.features.site(layer) for layer in self.layers]
            self.activations = self._read(sites, "activations")
        return self._read([Site(0, "resid_pre")], "embedding")

    def _read(self, sites: list[Site], name: str) -> ActivationStore:
        assert self.model is not None  # asked before
        folder = self.folder / name
        return read_again(self.records, self.model, self.reading, sites, folder, self.fingerprint)

    def _layer(self, layer: int, embedding: ActivationStore | None) -> LayerResult:
        cfg, data = self.settings, self.data
        pooled = csr_array(self.features.pooled(layer, cfg.pooling)[data.rows])
        evaluation = evaluate_latents(
            pooled,
            data.harmful,
            data.clusters,
            data.sources,
            top=cfg.topk_latents,
            ranked_by=cfg.ranked_by,
            seed=cfg.seed,
            permutations=cfg.permutations,
            boots=cfg.boots,
        )
        task = task_of(data, evaluation, seed=cfg.seed, boots=cfg.boots)
        probes = text_and_latent_probes(data, pooled, task, k=min(K_SPARSE, pooled.shape[1]))
        stats = firing_stats(self.features.chunks(layer))
        if self.activations is not None and cfg.baselines:
            where = f"layer {layer}"
            probes += dense_probes(data, self.activations, layer, where, task)
        if embedding is not None:
            probes += dense_probes(data, embedding, 0, "embedding", task)[:1]
        controls = luck_controls(
            data,
            pooled,
            self.activations if cfg.baselines else None,
            layer,
            d_sae=pooled.shape[1],
            l0=stats.mean_l0,
            how=cfg.pooling,
            seed=cfg.seed,
            permutations=cfg.permutations,
            boots=cfg.boots,
            signed=self.features.signed(layer),
        )
        leaks = find_leaks(
            data.texts,
            data.harmful,
            data.clusters,
            data.sources,
            (evaluation.selection, evaluation.report),
            words_auroc=probes[0].auroc,
            seed=cfg.seed,
        )
        gating = self._gating(layer, evaluation) if self.intervention.enabled else None
        return LayerResult(
            layer=layer,
            site=self.features.site(layer).name,
            evaluation=evaluation,
            probes=tuple(probes),
            controls=controls,
            leaks=tuple(leaks),
            firing=stats,
            gating=gating,
            sae_folder=self._sae_folder(layer),
        )

    def _gating(self, layer: int, evaluation: LatentEvaluation) -> GateResult:
        cfg, data = self.intervention, self.data
        assert self.model is not None  # loaded whenever an intervention is wanted
        sae = self._sae(layer)
        wanted = max(cfg.counts)
        targets = list(cfg.latents) if cfg.latents is not None else evaluation.qualified(wanted)
        activity = self._activity(layer, sae)
        controls = match_controls(targets, activity, evaluation.scores["auroc"])
        chosen = _balanced(data.harmful, evaluation.report, cfg.prompts, self.settings.seed)
        prompts = [example_from(self.records[data.rows[i]]) for i in chosen]
        replies = reply_under(
            self.model,
            sae,
            prompts,
            conditions(targets, controls, cfg.counts),
            self.folder / "intervention" / f"layer_{layer}",
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
        return GateResult(tuple(points), tuple(targets), tuple(controls), behaviour, cfg.fluency)

    def _fluency(self, unsteered: Sequence[str]) -> Judge:
        name = self.intervention.fluency
        if name == "perplexity":
            return JUDGES[name](self.model, unsteered)
        return make_judge(name, self.intervention.fluency_options, "intervention.fluency")

    def _activity(self, layer: int, sae: SparseAutoencoder) -> Float[np.ndarray, "d_sae"]:
        """Return what each latent contributes to a token on average, as a norm in raw units."""
        total, tokens = np.zeros(sae.d_sae), 0
        for chunk in self.features.chunks(layer):
            total += np.asarray(abs(chunk).sum(axis=0)).ravel()
            tokens += chunk.shape[0]
        return total / max(tokens, 1) * sae.W_dec.detach().norm(dim=1).cpu().numpy()

    def _sae_folder(self, layer: int) -> str | None:
        return self.features.manifest["saes"].get(str(layer))

    def _sae(self, layer: int) -> SparseAutoencoder:
        if layer not in self.saes:
            source = self._sae_folder(layer)
            if source is None:
                raise ConfigError(
                    f"{self.features.folder} does not say where the SAE of layer {layer} lies.",
                    then="Encode with encode.sae=FOLDER, or set intervention.enabled=false.",
                )
            self.saes.update(self.load_saes(Path(source)))
        sae = self.saes[layer]
        assert self.model is not None
        sae.require_autoencoder("gating")
        if sae.d_in != self.model.d_model:
            raise MismatchError(
                f"the SAE of layer {layer} reads activations {sae.d_in} wide, but those of "
                f"{self.model.name} are {self.model.d_model} wide.",
                then="Set model.name to the model that the features were made with.",
            )
        return sae


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
