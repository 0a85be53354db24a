"""`saefty annotate` as a test runs it."""

import json
from pathlib import Path

from typer.testing import CliRunner

import tiny_models
from annotation_truth import (
    save_random_sae,
)
from saefty import cli


def made_model(family: str, folder: Path, arch: str) -> Path:
    tiny_models.build(family, folder / "model", max_position_embeddings=512)
    for layer in (1, 2):
        save_random_sae(folder / f"layer_{layer}" / "sae", layer, arch, tiny_models.D_MODEL)
    return folder


def annotate(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, ["annotate", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def write(value: object, name: str = "in.json", **style) -> Path:
    path = Path(name)
    path.write_text(json.dumps(value, ensure_ascii=False, **style), encoding="utf-8")
    return path


def entries(path: Path, key: str) -> list[dict]:
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    return [one["sae_activations"][key] for q in value["results"] for one in q["variations"]]
