"""What tells harm where pictures and words make it together: every input judged by the same probes.

An activation store of a contrast holds δ = h_on − h_off, another h_on of the same tokens, so that
h_off is their difference. All detectors learn on half of the quartets and are judged on the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from saefty.baselines import Labelled, pool_dense
from saefty.evaluation_inputs import labelled_examples
from saefty.metrics.intervals import Interval
from saefty.metrics.splits import split_clusters
from saefty.plots.contrast_bars import Bar, Cell, ContrastBars, Kind
from saefty.probes import ProbeTask, probe_dense, probe_k_sparse, probe_words
from saefty.runs import Ledger
from saefty.sandbox.vision_model import PATCH
from saefty.sandbox.vision_world import Scene
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

LATENTS = (1, 2, 5)
How = Literal["mean", "last"]
HOWS: tuple[How, ...] = ("mean", "last")

ALONE, OFF, ON, DELTA = (
    "one half alone",
    "layer {layer}, OFF",
    "layer {layer}, ON",
    "layer {layer}, δ = ON − OFF",
)
NAMES = {"zero_attention": "attention returns zeros", "knockout": "image knocked out"}
DELTAS = {"zero_attention": "what attention adds", "knockout": "the image's share"}


@dataclass(frozen=True)
class Row:
    """How well one input tells the labels of held-out quartets.

    Attributes:
        kind: What it is.
        group: The heading it stands under.
        name: What the probe reads.
        auroc: Of the mean over the words, or of the whole input where it has no tokens.
        last: AUROC at the last token alone; None where there are no tokens to choose from.
    """

    kind: Kind
    group: str
    name: str
    auroc: Interval
    last: Interval | None = None


@dataclass(frozen=True)
class Stores:
    """What the stages left about the same examples.

    Attributes:
        on: Activations, no contrast, of the layer of interest and of the last layer.
        image: Activations of the last layer, the mean over the image's tokens.
        delta: δ of the layer of interest, by method.
        joint: δ of the last layer with the image knocked out in all layers.
        features: The latents of an SAE on δ, by method.
    """

    on: ActivationStore
    image: ActivationStore
    delta: Mapping[str, ActivationStore]
    joint: ActivationStore
    features: Mapping[str, FeatureStore]


def measure(
    stores: Stores, images: Mapping[str, Path], *, seed: int, boots: int = 1000
) -> tuple[list[Row], int]:
    """Return how well every input tells the labels, and on how many examples that was judged.

    Args:
        stores: What the stages left.
        images: The picture of each example, by its id.
        seed: Fixes split, folds and bootstrap.
        boots: Draws of each bootstrap.
    """
    data = labelled_examples(
        stores.on.examples(), Ledger(), drop_missing=False, section="eval", made_by="extract"
    )
    train, test = split_clusters(data.harmful, data.clusters, seed=seed)
    task = ProbeTask(data.harmful, train, test, data.clusters, seed, boots)
    (layer,), last = next(iter(stores.delta.values())).layers, stores.joint.layers[0]
    rows = _alone(stores, data, task, images, last)

    def add(kind: Kind, group: str, name: str, x: Mapping[How, np.ndarray]) -> None:
        found = {how: probe_dense(x[how], task).auroc for how in HOWS}
        rows.append(Row(kind, group.format(layer=layer), name, found["mean"], found["last"]))

    on = _states(data, stores.on, layer)
    delta = {method: _states(data, store, layer) for method, store in stores.delta.items()}
    for method, x in delta.items():
        add("off", OFF, NAMES[method], {how: on[how] - x[how] for how in HOWS})
    add("on", ON, "as it is", on)
    for method, x in delta.items():
        add("delta", DELTA, DELTAS[method], x)
    for method, features in stores.features.items():
        pooled = {how: features.pooled(layer, how)[data.rows] for how in HOWS}
        for k in LATENTS:
            found = {how: probe_k_sparse(pooled[how], task, k=k).auroc for how in HOWS}
            name = f"{k} latent{'s' if k > 1 else ''}"
            rows.append(Row("latents", f"SAE on δ, {DELTAS[method]}", name, *found.values()))
    return rows, int(test.sum())


def _alone(
    stores: Stores, data: Labelled, task: ProbeTask, images: Mapping[str, Path], last: int
) -> list[Row]:
    """Return what the words alone and the picture alone tell."""
    records = stores.on.examples()
    pixels = np.stack([patch_means(images[records[i]["example_id"]]) for i in data.rows])
    seen = pool_dense(data, stores.image, last, "mean")
    on, delta = _states(data, stores.on, last), _states(data, stores.joint, last)
    read = {how: probe_dense(on[how] - delta[how], task).auroc for how in HOWS}
    questions = [str(records[i]["prompt"]) for i in data.rows]
    return [
        Row("alone", ALONE, "words: bag of words", probe_words(questions, task).auroc),
        Row("alone", ALONE, f"words: state, layer {last}, no image", *read.values()),
        Row("alone", ALONE, "picture: pixels", probe_dense(pixels, task).auroc),
        Row("alone", ALONE, f"picture: image tokens, layer {last}", probe_dense(seen, task).auroc),
    ]


def _states(
    data: Labelled, store: ActivationStore, layer: int
) -> dict[How, Float[np.ndarray, "examples d_in"]]:
    return {how: pool_dense(data, store, layer, how) for how in HOWS}


def patch_means(path: Path) -> Float[np.ndarray, "values"]:
    """Return the mean colour of each patch that the model takes for a token, from 0 to 1."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    high, wide = (side // PATCH for side in pixels.shape[:2])
    return pixels.reshape(high, PATCH, wide, PATCH, 3).mean(axis=(1, 3)).ravel()


def checks(rows: Sequence[Row], accuracy: float) -> dict[str, bool]:
    """Return what the sandbox claims of itself, and whether these figures bear it out."""
    values: dict[str, list[Interval]] = {}
    for row in rows:
        values.setdefault(row.kind, []).extend([row.auroc, *([row.last] if row.last else [])])
    share = [row.auroc for row in rows if (row.kind, row.name) == ("delta", DELTAS["knockout"])]
    return {
        "the model answers and refuses rightly (at least 0.95)": accuracy >= 0.95,
        "one half alone tells nothing (at most 0.60)": _at_most(values["alone"], 0.60),
        "OFF tells nothing (at most 0.60)": _at_most(values["off"], 0.60),
        "the image's share of δ tells harm (at least 0.95)": all(
            one.estimate >= 0.95 for one in share
        ),
    }


def _at_most(intervals: Sequence[Interval], most: float) -> bool:
    return all(one.estimate <= most for one in intervals)


def picture(rows: Sequence[Row], scenes: Sequence[Scene], tested: int) -> ContrastBars:
    """Return what the picture shows: the mean over the words, beside one scene a cell."""
    cells: dict[tuple[int, int], Cell] = {}
    for scene in scenes:
        key = scene.colour_class, scene.noun_class
        cells.setdefault(key, Cell(scene.image, scene.noun, scene.harmful))
    return ContrastBars(
        "Harm is in what picture and words do together",
        tuple(Bar(row.kind, row.group, row.name, row.auroc) for row in rows),
        tuple(cells[key] for key in sorted(cells)),
        tested,
    )


def record(row: Row) -> dict[str, Any]:
    """Return a row as JSON values."""
    return {
        "kind": row.kind,
        "group": row.group,
        "name": row.name,
        "auroc": vars(row.auroc),
        "last": row.last and vars(row.last),
    }
