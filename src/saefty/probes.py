"""Detectors of harm on different inputs, compared as a referee would: same split, seed and budget.

Four inputs, one learner. The words alone (what vocabulary gives away), the raw activations (what
the model knows), the SAE's latents (what the SAE kept of it) and the k best latents (what a person
could read). The learner is logistic regression with an L2 penalty; its strength is chosen from the
same five values, on the same three folds of the training clusters, for every input. Everything an
input needs (vocabulary, scales, the choice of k latents) is learnt on the training clusters only.
"""

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from saefty.errors import InputError
from saefty.metrics.alignment import auroc
from saefty.metrics.base import Pooled, as_columns, check_labels, group_codes
from saefty.metrics.intervals import Bootstrap, Interval

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
FOLDS = 3
STEPS = 1000
NGRAM = 3
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")

Inputs = csr_array | np.ndarray


@dataclass(frozen=True)
class ProbeTask:
    """What every probe of a comparison shares.

    Attributes:
        harmful: The labels.
        train: Which examples a probe learns on.
        test: Which examples it is judged on; no cluster is on both sides.
        clusters: A code an example, equal for examples that belong together; None if all are apart.
        seed: Fixes folds and bootstrap.
        boots: Draws of the bootstrap.
    """

    harmful: Bool[np.ndarray, "examples"]
    train: Bool[np.ndarray, "examples"]
    test: Bool[np.ndarray, "examples"]
    clusters: Int[np.ndarray, "examples"] | None = None
    seed: int = 0
    boots: int = 1000

    def __post_init__(self) -> None:
        codes = group_codes(self.clusters, len(self.harmful))
        shared = len(np.intersect1d(codes[self.train], codes[self.test]))
        if shared:
            raise ValueError(f"{shared} clusters are on both sides of the split")
        for part in (self.train, self.test):
            check_labels(self.harmful[part], int(part.sum()))


@dataclass(frozen=True)
class ProbeResult:
    """How well one detector did on the test examples.

    Attributes:
        name: What it read.
        auroc: Area under the ROC curve.
        average_precision: Area under precision over recall; its chance level is `base_rate`.
        recall_at_1pct_fpr: Share of harmful examples found at 1 % false alarms.
        base_rate: Share of harmful examples in the test.
        inputs: How many columns it read.
        strength: The chosen C, the inverse of the penalty.
        converged: Whether the optimiser came to rest within its budget.
        scores: The log-odds it gave each test example.
        examples: Training and test examples.
    """

    name: str
    auroc: Interval
    average_precision: Interval
    recall_at_1pct_fpr: Interval
    base_rate: float
    inputs: int
    strength: float
    converged: bool
    scores: Float[np.ndarray, "test"]
    examples: tuple[int, int]


def probe_words(texts: Sequence[str], task: ProbeTask) -> ProbeResult:
    """Judge a bag of words: how far the vocabulary alone gives the label away.

    Counts of lower-cased words, without their order. Scripts that write without spaces, or glue
    particles to words (Chinese, Japanese, Korean, Thai, …), are cut into runs of 1 to 3 characters.

    Args:
        texts: What the model read, one an example.
        task: The labels and the split.

    Returns:
        The result.

    Raises:
        InputError: If no training text holds a word.
    """
    vectorizer = CountVectorizer(analyzer=bag_of_words, dtype=np.float64)
    train, test = (np.flatnonzero(part).tolist() for part in (task.train, task.test))
    try:
        learnt = vectorizer.fit_transform([texts[i] for i in train])
    except ValueError as error:
        raise InputError(
            f"none of the {len(train)} training texts holds a word.",
            then="Check data.text: it must name the column with the text.",
        ) from error
    asked = vectorizer.transform([texts[i] for i in test])
    return _judge("bag of words", csr_array(learnt), csr_array(asked), task)


def probe_dense(
    x: Float[np.ndarray, "examples d_in"], task: ProbeTask, *, name: str = "dense probe"
) -> ProbeResult:
    """Judge a linear probe on raw activations, each coordinate standardised on the training side.

    Args:
        x: One activation an example: a position's, or pooled over its tokens.
        task: The labels and the split.
        name: What the result is called.

    Returns:
        The result.
    """
    learnt, asked = x[task.train].astype(np.float64), x[task.test].astype(np.float64)
    mean, spread = learnt.mean(axis=0), learnt.std(axis=0)
    kept = spread > 1e-9 * np.abs(mean) + np.finfo(float).tiny
    learnt, asked = ((part[:, kept] - mean[kept]) / spread[kept] for part in (learnt, asked))
    return _judge(name, learnt, asked, task)


def probe_latents(pooled: Pooled, task: ProbeTask, *, name: str = "SAE latents") -> ProbeResult:
    """Judge a linear probe on all latents, each divided by its deviation on the training side.

    Args:
        pooled: One row an example; not centred, so that zeros stay zeros.
        task: The labels and the split.
        name: What the result is called.

    Returns:
        The result.
    """
    learnt, asked = _scaled(pooled, task)
    return _judge(name, learnt, asked, task)


def probe_k_sparse(pooled: Pooled, task: ProbeTask, *, k: int) -> ProbeResult:
    """Judge a probe on the k latents whose AUROC is furthest from ½ on the training side.

    Args:
        pooled: One row an example.
        task: The labels and the split.
        k: How many latents it may read.

    Returns:
        The result.
    """
    learnt, asked = _scaled(pooled, task)
    distance = np.abs(auroc(learnt, task.harmful[task.train]) - 0.5)
    best = np.argsort(-distance, kind="stable")[:k]
    name = f"{k} latent{'s' if k > 1 else ''}"
    return _judge(name, csr_array(learnt[:, best]), csr_array(asked[:, best]), task)


def bag_of_words(text: str) -> Iterator[str]:
    """Yield the words of a text, and runs of 1 to 3 characters where words have no spaces."""
    for word in "".join(map(_letter, unicodedata.normalize("NFKC", text).casefold())).split():
        if any(_unspaced(letter) for letter in word):
            for n in range(1, NGRAM + 1):
                yield from (word[i : i + n] for i in range(len(word) - n + 1))
        else:
            yield word


def _scaled(pooled: Pooled, task: ProbeTask) -> tuple[csr_array, csr_array]:
    rows = csr_array(as_columns(pooled))
    learnt, asked = csr_array(rows[task.train]), csr_array(rows[task.test])
    mean = np.asarray(learnt.mean(axis=0)).ravel()
    variance = np.asarray(learnt.power(2).mean(axis=0)).ravel() - mean**2
    kept = np.flatnonzero(variance > 1e-12 * mean**2 + np.finfo(float).tiny)
    scale = np.sqrt(variance[kept])
    result = []
    for part in (learnt, asked):
        columns = csr_array(part[:, kept])
        columns.data = columns.data / scale[columns.indices]
        result.append(columns)
    return result[0], result[1]


def _judge(name: str, learnt: Inputs, asked: Inputs, task: ProbeTask) -> ProbeResult:
    """Choose the penalty on folds of the training side, fit, and measure on the test side."""
    labels, truth = task.harmful[task.train], task.harmful[task.test]
    codes = group_codes(task.clusters, len(task.harmful))
    base_rate, sizes = float(truth.mean()), (len(labels), len(truth))
    if learnt.shape[1] == 0:
        scores, strength, converged = np.zeros(len(truth)), STRENGTHS[0], True
    else:
        strength = _choose(learnt, labels, codes[task.train], task.seed)
        scores, converged = _fit(learnt, labels, asked, strength)
    bootstrap = Bootstrap(len(truth), codes[task.test], boots=task.boots, seed=task.seed)
    intervals = bootstrap.ranking(scores, truth)
    return ProbeResult(
        name,
        **intervals,
        base_rate=base_rate,
        inputs=learnt.shape[1],
        strength=strength,
        converged=converged,
        scores=scores,
        examples=sizes,
    )


def _choose(x: Inputs, labels: np.ndarray, codes: np.ndarray, seed: int) -> float:
    """Return the strength whose mean log loss on the folds left out is the least."""
    smallest = min(len(np.unique(codes[labels == kind])) for kind in (True, False))
    if smallest < FOLDS:
        return 1.0  # too few prompt groups of a label for each fold to hold one
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    loss = np.zeros(len(STRENGTHS))
    for inner, outer in folds.split(np.zeros(len(labels)), labels, codes):
        if len(np.unique(labels[inner])) < 2:
            continue  # large clusters can leave a fold with one label
        sign = np.where(labels[outer], 1.0, -1.0)
        for i, strength in enumerate(STRENGTHS):
            scores, _ = _fit(x[inner], labels[inner], x[outer], strength)
            loss[i] += np.logaddexp(0.0, -sign * scores).mean()
    return STRENGTHS[int(np.argmin(loss))]


def _fit(
    x: Inputs, labels: np.ndarray, asked: Inputs, strength: float
) -> tuple[Float[np.ndarray, "asked"], bool]:
    model = LogisticRegression(C=strength, max_iter=STEPS)
    with warnings.catch_warnings():
        # Reported as ProbeResult.converged instead.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels)
    return np.asarray(model.decision_function(asked)), bool(model.n_iter_.max() < STEPS)


@lru_cache(maxsize=1 << 16)
def _letter(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMN" else " "


@lru_cache(maxsize=1 << 16)
def _unspaced(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(UNSPACED)
