"""Ctrl-C in a steering run: exit 130, and a line that resumes it to its end."""

import json
import shlex
import sys

import pytest
import torch
from typer.testing import CliRunner

import tiny_models
from saefty.cli import app
from saefty.interventions.vectors import SteeringVector
from saefty.records import Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae
from saefty.stages import effects, steer_compare, steer_sweep

SITE, MODEL = Site(1), str(tiny_models.folder_of("llama"))
JUDGED = ("judge=regex", "judge_options.pattern=o", "max_new_tokens=4")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    values = 3 * torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    SteeringVector(values, SITE, "caa", provenance={"model": MODEL}).save(folder / "v")
    sae = SaeConfig(arch="topk", d_in=tiny_models.D_MODEL, d_sae=48, k=6).build()
    sae.site = SITE
    save_sae(sae, folder / "sae")
    texts = ["the lazy dog", "Mix flour", "I can help", "the model reads"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "p.jsonl").write_text(lines)
    return folder


def words_of(world, command):
    common = [f"model.name={MODEL}", f"data.path={world / 'p.jsonl'}"]
    if command == "effects":
        return [*common, f"effects.sae={world / 'sae'}", "effects.vectors=20", "effects.rollouts=2",
                "effects.max_new_tokens=3", "effects.scale=2.0"]  # fmt: skip
    if command == "sweep":
        return [*common, *(f"steer.{word}" for word in JUDGED), f"steer.vector={world / 'v'}",
                "steer.alphas=[1,2]", "steer.methods=[1]"]  # fmt: skip
    return [*common, *(f"compare.{word}" for word in JUDGED), "compare.random=0",
            f"compare.vectors={{caa: {world / 'v'}}}", "compare.alphas=[0.5,1.0]"]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("sweep", steer_sweep, "write_sweep"),
        ("compare", steer_compare, "write_comparison"),
        ("effects", effects, "read_effects"),
    ],
)
def test_an_interrupted_run_prints_the_line_that_resumes_it(
    world, tmp_path, monkeypatch, command, module, name
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    words = ["steer", command, *words_of(world, command)]
    monkeypatch.setattr(sys, "argv", ["saefty", *words])
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 130, stopped.output
    assert "What was committed is safe" in stopped.stderr
    line = shlex.split(stopped.stderr.split("To resume: ")[1])
    assert line[: len(words) + 1] == ["saefty", *words]
    done = CliRunner().invoke(app, line[1:])
    assert done.exit_code == 0, done.output
    folder = tmp_path / line[-1].removeprefix("run.dir=")
    assert (folder / "finished.json").exists()
    assert len((folder / "journal.jsonl").read_text().splitlines()) == 2, "the same run"
