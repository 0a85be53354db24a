"""Evaluating latents from end to end: examples, chosen latents, baselines, and the causal test."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.sparse import csr_array

from saefty.baselines import (
    dense_probes,
    luck_controls,
    task_of,
    text_and_latent_probes,
)
from saefty.delta_gating import training_fvu
from saefty.errors import ConfigError, MismatchError, SaeftyError
from saefty.evaluation import LatentEvaluation, evaluate_latents
from saefty.evaluation_inputs import (
    check_same_contrast,
    encoded,
    images_of,
    labelled_examples,
    read_again,
)
from saefty.evaluation_settings import EvalSection, InterventionSection
from saefty.fidelity import measure_fidelity
from saefty.metrics.firing import FiringStats, firing_stats
from saefty.metrics.intervals import Interval
from saefty.metrics.leaks import LeakWarning, find_leaks
from saefty.models.base import ModelAdapter
from saefty.probes import ProbeResult, probe_k_sparse
from saefty.reading import ReadingSection
from saefty.records import Site
from saefty.runs import Ledger
from saefty.saes.base import SparseAutoencoder
from saefty.silencing import Silenced, Silencing
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore, Key, layer_of

log = logging.getLogger(__name__)

K_SPARSE = 8
"""Latents that the k-sparse probe may read: as many as are usually gated."""

FEWER = (1, 2, 5)
"""How many the further k-sparse probes may read."""

FVU_ROWS = 4096
"""Rows whose reconstruction is measured at once."""


@dataclass(frozen=True)
class LayerResult:
    """Everything found out about one layer's latents.

    Attributes:
        layer: The SAE: its block, or `<block>__<name>` for a further SAE of a block.
        site: Where the SAE reads, by its TransformerLens name.
        evaluation: Which latents were chosen, and how they did on the report half.
        probes: Detectors on other inputs, on the same split.
        controls: Held-out AUROC of the best latent of each control for luck.
        leaks: Shortcuts found in the data.
        firing: Activity of every latent.
        pooled: The latents of every example, one row each.
        fvu: Fraction of variance unexplained: of the store's activations, or as training measured
            it; None where neither is known.
        silenced: What silencing its latents does; None where that was not asked for.
        sae_folder: Where the SAE lies.
    """

    layer: Key
    site: str
    evaluation: LatentEvaluation
    probes: tuple[ProbeResult, ...]
    controls: Mapping[str, Interval]
    leaks: tuple[LeakWarning, ...]
    firing: FiringStats
    pooled: csr_array
    fvu: float | None
    silenced: Silenced | None
    sae_folder: str | None

    @property
    def significant(self) -> int:
        """How many latents pass all three tests of a finding."""
        return sum(one.found for one in self.evaluation.latents)


class HarmEvaluation:
    """One evaluation: its stores, its labelled examples, and what is found layer by layer.

    Args:
        folder: The run's folder; what must be extracted or encoded on the way is kept in it.
        fingerprint: A checksum of everything the run depends on.
        settings: Which features to evaluate, and how.
        intervention: What to silence, and how to judge the replies.
        source: Features, or activations that are encoded first.
        activations: With features: activations of the same examples, if there are any.
        saes: With activations, the SAE of each layer.
        load_saes: Loads the SAEs of a folder that a feature store names, those of some layers.
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
        activations: ActivationStore | None = None,
        saes: Mapping[int, SparseAutoencoder],
        load_saes: Callable[[Path, Sequence[int]], Mapping[int, SparseAutoencoder]],
        model: ModelAdapter | None,
        reading: ReadingSection,
        ledger: Ledger,
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.settings, self.intervention = settings, intervention
        self.model, self.reading, self.ledger = model, reading, ledger
        self.saes: dict[Key, SparseAutoencoder] = dict(saes.items())
        self.load_saes = load_saes
        self.activations = activations
        if isinstance(source, ActivationStore):
            self.activations = source
            self.features = encoded(source, saes, folder / "features", fingerprint)
        else:
            self.features = source
            if activations is not None:
                check_same_examples(source, activations)
                check_same_contrast(source, activations, "eval.store")
        self.records = self.features.examples()
        self.data = labelled_examples(
            self.records, ledger, drop_missing=settings.drop_missing_labels, section="eval"
        )
        wanted = settings.layers or self.features.layers
        self.layers = [key for layer in wanted for key in self._saes_of(layer)]

    def run(self) -> list[LayerResult]:
        """Evaluate every layer."""
        if self.intervention.enabled:
            self._check_latents()
        embedding = self._activations_if_wanted()
        return [self._layer(key, embedding) for key in self.layers]

    def _saes_of(self, layer: int) -> list[Key]:
        """Return all SAEs of a layer, the first one first."""
        others = [key for key in self.features.codes if key != layer and layer_of(key) == layer]
        return [layer, *others]

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
            # One place a layer: a further SAE of another hook point goes without.
            layers = dict.fromkeys(layer_of(key) for key in self.layers)
            sites = [self.features.site(layer) for layer in layers]
            self.activations = self._read(sites, "activations")
        return self._read([Site(0, "resid_pre")], "embedding")

    def _read(self, sites: list[Site], name: str) -> ActivationStore:
        assert self.model is not None  # asked before
        folder = self.folder / name
        return read_again(self.records, self.model, self.reading, sites, folder, self.fingerprint)

    def _layer(self, key: Key, embedding: ActivationStore | None) -> LayerResult:
        cfg, data, layer = self.settings, self.data, layer_of(key)
        pooled = csr_array(self.features.pooled(key, cfg.pooling)[data.rows])
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
        probes[2:2] = [
            probe_k_sparse(pooled, task, k=k) for k in FEWER if k < min(K_SPARSE, pooled.shape[1])
        ]
        stats = firing_stats(self.features.chunks(key))
        activations = self._activations_of(key)
        if activations is not None and cfg.baselines:
            where = f"layer {layer}"
            probes += dense_probes(data, activations, layer, where, task)
        if embedding is not None:
            probes += dense_probes(data, embedding, 0, "embedding", task)[:1]
        controls = luck_controls(
            data,
            pooled,
            activations if cfg.baselines else None,
            layer,
            d_sae=pooled.shape[1],
            l0=stats.mean_l0,
            how=cfg.pooling,
            seed=cfg.seed,
            permutations=cfg.permutations,
            boots=cfg.boots,
            signed=self.features.signed(key),
        )
        leaks = find_leaks(
            data.texts,
            data.harmful,
            data.clusters,
            data.sources,
            (evaluation.selection, evaluation.report),
            images=images_of(self.records, data.rows),
            words_auroc=probes[0].auroc,
            seed=cfg.seed,
        )
        wanted = self.intervention.enabled
        return LayerResult(
            layer=key,
            site=self.features.site(key).name,
            evaluation=evaluation,
            probes=tuple(probes),
            controls=controls,
            leaks=tuple(leaks),
            firing=stats,
            pooled=pooled,
            fvu=self._fvu(key, activations),
            silenced=self._silenced(key, evaluation, activations) if wanted else None,
            sae_folder=self._sae_folder(key),
        )

    def _activations_of(self, key: Key) -> ActivationStore | None:
        """Return the activations that an SAE reads; None where they are of another place."""
        store, layer = self.activations, layer_of(key)
        if store is None or layer not in store.layers:
            return None
        return store if key == layer or store.site(layer) == self.features.site(key) else None

    def _silenced(
        self, key: Key, evaluation: LatentEvaluation, activations: ActivationStore | None
    ) -> Silenced:
        job = Silencing(
            self.folder, self.settings, self.intervention, self.features, self.records, self.data,
            self.model,
        )  # fmt: skip
        return job.of(key, self._sae(key), evaluation, activations)

    def _fvu(self, key: Key, activations: ActivationStore | None) -> float | None:
        """Return the SAE's FVU on the store's activations, else that of its training."""
        folder = self._sae_folder(key)
        if key not in self.saes and (folder is None or not Path(folder).is_dir()):
            return None  # nothing is fetched for one figure
        try:
            sae = self._sae(key, "measuring a reconstruction")
        except SaeftyError as error:
            log.info("layer %s: the FVU is left out: %s", key, error.message)
            return None
        if activations is None:
            return training_fvu(sae)
        return measure_fidelity(sae, activations.batches(layer_of(key), FVU_ROWS)).fvu

    def _sae_folder(self, key: Key) -> str | None:
        return self.features.manifest["saes"].get(str(key))

    def _sae(self, key: Key, use: str = "gating") -> SparseAutoencoder:
        if key not in self.saes:
            source = self._sae_folder(key)
            if source is None:
                raise ConfigError(
                    f"{self.features.folder} does not say where the SAE of layer {key} lies.",
                    then="Encode with encode.sae=FOLDER, or set intervention.enabled=false.",
                )
            layer = layer_of(key)
            self.saes[key] = self.load_saes(Path(source), [layer])[layer]
        sae = self.saes[key]
        sae.require_autoencoder(use)
        return sae


def check_same_examples(features: FeatureStore, activations: ActivationStore) -> None:
    """Refuse features and activations of different examples, or of different places.

    Raises:
        MismatchError: If their example tables differ, or where a layer was read.
    """
    ours, theirs = (
        [(str(one["example_id"]), one.get("text")) for one in store.examples()]
        for store in (features, activations)
    )
    if ours != theirs:
        apart = next(
            (f"example {i} is {a[0]!r} in one and {b[0]!r} in the other" if a[0] != b[0]
             else f"example {a[0]!r} has another text"
             for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            f"they hold {len(ours)} and {len(theirs)}",
        )  # fmt: skip
        raise MismatchError(
            f"eval.features ({features.folder}) and eval.store ({activations.folder}) are not of "
            f"the same examples: {apart}.",
            then="Set eval.store to the activations of these examples, or leave it out: then the "
            "model reads them again.",
        )
    for layer in features.layers:
        if layer in activations.layers and features.site(layer) != activations.site(layer):
            raise MismatchError(
                f"eval.features ({features.folder}) are latents of {features.site(layer)}, and "
                f"eval.store ({activations.folder}) holds {activations.site(layer)}.",
                then="Set eval.store to activations of that place, or leave it out.",
            )
