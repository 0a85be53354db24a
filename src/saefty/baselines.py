"""What the evidence on latents stands beside: probes on other inputs, and controls for luck.

A latent that tells harmful from harmless means little by itself: in a model that knows harm, a
random direction may tell it too. So the same question is put, on the same split, to the words
alone, to a dense probe, to a random SAE of the same shape and L0, to single neurons, and to
shuffled labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from saefty.controls import random_sae, raw_neurons
from saefty.evaluation import LatentEvaluation, evaluate_latents, shuffled_control
from saefty.metrics.intervals import LEVEL, Interval
from saefty.probes import (
    ProbeResult,
    ProbeTask,
    probe_dense,
    probe_k_sparse,
    probe_latents,
    probe_words,
)
from saefty.stores.activations import ActivationStore

Pooling = Literal["max", "mean", "sum", "last"]
DENSE_POOLINGS: tuple[Literal["mean", "last"], ...] = ("mean", "last")
SHUFFLES = 40


@dataclass(frozen=True)
class Labelled:
    """The examples an evaluation is about.

    Attributes:
        rows: Their places in the example table.
        texts: What the model read of each.
        harmful: Their labels.
        clusters: A code an example, equal for examples that belong together; None if all are apart.
        sources: A code an example for the dataset it came from; None if there is one.
        n_table: Length of the example table.
    """

    rows: Int[np.ndarray, "examples"]
    texts: tuple[str, ...]
    harmful: Bool[np.ndarray, "examples"]
    clusters: Int[np.ndarray, "examples"] | None
    sources: Int[np.ndarray, "examples"] | None
    n_table: int

    def owners(self, example: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "rows"]:
        """Return for each row of a store the place of its example here; -1 if it is not used."""
        place = np.full(self.n_table, -1)
        place[self.rows] = np.arange(len(self.rows))
        return place[example]


def task_of(data: Labelled, evaluation: LatentEvaluation, *, seed: int, boots: int) -> ProbeTask:
    """Return the probes' task: learn where latents were chosen, judge where they were reported."""
    return ProbeTask(
        data.harmful, evaluation.selection, evaluation.report, data.clusters, seed, boots
    )


def text_and_latent_probes(
    data: Labelled, pooled: csr_array, task: ProbeTask, k: int
) -> list[ProbeResult]:
    """Return the probes that need no activations: words, all latents, the k best latents."""
    return [
        probe_words(data.texts, task),
        probe_latents(pooled, task),
        probe_k_sparse(pooled, task, k=k),
    ]


def dense_probes(
    data: Labelled, store: ActivationStore, layer: int, where: str, task: ProbeTask
) -> list[ProbeResult]:
    """Return probes on raw activations of one layer: mean over tokens, and the last token."""
    return [
        probe_dense(
            pool_dense(data, store, layer, how), task, name=f"dense probe, {where}, {words}"
        )
        for how, words in zip(DENSE_POOLINGS, ("mean over tokens", "last token"), strict=True)
    ]


def luck_controls(
    data: Labelled,
    pooled: csr_array,
    store: ActivationStore | None,
    layer: int,
    *,
    d_sae: int,
    l0: float,
    how: Pooling,
    seed: int,
    permutations: int,
    boots: int,
    signed: bool = False,
) -> dict[str, Interval]:
    """Return the held-out AUROC of the best latent of each control, by name.

    Args:
        data: The examples.
        pooled: The trained SAE's pooled latents.
        store: Activations of the same examples; None leaves out what needs them.
        layer: The SAE's layer.
        d_sae: Its width.
        l0: Its mean L0 on the examples' tokens.
        how: How latents were pooled.
        seed: Fixes splits, directions and labellings.
        permutations: As for the SAE's own latents.
        boots: Draws of each bootstrap.
        signed: Whether its latents keep their sign.
    """
    shuffled = shuffled_control(
        pooled, data.harmful, data.clusters, data.sources, shuffles=SHUFFLES, seed=seed
    )
    low, high = np.quantile(shuffled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    method = f"spread over {SHUFFLES} labellings"
    found = {
        "shuffled labels": Interval(
            float(np.median(shuffled)), float(low), float(high), method, SHUFFLES
        )
    }
    if store is None:
        return found
    n = len(data.rows)
    directions = random_sae(
        activation_blocks(data, store, layer),
        n,
        d_sae=d_sae,
        k=max(1, round(l0)),
        center=mean_activation(data, store, layer),
        how=how,
        seed=seed,
        signed=signed,
    )
    neurons = raw_neurons(activation_blocks(data, store, layer), n, how=how)
    for name, control in (("random SAE", directions), ("raw neuron", neurons)):
        evaluation = evaluate_latents(
            control,
            data.harmful,
            data.clusters,
            data.sources,
            top=1,
            ranked_by="auroc",
            seed=seed,
            permutations=permutations,
            boots=boots,
        )
        if evaluation.best is not None:
            found[name] = evaluation.best.auroc
    return found


def activation_blocks(
    data: Labelled, store: ActivationStore, layer: int
) -> Iterator[tuple[Float[np.ndarray, "rows d_in"], Int[np.ndarray, "rows"]]]:
    """Yield the activations of the examples shard by shard, and the example of each row."""
    first, example = 0, store.rows()["example"]
    for piece in store.pieces:
        x = store.shard(layer, int(piece["piece"])).float().numpy()
        owner = data.owners(example[first : first + len(x)])
        first += len(x)
        used = owner >= 0
        yield x[used], owner[used]


def mean_activation(
    data: Labelled, store: ActivationStore, layer: int
) -> Float[np.ndarray, "d_in"]:
    """Return the mean activation over the tokens of the examples."""
    total, rows = np.zeros(store.d_in), 0
    for x, _ in activation_blocks(data, store, layer):
        total += x.sum(axis=0, dtype=np.float64)
        rows += len(x)
    return (total / max(rows, 1)).astype(np.float32)


def pool_dense(
    data: Labelled, store: ActivationStore, layer: int, how: Literal["max", "mean", "last"]
) -> Float[np.ndarray, "examples d_in"]:
    """Return one activation an example: the largest or mean over its tokens, or its last token's.

    An example without a token in the store has zeros.
    """
    pooled = np.full((len(data.rows), store.d_in), -np.inf if how == "max" else 0.0)
    tokens = np.zeros(len(data.rows))
    for x, owner in activation_blocks(data, store, layer):
        if how == "last":
            pooled[owner] = x  # rows lie in order, so the last token is written last
        elif how == "max":
            np.maximum.at(pooled, owner, x)
        else:
            np.add.at(pooled, owner, x)
        tokens += np.bincount(owner, minlength=len(tokens))
    if how == "mean":
        pooled /= tokens.clip(min=1)[:, None]
    pooled[tokens == 0] = 0.0
    return pooled


def names_to_codes(names: Sequence[str | None]) -> Int[np.ndarray, "examples"] | None:
    """Return a code an example, equal for equal names; None where nobody has a name.

    An example without a name stands alone.
    """
    if all(name is None for name in names):
        return None
    keys = [f"name {name}" if name is not None else f"row {i}" for i, name in enumerate(names)]
    return np.unique(keys, return_inverse=True)[1]
