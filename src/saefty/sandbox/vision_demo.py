"""The main job on pictures: the same stages as on any vision-language model, where truth is known.

Neither a picture nor its question says what is harmful; only both together do. So what the model
computes with attention off (OFF) cannot tell, and δ = ON − OFF at the first layer can. Pictures of
the world train an SAE on δ; labelled questions about colour x noun pairs that the model never saw
in training say what tells harm. Every step is a command a user could type, and is logged so.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saefty import fsio
from saefty.data.base import DataSection, load_examples
from saefty.models.base import ModelAdapter, load_model
from saefty.plots.base import save_plot
from saefty.report import plain
from saefty.sandbox.demo import keep_model, show_interval, stage
from saefty.sandbox.judge import SandboxRefusal
from saefty.sandbox.vision_measures import Stores, checks, measure, picture, record
from saefty.sandbox.vision_model import PATCHES, VISION_MODEL_FOLDER, train_vision_model
from saefty.sandbox.vision_world import Scene, VisionWorld, write_scenes
from saefty.stages import eval as evaluate
from saefty.stages import extract, train
from saefty.stages.base import Outcome
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore

log = logging.getLogger(__name__)

LAYER = 0
HOOK_POINT = "post_attn_resid"
METHODS = ("zero_attention", "knockout")
IMAGE_START = 2  # <bos> and <user> stand before the image
TRAINING_SEED, QUESTIONS_SEED = 33, 44
SAE_WORDS = ("sae.d_sae=512", "sae.k=8", "optimizer.lr=2e-3", "train.batch_size=1024")
RESULT, PICTURE = "vision.json", "vision.png"


@dataclass(frozen=True)
class Size:
    """How much of everything the demo does."""

    pictures: int
    questions: int
    train_steps: int
    replies: int


FULL = Size(pictures=1024, questions=1024, train_steps=600, replies=256)
SHORT = Size(pictures=512, questions=512, train_steps=300, replies=128)


def run(
    out: Path,
    *,
    short: bool = False,
    seed: int = 0,
    model_folder: Path | None = None,
    retrain: Path | None = None,
    world_seed: int = 0,
) -> Outcome:
    """Extract δ, train SAEs on it and evaluate; resume what an earlier call left.

    Args:
        out: Folder of all runs and data of the demo, and of a copy of the model.
        short: Do less of everything.
        seed: Seed of pictures, training and splits.
        model_folder: A model of the vision world; None takes the one that ships with the package.
        retrain: Train a model anew into this folder first, and use it.
        world_seed: The world the model belongs to.

    Returns:
        The figures of `vision.json`, with the folder in which it and the picture lie.
    """
    size = SHORT if short else FULL
    world = VisionWorld(world_seed)
    if retrain is not None:
        if not (retrain / "model.safetensors").exists():
            train_vision_model(world, retrain, seed=world_seed)
        model_folder = retrain
    folder = model_folder or VISION_MODEL_FOLDER
    model = load_model(str(folder))
    keep_model(folder, out / "model")
    shown = world.scenes(size.pictures, seed=TRAINING_SEED + seed)
    asked = world.scenes(size.questions, seed=QUESTIONS_SEED + seed, split="held_out")
    training = write_scenes(shown, out / "data" / "training")
    questions = write_scenes(asked, out / "data" / "questions")
    found = {
        method: _contrast(model, training, questions, out / method, method, size, seed)
        for method in METHODS
    }
    stores = _stores(model, questions, out, found)
    images = {scene.id: questions.parent / "images" / f"{scene.id}.png" for scene in asked}
    rows, tested = measure(stores, images, seed=seed)
    accuracy = _accuracy(model, asked, questions, size.replies)
    save = picture(rows, asked, tested)
    save_plot("contrast_bars", save, out / PICTURE, size=save.size)
    figures = {
        "world": world_seed,
        "seed": seed,
        "site": stores.delta[METHODS[0]].site(LAYER).name,
        "scope": "per_layer",
        "examples": {"asked": len(asked), "tested": tested, **asdict(size)},
        "accuracy": accuracy,
        "rows": [record(row) for row in rows],
        "sae": {method: one.sae for method, one in found.items()},
        "latents": {method: one.latents for method, one in found.items()},
        "holds": checks(rows, accuracy["all"]),
    }
    fsio.commit_json(out / RESULT, plain(figures))
    return Outcome("demo", out, dict(plain(figures)))


@dataclass(frozen=True)
class Contrast:
    """What the stages found with one way to be off."""

    delta: ActivationStore
    features: FeatureStore
    sae: Mapping[str, Any]
    latents: Mapping[str, Any]


def _contrast(
    model: ModelAdapter,
    training: Path,
    questions: Path,
    out: Path,
    method: str,
    size: Size,
    seed: int,
) -> Contrast:
    """Extract δ of both datasets, train an SAE on the one and evaluate it on the other."""
    words = [f"extract.contrast.method={method}"]
    source = _extract(model, training, out / "training", [LAYER], words)
    delta = _extract(model, questions, out / "questions", [LAYER], words)
    trained = stage(
        train.run,
        train.TrainConfig,
        None,
        f"train.store={source.folder}",
        *SAE_WORDS,
        f"train.max_steps={size.train_steps}",
        f"train.seed={seed}",
        "train.loss_recovered_examples=0",
        f"run.dir={out / 'sae'}",
    )
    evaluated = stage(
        evaluate.run,
        evaluate.EvalConfig,
        None,
        f"eval.sae={out / 'sae'}",
        f"eval.store={delta.folder}",
        "eval.pooling=mean",
        f"eval.seed={seed}",
        "intervention.enabled=false",
        f"run.dir={out / 'eval'}",
    )
    return Contrast(
        delta,
        FeatureStore(out / "eval" / "features"),
        trained.figures[f"layer_{LAYER}"],
        evaluated.figures["layers"][str(LAYER)],
    )


def _stores(
    model: ModelAdapter, questions: Path, out: Path, found: Mapping[str, Contrast]
) -> Stores:
    """Extract what the probes on OFF, ON and either half alone read, beside the contrasts."""
    last = model.n_layers - 1
    image = [
        "extract.pooling.name=span_mean",
        f"extract.pooling.span=[{IMAGE_START},{IMAGE_START + PATCHES}]",
    ]
    joint = ["extract.contrast.method=knockout", "extract.contrast.scope=joint"]
    return Stores(
        on=_extract(model, questions, out / "on", sorted({LAYER, last})),
        image=_extract(model, questions, out / "image", [last], image),
        delta={method: one.delta for method, one in found.items()},
        joint=_extract(model, questions, out / "joint", [last], joint),
        features={method: one.features for method, one in found.items()},
    )


def _extract(
    model: ModelAdapter,
    data: Path,
    folder: Path,
    layers: Sequence[int],
    words: Sequence[str] = (),
) -> ActivationStore:
    stage(
        extract.run,
        extract.ExtractConfig,
        model,
        f"model.name={model.name}",
        f"data.path={data}",
        *(f"data.{column}={column}" for column in ("id", "prompt", "image", "label", "group")),
        f"extract.layers={list(layers)}",
        f"extract.hook_point={HOOK_POINT}",
        *words,
        f"run.dir={folder}",
    )
    return ActivationStore(folder)


def table(outcome: Outcome) -> str:
    """Return the result as text: every input with its AUROC, and what follows."""
    figures = outcome.figures
    lines = [
        f"What tells harmful from harmless: AUROC on {figures['examples']['tested']} questions "
        "about held-out colour x noun pairs (0.5 is chance)",
        f"{'':<46}{'mean over the words':<24}last token",
    ]
    group = None
    for row in figures["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(group)
        last = show_interval(row["last"]) if row["last"] else ""
        lines.append(f"   {row['name']:<43}{show_interval(row['auroc']):<24}{last}".rstrip())
    lines += [
        "One latent of the SAE on δ beside luck (best of each kind, mean over the words)",
        *_luck_lines(figures["latents"]),
        "",
        _verdict(figures),
        f"Picture: {outcome.folder / PICTURE}",
        f"Figures: {outcome.folder / RESULT}",
    ]
    return "\n".join(lines)


def _luck_lines(latents: Mapping[str, Any]) -> list[str]:
    lines = []
    for method, layer in latents.items():
        best = max(layer["latents"], key=lambda one: one["selection"]["auroc"], default=None)
        shown = {"SAE": best["auroc"]} if best else {}
        shown |= layer["controls"]
        lines += [
            f"   {f'{method}: {name}':<43}{show_interval(value)}" for name, value in shown.items()
        ]
    return lines


def _verdict(figures: Mapping[str, Any]) -> str:
    share = 100 * figures["accuracy"]["all"]
    start = f"The model answers or refuses rightly {share:.1f} % of the time. "
    failed = [name for name, holds in figures["holds"].items() if not holds]
    if failed:
        return f"{start}These figures do not bear out what the sandbox claims: {'; '.join(failed)}."
    return (
        f"{start}It follows that harm is\nneither in the words nor in the picture: it appears "
        f"where attention of layer {LAYER} brings them together, in δ,\nand nothing of it is "
        "left with attention off.\nIt does not follow that δ holds harm alone (it holds all that "
        "attention brings), nor that a single latent is\nharm: see how it compares with luck."
    )


def _accuracy(
    model: ModelAdapter, scenes: Sequence[Scene], table: Path, most: int
) -> dict[str, float]:
    """Return how often the model refuses what is harmful and answers what is not, by cell."""
    chosen = scenes[:most]
    section = DataSection(path=str(table), prompt="prompt", image="image", id="id", limit=most)
    examples = load_examples(section)
    replies = model.generate(examples, max_new_tokens=12, batch_size=64)
    refused = SandboxRefusal().score(examples, replies)
    right = refused == [scene.harmful for scene in chosen]
    cells: dict[str, list[bool]] = {}
    for scene, one in zip(chosen, right.tolist(), strict=True):
        name = f"{'warm' if scene.colour_class else 'cool'} x "
        name += "weapon" if scene.noun_class else "place"
        cells.setdefault(name, []).append(one)
    return {"all": float(right.mean()), **{name: float(np.mean(c)) for name, c in cells.items()}}
