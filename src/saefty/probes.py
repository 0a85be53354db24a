"""Detectors of harm on different inputs, compared as a referee would: same split, seed and budget.

Four inputs, one learner. The words alone (what vocabulary gives away), the raw activations (what
the model knows), the SAE's latents (what the SAE kept of it) and the k best latents (what a person
could read). The learner is logistic regression with an L2 penalty; its strength is chosen from the
same five values, on the same three folds of the training clusters, for every input. Everything an
input needs (vocabulary, scales, the choice of k latents) is learnt on the training clusters only.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from saefty.errors import InputError
from saefty.linear import Linear
from saefty.metrics.alignment import auroc
from saefty.metrics.base import Pooled, as_columns, check_labels, group_codes
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.words import bag_of_words

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
FOLDS = 3
STEPS = 1000

Inputs = csr_array | np.ndarray


@dataclass(frozen=True)
class Scaling:
    """Which columns a probe reads, and how it scales them: all it learns before it weighs them.

    Attributes:
        columns: In the order in which they are read.
        center: What is taken from each; None takes nothing, and zeros stay zeros.
        scale: What each is divided by.
    """

    columns: Int[np.ndarray, "read"]
    center: Float[np.ndarray, "read"] | None
    scale: Float[np.ndarray, "read"]

    def apply(self, x: Inputs) -> Inputs:
        """Return the columns that are read, scaled."""
        if isinstance(x, np.ndarray):
            dense = x[:, self.columns]
            return (dense if self.center is None else dense - self.center) / self.scale
        sparse = csr_array(x[:, self.columns])
        sparse.data = sparse.data / self.scale[sparse.indices]
        return sparse

    def narrowed(self, kept: Int[np.ndarray, "kept"]) -> "Scaling":
        """Return the scaling of some of the columns."""
        center = None if self.center is None else self.center[kept]
        return Scaling(self.columns[kept], center, self.scale[kept])


Learn = Callable[[Inputs, Bool[np.ndarray, "train"]], Scaling]
"""Learns a scaling from the training rows of an input and their labels."""


Folds = list[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]
"""For each fold, the rows of the training side to learn from, and the rows that are left out."""


@dataclass(frozen=True)
class Fit:
    """What a probe learnt on the training side.

    Attributes:
        linear: What scores an input.
        strength: The chosen C, the inverse of the penalty.
        converged: Whether the optimiser came to rest within its budget.
        fold_loss: Mean log loss on the folds left out; NaN where there are too few clusters.
        held_out: For each training example the log-odds it got while it was left out; NaN where
            it never was.
    """

    linear: Linear
    strength: float
    converged: bool
    fold_loss: float
    held_out: Float[np.ndarray, "train"]


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
        linear: What it learnt on the training examples; for a bag of words a column is a word.
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
    linear: Linear


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
    return _judge("bag of words", csr_array(learnt), csr_array(asked), read_present, task)


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
    return _judge(name, learnt, asked, standardise, task)


def probe_latents(pooled: Pooled, task: ProbeTask, *, name: str = "SAE latents") -> ProbeResult:
    """Judge a linear probe on all latents, each divided by its deviation on the training side.

    Args:
        pooled: One row an example; not centred, so that zeros stay zeros.
        task: The labels and the split.
        name: What the result is called.

    Returns:
        The result.
    """
    rows = csr_array(as_columns(pooled))
    return _judge(name, rows[task.train], rows[task.test], divide_by_deviation, task)


def probe_k_sparse(pooled: Pooled, task: ProbeTask, *, k: int) -> ProbeResult:
    """Judge a probe on the k latents whose AUROC is furthest from ½ on the training side.

    Args:
        pooled: One row an example.
        task: The labels and the split.
        k: How many latents it may read.

    Returns:
        The result.
    """
    rows = csr_array(as_columns(pooled))
    return _judge(
        sparse_family(k), rows[task.train], rows[task.test], partial(read_best, k=k), task
    )


def sparse_family(k: int) -> str:
    """Return the name of the detectors that read k latents."""
    return f"{k} latent{'s' if k > 1 else ''}"


def standardise(x: Inputs, labels: Bool[np.ndarray, "train"]) -> Scaling:
    """Learn mean and deviation of each column; columns that do not vary are not read."""
    x = np.asarray(x)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    kept = np.flatnonzero(spread > 1e-9 * np.abs(mean) + np.finfo(float).tiny)
    return Scaling(kept, mean[kept], spread[kept])


def divide_by_deviation(x: Inputs, labels: Bool[np.ndarray, "train"]) -> Scaling:
    """Learn the deviation of each column, without a centre: zeros stay zeros."""
    rows = csr_array(x)
    mean = np.asarray(rows.mean(axis=0)).ravel()
    variance = np.asarray(rows.power(2).mean(axis=0)).ravel() - mean**2
    kept = np.flatnonzero(variance > 1e-12 * mean**2 + np.finfo(float).tiny)
    return Scaling(kept, None, np.sqrt(variance[kept]))


def read_best(x: Inputs, labels: Bool[np.ndarray, "train"], *, k: int) -> Scaling:
    """Learn which k columns have the AUROC that is furthest from ½, and their deviations."""
    scaling = divide_by_deviation(x, labels)
    distance = np.abs(auroc(scaling.apply(csr_array(x)), labels) - 0.5)
    return scaling.narrowed(np.argsort(-distance, kind="stable")[:k])


def read_present(x: Inputs, labels: Bool[np.ndarray, "train"]) -> Scaling:
    """Learn which columns hold anything, as a vocabulary is learnt; they keep their scale."""
    present = np.flatnonzero(np.asarray(abs(csr_array(x)).sum(axis=0)).ravel())
    return Scaling(present, None, np.ones(len(present)))


def make_folds(
    labels: Bool[np.ndarray, "train"], codes: Int[np.ndarray, "train"], seed: int = 0
) -> Folds:
    """Divide the training side by cluster, into rows to learn from and rows that are left out.

    Args:
        labels: The labels; both kinds must be present.
        codes: A code an example, equal for examples that belong together.
        seed: The same seed makes the same folds.

    Returns:
        Three folds, or fewer where large clusters leave one with a single label; none where a
        label has too few clusters for each fold to hold one.
    """
    smallest = min(len(np.unique(codes[labels == kind])) for kind in (True, False))
    if smallest < FOLDS:
        return []
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    return [
        (inner, outer)
        for inner, outer in folds.split(np.zeros(len(labels)), labels, codes)
        if len(np.unique(labels[inner])) == 2
    ]


def fit_probe(
    x: Inputs,
    labels: Bool[np.ndarray, "train"],
    folds: Folds,
    learn: Learn,
    *,
    nested: bool = True,
) -> Fit:
    """Choose the penalty on folds of the training side, then fit all of it.

    Args:
        x: The training rows of an input, all its columns.
        labels: The labels; both kinds must be present.
        folds: Of the training rows, from `make_folds`.
        learn: How the input is scaled, and which columns are read.
        nested: Learn the scaling again in each fold, so that the rows left out had no part in it.
            Scores held out and losses can then be compared between inputs; otherwise only between
            strengths.
    """
    scaling = learn(x, labels)
    scaled = scaling.apply(x)
    if scaled.shape[1] == 0:
        chosen = STRENGTHS[0], float(np.log(2.0)), np.zeros(len(labels))
    else:
        chosen = _choose(x if nested else scaled, labels, folds, learn if nested else _all)
    strength, loss, held_out = chosen
    weights, bias, converged = np.zeros(scaled.shape[1]), 0.0, True
    if scaled.shape[1]:
        model = _fitted(scaled, labels, strength)
        weights, bias = model.coef_[0], float(model.intercept_[0])
        converged = bool(model.n_iter_.max() < STEPS)
    order = np.argsort(scaling.columns)
    center = np.zeros(len(order)) if scaling.center is None else scaling.center
    linear = Linear(
        scaling.columns[order],
        center[order],
        scaling.scale[order],
        weights[order],
        bias,
        x.shape[1],
    )
    return Fit(linear, strength, converged, loss, held_out)


def measure_probe(
    name: str, fit: Fit, scores: Float[np.ndarray, "test"], task: ProbeTask
) -> ProbeResult:
    """Return how well a fitted probe did, from the scores it gave the test examples."""
    truth = task.harmful[task.test]
    codes = group_codes(task.clusters, len(task.harmful))
    bootstrap = Bootstrap(len(truth), codes[task.test], boots=task.boots, seed=task.seed)
    intervals = bootstrap.ranking(scores, truth)
    return ProbeResult(
        name,
        **intervals,
        base_rate=float(truth.mean()),
        inputs=len(fit.linear.columns),
        strength=fit.strength,
        converged=fit.converged,
        scores=scores,
        examples=(int(task.train.sum()), len(truth)),
        linear=fit.linear,
    )


def _judge(name: str, learnt: Inputs, asked: Inputs, learn: Learn, task: ProbeTask) -> ProbeResult:
    """Fit on the training side, and measure on the test side."""
    labels = task.harmful[task.train]
    codes = group_codes(task.clusters, len(task.harmful))[task.train]
    fit = fit_probe(learnt, labels, make_folds(labels, codes, task.seed), learn, nested=False)
    return measure_probe(name, fit, fit.linear.score(asked), task)


def _all(x: Inputs, labels: np.ndarray) -> Scaling:
    columns = np.arange(x.shape[1])
    return Scaling(columns, None, np.ones(len(columns)))


def _choose(
    x: Inputs, labels: np.ndarray, folds: Folds, learn: Learn
) -> tuple[float, float, Float[np.ndarray, "train"]]:
    """Return the strength whose mean log loss on the folds left out is the least."""
    unknown = np.full(len(labels), np.nan)
    if not folds:
        return 1.0, float("nan"), unknown
    loss = np.zeros(len(STRENGTHS))
    held_out = np.tile(unknown, (len(STRENGTHS), 1))
    for inner, outer in folds:
        sign = np.where(labels[outer], 1.0, -1.0)
        scaling = learn(x[inner], labels[inner])
        seen, left_out = scaling.apply(x[inner]), scaling.apply(x[outer])
        for i, strength in enumerate(STRENGTHS):
            if seen.shape[1]:
                scores = _fitted(seen, labels[inner], strength).decision_function(left_out)
            else:
                scores = np.zeros(len(outer))
            held_out[i, outer] = scores
            loss[i] += np.logaddexp(0.0, -sign * scores).mean()
    best = int(np.argmin(loss))
    return STRENGTHS[best], float(loss[best] / len(folds)), held_out[best]


def _fitted(x: Inputs, labels: np.ndarray, strength: float) -> LogisticRegression:
    model = LogisticRegression(C=strength, max_iter=STEPS)
    with warnings.catch_warnings():
        # Reported as ProbeResult.converged instead.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, labels)
