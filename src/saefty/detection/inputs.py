"""The inputs that are compared: latents, activations, words, and the latents of a random SAE.

One learner reads them all; what differs is the matrix, and how its columns are scaled. A family is
one kind of input; its candidates are the same input at several layers and pooled in several ways,
of which one is chosen on folds of the training side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Bool
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import CountVectorizer

from saefty.baselines import Labelled, activation_blocks, mean_activation, pool_dense
from saefty.controls import random_sae
from saefty.errors import ConfigError, InputError, MismatchError, NumericError
from saefty.metrics.base import as_columns
from saefty.probes import (
    Inputs,
    Learn,
    divide_by_deviation,
    read_best,
    read_present,
    sparse_family,
    standardise,
)
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore
from saefty.words import bag_of_words

LATENTS, DENSE, WORDS, RANDOM = "SAE latents", "dense activations", "bag of words", "random SAE"
K_SPARSE = (1, 2, 5, 16, 64)
OVER = {"max": "max over tokens", "mean": "mean over tokens", "last": "last token"}
Pooling = Literal["max", "mean", "last"]


@dataclass(frozen=True)
class Candidate:
    """One input, of all examples.

    Attributes:
        family: What kind of input it is; one candidate of each is chosen.
        rows: One row an example.
        learn: How its columns are scaled and which are read.
        layer: Where it is read; None for words.
        pooling: How an example's tokens become one row; None for words.
        k: How many latents may be read; None for all.
        vocabulary: Of words: the word of each column.
    """

    family: str
    rows: Inputs
    learn: Learn
    layer: int | None = None
    pooling: Pooling | None = None
    k: int | None = None
    vocabulary: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The family, and where and how it is read."""
        return f"{self.family}, {self.where}" if self.where else self.family

    @property
    def where(self) -> str:
        """Where and how it is read; nothing for words."""
        if self.layer is None or self.pooling is None:
            return ""
        return f"layer {self.layer}, {OVER[self.pooling]}"


def word_input(texts: Sequence[str]) -> Candidate:
    """Return counts of words, of all words of all texts; a probe reads those of its training side.

    Raises:
        InputError: If no text holds a word.
    """
    vectorizer = CountVectorizer(analyzer=bag_of_words, dtype=np.float64)
    try:
        counts = vectorizer.fit_transform(list(texts))
    except ValueError as error:
        raise InputError(
            f"none of the {len(texts)} texts holds a word.",
            then="Check data.text: it must name the column with the text.",
        ) from error
    words = tuple(str(word) for word in vectorizer.get_feature_names_out())
    return Candidate(WORDS, csr_array(counts), read_present, vocabulary=words)


def latent_inputs(
    store: FeatureStore,
    data: Labelled,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    ks: Sequence[int],
) -> list[Candidate]:
    """Return the SAE's latents, all and the k best, for each layer and pooling."""
    found = []
    for layer in layers:
        for how in poolings:
            rows = csr_array(as_columns(csr_array(store.pooled(layer, how)[data.rows])))
            found.append(Candidate(LATENTS, rows, divide_by_deviation, layer, how))
            for k in ks:
                learn = partial(read_best, k=k)
                found.append(Candidate(sparse_family(k), rows, learn, layer, how, k))
    return found


def dense_inputs(
    store: ActivationStore, data: Labelled, layers: Sequence[int], poolings: Sequence[Pooling]
) -> list[Candidate]:
    """Return raw activations for each layer and pooling.

    Raises:
        NumericError: If an activation is NaN or infinite.
    """
    found = []
    for layer in layers:
        for how in poolings:
            rows = pool_dense(data, store, layer, how)
            bad = int((~np.isfinite(rows).all(axis=1)).sum())
            if bad:
                raise NumericError(
                    f"the activations of layer {layer} of {bad} of {len(rows)} examples hold NaN "
                    "or infinity.",
                    then="Extract again with extract.nonfinite=mask, or find the layer that "
                    "overflows.",
                )
            found.append(Candidate(DENSE, rows, standardise, layer, how))
    return found


def random_inputs(
    store: ActivationStore,
    features: FeatureStore,
    data: Labelled,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    seed: int,
    *,
    train: Bool[np.ndarray, "examples"],
) -> list[Candidate]:
    """Return latents of a random SAE of the same width and L0, for each layer and pooling.

    The L0 and what is subtracted from each activation are those of the training side.
    """
    found = []
    learnt = _part(data, train)
    for layer in layers:
        center = mean_activation(learnt, store, layer)
        signed = features.signed(layer)
        for how in poolings:
            rows = random_sae(
                activation_blocks(data, store, layer),
                len(data.rows),
                d_sae=features.d_sae(layer),
                k=max(1, round(_mean_l0(features, learnt, layer))),
                center=center,
                how=how,
                seed=seed,
                signed=signed,
            )
            found.append(
                Candidate(RANDOM, csr_array(as_columns(rows)), divide_by_deviation, layer, how)
            )
    return found


def checked_ks(
    given: Sequence[int] | None, features: FeatureStore, layers: Sequence[int]
) -> tuple[int, ...]:
    """Return how many latents the k-sparse probes read.

    Raises:
        ConfigError: If that is none, or more than an SAE has.
    """
    widths = {layer: features.d_sae(layer) for layer in layers}
    layer, least = min(widths.items(), key=lambda item: item[1])
    if given is None:
        return tuple(k for k in K_SPARSE if k <= least)
    for k in given:
        if not 1 <= k <= least:
            raise ConfigError(
                f"probe.k asks for {k} latents, but the SAE of layer {layer} has {least}.",
                then=f"Name numbers from 1 to {least}.",
            )
    return tuple(sorted(set(given)))


def check_same_examples(features: FeatureStore, activations: ActivationStore) -> None:
    """Refuse features and activations of different examples.

    Raises:
        MismatchError: If their example tables differ.
    """
    ours, theirs = (
        [(str(record["example_id"]), record.get("text")) for record in store.examples()]
        for store in (features, activations)
    )
    if ours != theirs:
        _refuse(features, activations, *_first_difference(ours, theirs))
    if features.n_tokens != activations.n_rows:
        _refuse(
            features,
            activations,
            f"{features.n_tokens} tokens",
            f"{activations.n_rows} of the same examples",
        )
    for layer in features.layers:
        if layer in activations.layers and features.site(layer) != activations.site(layer):
            _refuse(
                features,
                activations,
                f"latents of {features.site(layer)}",
                f"activations of {activations.site(layer)}",
            )


def check_same_tokens(features: FeatureStore, activations: ActivationStore) -> None:
    """Refuse activations that were read again and are not of the features' tokens.

    Raises:
        MismatchError: If there are more of them, or fewer.
    """
    if features.n_tokens != activations.n_rows:
        raise MismatchError(
            f"the examples, read again, have {activations.n_rows} tokens; the features in "
            f"{features.folder} hold {features.n_tokens}.",
            safe="The features are unchanged; nothing was compared.",
            then="Set model.name to the model they were made with, set probe.store to the "
            "activations they were made of, or set probe.baselines=false.",
        )


def _part(data: Labelled, rows: Bool[np.ndarray, "examples"]) -> Labelled:
    return Labelled(
        rows=data.rows[rows],
        texts=tuple(data.texts[i] for i in np.flatnonzero(rows).tolist()),
        harmful=data.harmful[rows],
        clusters=None if data.clusters is None else data.clusters[rows],
        sources=None if data.sources is None else data.sources[rows],
        n_table=data.n_table,
    )


def _mean_l0(features: FeatureStore, data: Labelled, layer: int) -> float:
    """Return how many latents fire on a token of the examples, in the mean."""
    used = data.owners(features.tokens()["example"]) >= 0
    counts = [np.diff(chunk.indptr) for chunk in features.chunks(layer)]
    return float(np.concatenate(counts)[used].mean()) if used.any() else 0.0


def _first_difference(
    ours: Sequence[tuple[str, str | None]], theirs: Sequence[tuple[str, str | None]]
) -> tuple[str, str]:
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one[0] != other[0]:
            return f"{one[0]!r} as example {i}", repr(other[0])
        if one != other:
            return f"example {one[0]!r}", "the same with another text"
    return f"{len(ours)} examples", f"{len(theirs)}"


def _refuse(features: FeatureStore, activations: ActivationStore, ours: str, theirs: str) -> None:
    raise MismatchError(
        f"the features in {features.folder} and the activations in {activations.folder} are not "
        f"of the same tokens: the features hold {ours}, the activations {theirs}.",
        then="Set probe.store to activations of the same examples and place, or leave it out: then "
        "the model is run.",
    )
