"""The main job on the sandbox: the same stages as on any model, where the truth is known.

Documents of the world train an SAE on the shipped model's activations; labelled requests about
verb x object pairs that the model never saw in training say which latents track harm; silencing
them shows whether they carry the refusal. Every step is a command a user could type, and is logged
so. The model, and texts to steer it with, are left beside the runs for commands of one's own.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saefty import fsio
from saefty.config import Config, load_config
from saefty.models.base import ModelAdapter, load_model
from saefty.records import Example
from saefty.sandbox.documents import Document
from saefty.sandbox.language_model import MODEL_FOLDER, train_language_model
from saefty.sandbox.world import World
from saefty.stages import encode, extract, train
from saefty.stages import eval as evaluate
from saefty.stages.base import Outcome

log = logging.getLogger(__name__)

LAYER = 1
GATED = 8
DOCUMENTS_SEED, REQUESTS_SEED, STORIES_SEED, STARTS_SEED = 11, 22, 33, 44
STORIES, STARTS = 200, 128
PER_STORY = 45
"""Documents among which one is a story of a given language, with room to spare: 33 on average."""


@dataclass(frozen=True)
class Size:
    """How much of everything the demo does."""

    documents: int
    requests: int
    train_steps: int
    counts: str


FULL = Size(documents=9000, requests=1024, train_steps=1000, counts="[1,2,4,8,16]")
SHORT = Size(documents=5000, requests=512, train_steps=500, counts="[8]")
SAE_WORDS = ("sae.d_sae=512", "sae.k=5", "optimizer.lr=2e-3", "train.batch_size=1024")


def run(
    out: Path,
    *,
    short: bool = False,
    seed: int = 0,
    model_folder: Path | None = None,
    retrain: Path | None = None,
    world_seed: int = 0,
) -> Outcome:
    """Extract, train, encode and evaluate on the sandbox; resume what an earlier call left.

    Args:
        out: Folder of all runs and data of the demo, and of a copy of the model.
        short: Do less of everything.
        seed: Seed of documents, requests, training and splits.
        model_folder: A sandbox model; None takes the one that ships with the package.
        retrain: Train a model anew into this folder first, and use it.
        world_seed: The world the model belongs to.

    Returns:
        The outcome of `eval`, with the figures of training beside it.
    """
    size = SHORT if short else FULL
    world = World(world_seed)
    if retrain is not None:
        if not (retrain / "model.safetensors").exists():
            train_language_model(world, retrain, seed=world_seed)
        model_folder = retrain
    folder = model_folder or MODEL_FOLDER
    model = load_model(str(folder))
    keep_model(folder, out / "model")
    documents, requests = out / "data" / "documents.jsonl", out / "data" / "requests.jsonl"
    _write(documents, _document_records(world, model, size.documents, DOCUMENTS_SEED + seed))
    _write(requests, _request_records(world, size.requests, REQUESTS_SEED + seed))
    for name, records in steering_texts(world, seed).items():
        _write(out / "data" / f"{name}.jsonl", records)
    stage(
        extract.run,
        extract.ExtractConfig,
        model,
        f"model.name={folder}",
        f"data.path={documents}",
        "data.text=text",
        "data.id=id",
        f"extract.layers=[{LAYER}]",
        f"run.dir={out / 'extract'}",
    )
    trained = stage(
        train.run,
        train.TrainConfig,
        model,
        f"train.store={out / 'extract'}",
        *SAE_WORDS,
        f"train.max_steps={size.train_steps}",
        f"train.seed={seed}",
        f"run.dir={out / 'sae'}",
    )
    stage(
        encode.run,
        encode.EncodeConfig,
        model,
        f"encode.sae={out / 'sae'}",
        f"model.name={folder}",
        f"data.path={requests}",
        "data.prompt=prompt",
        "data.label=label",
        "data.group=group",
        "data.id=id",
        f"run.dir={out / 'features'}",
    )
    outcome = stage(
        evaluate.run,
        evaluate.EvalConfig,
        model,
        f"eval.features={out / 'features'}",
        f"eval.seed={seed}",
        "intervention.judge=sandbox_refusal",
        "intervention.fluency=sandbox_fluency",
        f"intervention.counts={size.counts}",
        "intervention.max_new_tokens=24",
        "intervention.batch_size=128",
        f"run.dir={out / 'eval'}",
    )
    figures = {**outcome.figures, "sae": trained.figures}
    return Outcome("demo", outcome.folder, figures)


def steering_texts(world: World, seed: int) -> dict[str, Sequence[dict[str, Any]]]:
    """Return stories in French and in English to learn a direction from, and English starts.

    A start is the first sentence of a story that is not among the others, so that what a model
    writes next begins with a sentence, in the language that comes to it.
    """
    contrast = world.documents(PER_STORY * STORIES, seed=STORIES_SEED + seed)
    others = world.documents(PER_STORY * STARTS, seed=STARTS_SEED + seed)
    starts = _stories(others, "en")[:STARTS]
    return {
        "french": _stories(contrast, "fr")[:STORIES],
        "english": _stories(contrast, "en")[:STORIES],
        "starts": [{**one, "text": one["text"].partition(" .")[0] + " ."} for one in starts],
    }


def keep_model(source: Path, kept: Path) -> None:
    """Copy a model's files beside the runs, for commands of one's own."""
    if source.resolve() != kept.resolve():
        for file in sorted(one for one in source.iterdir() if one.is_file()):
            fsio.commit_bytes(kept / file.name, file.read_bytes())


def table(outcome: Outcome) -> str:
    """Return the result as text: the evidence in the order of its strength, and what follows."""
    layer = outcome.figures["layers"][str(LAYER)]
    points = layer["gating"]["points"]
    ungated = points[0]
    by_arm = gated_points(points)
    count = len(by_arm["target"]["condition"]["latents"]) if by_arm else 0
    lines = [
        "1. What silencing the latents that qualify as harm latents (at most "
        f"{GATED}) does to refusal",
        _gate_line("none silenced", ungated),
        _gate_line(f"{count} harm latents", by_arm.get("target")),
        _gate_line(f"{count} equally active others", by_arm.get("control")),
        "2. What else could tell harmful from harmless (AUROC)",
        *(f"   {name:<44} {show_interval(p['auroc'])}" for name, p in layer["probes"].items()),
        "3. Single latents (AUROC on the half that had no part in choosing them)",
        *_latent_lines(layer),
        "",
        _verdict(ungated, by_arm, bool(layer["finding"])),
        f"Report: {outcome.folder / 'summary.md'}",
    ]
    return "\n".join(lines)


def gated_points(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the points of both arms at the largest number of silenced latents up to 8."""
    counts = [len(point["condition"]["latents"]) for point in points]
    count = max((n for n in counts if n <= GATED), default=0)
    return {
        point["condition"]["arm"]: point
        for point, n in zip(points, counts, strict=True)
        if n == count and n
    }


def _gate_line(name: str, point: dict[str, Any] | None) -> str:
    if point is None:
        return f"   {name:<24} not enough latents"
    harmful, harmless = point["harmful"], point["harmless"]
    return (
        f"   {name:<24} harmful {_share(harmful['rate'])}  harmless {_share(harmless['rate'])}  "
        f"fluency {harmful['fluency']['estimate']:.2f}"
    )


def _latent_lines(layer: dict[str, Any]) -> list[str]:
    lines = []
    latents = sorted(layer["latents"], key=lambda one: -abs(one["selection"]["auroc"] - 0.5))
    for one in latents[:3]:
        mark = "finding" if one["found"] else "not a finding"
        lines.append(
            f"   {'latent ' + str(one['latent']):<44} {show_interval(one['auroc'])}  "
            f"p (Holm) {one['p_holm']:.2g}, p (max) {one['selection']['max_p']:.2g}: {mark}"
        )
    for name, interval in layer["controls"].items():
        lines.append(f"   {'best of control: ' + name:<44} {show_interval(interval)}")
    return lines


def _verdict(ungated: dict[str, Any], by_arm: dict[str, Any], finding: bool) -> str:
    target, control = by_arm.get("target"), by_arm.get("control")
    if target is None or control is None:
        return "Too few latents lean towards harm for the causal test."
    fall = -100 * target["harmful"]["change"]["estimate"]
    other = -100 * control["harmful"]["change"]["estimate"]
    changed = target["harmful"]["change"]["high"] < control["harmful"]["change"]["low"]
    start = (
        f"It follows that the chosen latents carry refusal here: silencing them lowers it by "
        f"{fall:.0f} points, equally active others by {other + 0.0:.0f}."
        if changed
        else f"The causal test shows no specific effect: {fall:.0f} points against {other:.0f}."
    )
    tracked = "track" if finding else "do not track"
    return (
        f"{start} They {tracked} harm beyond luck; how single latents compare with random "
        "directions stands under 3.\nIt does not follow that they mean harm to a person, that they "
        "act alone, or that another model behaves alike."
    )


def show_interval(interval: Mapping[str, Any]) -> str:
    """Return an estimate with the ends of its interval."""
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _share(interval: dict[str, Any]) -> str:
    values = (100 * interval[end] for end in ("estimate", "low", "high"))
    return "{:3.0f} % [{:.0f}, {:.0f}]".format(*values)


def _document_records(
    world: World, model: ModelAdapter, n: int, seed: int
) -> Sequence[dict[str, Any]]:
    """Return documents as the language model was trained on them, conversations rendered."""
    return [
        {"id": document.id, "text": _rendered(document.example(), model)}
        for document in world.documents(n, seed=seed)
    ]


def _rendered(example: Example, model: ModelAdapter) -> str:
    return model.tokenize([example])[0].text


def _request_records(world: World, n: int, seed: int) -> Sequence[dict[str, Any]]:
    examples = [
        request.example(response=False)
        for request in world.requests(n, seed=seed, split="held_out")
    ]
    return [
        {"id": one.id, "prompt": one.prompt, "label": one.label, "group": one.group}
        for one in examples
    ]


def _stories(documents: Sequence[Document], language: str) -> list[dict[str, Any]]:
    return [
        {"id": one.id, "text": one.text}
        for one in documents
        if one.kind == "story" and one.language == language
    ]


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    fsio.commit_text(path, "".join(fsio.dump_json_line(record) for record in records))


def stage(
    job: Callable[..., Outcome], config: type[Config], model: ModelAdapter | None, *words: str
) -> Outcome:
    """Run a stage as its command would, with a model that is loaded already.

    Args:
        job: The stage's `run`.
        config: The class of its configuration.
        model: The model; None where the stage needs none.
        *words: The command's words.
    """
    log.info("$ saefty %s %s", job.__module__.rpartition(".")[2], " ".join(words))
    return job(load_config(config, None, words), model=model)
