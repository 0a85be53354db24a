"""One comparison of detectors from end to end: examples, inputs, fits, sources and categories."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from saefty.detection.comparison import Comparison, compare
from saefty.detection.generalisation import LeftOut, leave_one_source_out, one_vs_rest
from saefty.detection.inputs import (
    WORDS,
    Candidate,
    check_same_examples,
    check_same_tokens,
    checked_ks,
    dense_inputs,
    latent_inputs,
    random_inputs,
    word_input,
)
from saefty.detection.result import Detection
from saefty.detection.saving import MeasuredDetector, check_name
from saefty.errors import ConfigError
from saefty.evaluation_inputs import (
    check_same_contrast,
    encoded,
    images_of,
    labelled_examples,
    read_again,
)
from saefty.evaluation_settings import ProbeSection
from saefty.guards.spec import plain_text
from saefty.log import progress
from saefty.metrics.leaks import LeakWarning, find_leaks
from saefty.metrics.splits import balanced_subset, split_clusters
from saefty.models.base import ModelAdapter
from saefty.probes import ProbeTask
from saefty.reading import ReadingSection
from saefty.records import example_from
from saefty.runs import Ledger
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

NEARLY_BALANCED = 0.95
"""Share of the training side in its balanced subset above which the subset says nothing new."""


class DetectionJob:
    """Its stores, its labelled examples, and the inputs that are compared.

    Args:
        folder: The run's folder; what must be extracted or encoded on the way is kept in it.
        fingerprint: A checksum of everything the run depends on.
        settings: Which features to compare with other inputs, and how.
        features: Features; None encodes the activations.
        activations: Activations of the same examples; None runs the model, where there is one.
        saes: Without features, the SAE of each layer.
        model: The model, where one is needed.
        reading: How the examples were read, so that they are read alike again.
        ledger: Takes down what became of each example.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        settings: ProbeSection,
        features: FeatureStore | None,
        activations: ActivationStore | None,
        *,
        saes: Mapping[int, SparseAutoencoder],
        model: ModelAdapter | None,
        reading: ReadingSection,
        ledger: Ledger,
    ) -> None:
        self.folder, self.settings, self.reading = folder, settings, reading
        self.activations = activations
        if features is None:
            assert activations is not None  # the settings name one of the two
            features = encoded(activations, saes, folder / "features", fingerprint)
        elif activations is not None:
            check_same_examples(features, activations)
            check_same_contrast(features, activations, "probe.store")
        self.features = features
        self.records = features.examples()
        self.data = labelled_examples(
            self.records,
            ledger,
            drop_missing=settings.drop_missing_labels,
            section="probe",
            made_by="extract" if settings.features is None else "encode",
        )
        self.layers = settings.layers or features.layers
        self.ks = checked_ks(settings.k, features, self.layers)
        if self.activations is None and settings.baselines and model is not None:
            sites = [features.site(layer) for layer in self.layers]
            self.activations = read_again(
                self.records, model, reading, sites, folder / "activations", fingerprint
            )
            check_same_tokens(features, self.activations)

    def run(self) -> Detection:
        """Compare the inputs; nothing is saved."""
        cfg, data = self.settings, self.data
        task = self._task()
        candidates = self._candidates(task.train)
        check_name(cfg.save_detector, candidates)
        names, codes = self._sources()
        train, test = task.train, task.test
        subset = self._balanced(train) if cfg.balanced else None
        trainings = {"all": train} | ({} if subset is None else {"balanced": subset})
        comparisons = []
        with progress("detectors", len(trainings) * len(candidates), "detectors") as bar:
            for name, part in trainings.items():
                task = ProbeTask(data.harmful, part, test, data.clusters, cfg.seed, cfg.boots)
                comparisons.append(
                    compare(
                        candidates, task, name, permutations=cfg.permutations, advance=bar.advance
                    )
                )
        left_out = None
        if cfg.leave_one_source_out:
            left_out = LeftOut()
            if len(names) > 1:
                left_out = leave_one_source_out(candidates, comparisons[0], task, codes, names)
        categories = [self.records[i].get("category") for i in data.rows]
        told = categories if cfg.one_vs_rest else [None] * len(categories)
        rest, rest_left_out = one_vs_rest(candidates, task, told)
        return Detection(
            data=data,
            ids=[self.records[i]["example_id"] for i in data.rows],
            categories=categories,
            sources=names,
            task=task,
            comparisons=tuple(comparisons),
            left_out=left_out,
            rest=tuple(rest),
            rest_left_out=tuple(rest_left_out),
            leaks=tuple(self._leaks(comparisons[0], task, names)),
            d_sae={layer: self.features.d_sae(layer) for layer in self.layers},
        )

    def again(self, measured: MeasuredDetector) -> Detection:
        """Fit one detector of a finished comparison again, and it alone.

        Args:
            measured: What the comparison wrote of it.

        Raises:
            ConfigError: If what it reads was not kept.
            MismatchError: If it does not come out as it was measured.
        """
        data, cfg = self.data, self.settings
        task = self._task()
        candidates = self._candidates(task.train, controls=False)
        named = [one for one in candidates if one.name == measured.name]
        if not named:
            raise ConfigError(
                f"{self.folder} holds no activations that {measured.name} could be fitted on "
                "again.",
                then="Set run.dir to a new folder, with probe.save from the start.",
            )
        comparison = compare(named, task, "all", permutations=cfg.permutations)
        measured.check(comparison.detectors[0], self.folder)
        return Detection(
            data=data,
            ids=[self.records[i]["example_id"] for i in data.rows],
            categories=[self.records[i].get("category") for i in data.rows],
            sources=self._sources()[0],
            task=task,
            comparisons=(comparison,),
            left_out=measured.left_out,
            rest=(),
            rest_left_out=(),
            leaks=(),
            d_sae={layer: self.features.d_sae(layer) for layer in self.layers},
        )

    def _task(self) -> ProbeTask:
        cfg, data = self.settings, self.data
        train, test = split_clusters(
            data.harmful,
            data.clusters,
            data.sources,
            shares=(1 - cfg.test_share, cfg.test_share),
            seed=cfg.seed,
            setting="probe.test_share",
        )
        return ProbeTask(data.harmful, train, test, data.clusters, cfg.seed, cfg.boots)

    def _candidates(
        self, train: Bool[np.ndarray, "examples"], *, controls: bool = True
    ) -> list[Candidate]:
        cfg, data = self.settings, self.data
        found = latent_inputs(self.features, data, self.layers, cfg.poolings, self.ks)
        if self.activations is not None and cfg.baselines:
            found += dense_inputs(self.activations, data, self.layers, cfg.poolings)
            if controls:
                found += random_inputs(
                    self.activations,
                    self.features,
                    data,
                    self.layers,
                    cfg.poolings,
                    cfg.seed,
                    train=train,
                )
        # What was written, without the words of a chat template: what a guard of words will see.
        texts = [plain_text(example_from(self.records[i])) for i in data.rows]
        return [*found, word_input(texts)]

    def _sources(self) -> tuple[list[str], np.ndarray]:
        """Return the names of the sources, and the code of each example."""
        found = [str(self.records[i]["source"]) for i in self.data.rows]
        names, codes = np.unique(found, return_inverse=True)
        return names.tolist(), codes

    def _balanced(self, train: Bool[np.ndarray, "examples"]) -> Bool[np.ndarray, "examples"] | None:
        """Return a balanced part of the training side; None if it is nearly balanced itself."""
        data = self.data
        rows = np.flatnonzero(train)
        clusters = None if data.clusters is None else data.clusters[rows]
        kept = balanced_subset(data.harmful[rows], clusters, seed=self.settings.seed)
        if kept.mean() > NEARLY_BALANCED:
            return None
        subset = np.zeros(len(train), dtype=bool)
        subset[rows[kept]] = True
        return subset

    def _leaks(
        self, comparison: Comparison, task: ProbeTask, names: list[str]
    ) -> list[LeakWarning]:
        data, words = self.data, comparison.of(WORDS)
        return find_leaks(
            data.texts,
            data.harmful,
            data.clusters,
            data.sources,
            (task.train, task.test),
            images=images_of(self.records, data.rows),
            words_auroc=None if words is None else words.auroc,
            source_names=names,
            seed=task.seed,
        )
