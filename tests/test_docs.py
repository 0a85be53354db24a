"""The README's lines run, on the sandbox's model in the place of a large one."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from saefty import fsio
from saefty.config import load_config
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.world import World

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGE = "google/gemma-2-2b-it"
QUICK = {
    "train": ["train.max_steps=60", "train.batch_size=256"],
    "eval": ["eval.permutations=200", "eval.boots=200", "intervention.max_new_tokens=8",
             "intervention.counts=[1]", "intervention.prompts=16"],
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the README's two files, made of the sandbox's documents and requests."""
    folder = tmp_path_factory.mktemp("readme")
    world = World(0)
    texts = [{"text": document.text} for document in world.documents(200, seed=1)]
    requests = [one.example(response=False) for one in world.requests(160, seed=1)]
    prompts = [{"prompt": one.prompt, "label": one.label, "topic": one.group} for one in requests]
    for name, rows in (("texts", texts), ("prompts", prompts)):
        fsio.commit_text(folder / f"{name}.jsonl", "".join(map(fsio.dump_json_line, rows)))
    return folder


def here(text: str) -> str:
    """Put the sandbox's model and a layer that it has in the place of the README's."""
    for old, new in (
        (LARGE, str(MODEL_FOLDER)),
        ("layers=[12]", "layers=[2]"),
        ("layer=12", "layer=2"),
    ):
        text = text.replace(old, new)
    return text


def test_the_readmes_commands_run_in_their_order(folder):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(here(line)) for line in lines if line.startswith("saefty ")]
    assert [command[1] for command in commands] == ["extract", "train", "encode", "eval"]
    for command in commands:
        words = [*command[1:], *QUICK.get(command[1], [])]
        done = subprocess.run(
            [sys.executable, "-m", "saefty", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "eval" / "summary.md").is_file()


def test_the_readmes_python_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = blocks("python")
    code = here(code).replace("runs/", "python/")
    code = code.replace("arch=", 'train={"max_steps": 60, "batch_size": 256}, arch=')
    exec(compile(code, "README.md", "exec"), {})
    assert "[" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name
)
def test_every_link_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("stage", ["extract", "train", "encode", "eval"])
def test_every_shipped_configuration_loads(stage):
    module = importlib.import_module(f"saefty.stages.{stage}")
    config_class = getattr(module, f"{stage.capitalize()}Config")
    assert load_config(config_class, ROOT / "configs" / f"{stage}.yaml").run.dir is not None
