"""A folder with a tiny model, prompts, and one finished run of each stage, made once."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tiny_models
from pipeline import vision
from pipeline.forkserver import Commands

N_EXAMPLES = 40


@dataclass(frozen=True)
class World:
    """Where the finished runs lie, and how to start commands there."""

    saefty: Commands
    folder: Path
    model: Path
    prompts: Path
    extracted: Path
    trained: Path
    encoded: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage took."""

    @property
    def data(self) -> list[str]:
        """The words that name the model and the prompts."""
        return [
            f"model.name={self.model}", f"data.path={self.prompts}", "data.text=text",
            "data.label=label", "data.id=id",
        ]  # fmt: skip

    def extract(self, out: Path | str, *words: str) -> list[str]:
        """The command that made `extracted`: a store of 40 pieces, one an example."""
        return [
            "extract", *self.data, "extract.layers=[0,2]", "extract.save.shard_size=40",
            *words, f"run.dir={out}",
        ]  # fmt: skip

    def train(self, out: Path | str, *words: str) -> list[str]:
        """The command that made `trained`."""
        return [
            "train", f"train.store={self.extracted}", "sae.k=4", "train.max_steps=40",
            "train.batch_size=64", "train.checkpoint_every=10", *words, f"run.dir={out}",
        ]  # fmt: skip

    def encode(self, out: Path | str, *words: str) -> list[str]:
        """The command that made `encoded`."""
        return [
            "encode", f"encode.sae={self.trained}", *self.data, "encode.save.shard_size=40",
            *words, f"run.dir={out}",
        ]  # fmt: skip


def prompts(folder: Path, n: int = N_EXAMPLES) -> Path:
    path = folder / "prompts.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "text": f"How do I bake bread at home, number {i}? " + "Mix flour, water. " * (i % 4),
            "label": bool(i % 2),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def saefty(tmp_path_factory) -> Commands:
    commands = Commands(tmp_path_factory.mktemp("world"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def world(saefty) -> World:
    folder = saefty.cwd
    model = tiny_models.build("llama", folder / "llama")
    made = World(saefty, folder, model, prompts(folder), folder / "x", folder / "s", folder / "f")
    for stage, out in ("extract", "x"), ("train", "s"), ("encode", "f"):
        began = time.monotonic()
        result = saefty(*getattr(made, stage)(folder / out))
        assert result.code == 0, result.err
        made.seconds[stage] = time.monotonic() - began
    return made


@pytest.fixture(scope="session")
def memes(saefty, tmp_path_factory) -> vision.Memes:
    return vision.make(saefty, tmp_path_factory.mktemp("memes"))
