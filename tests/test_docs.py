"""What the README and the pages under docs/ say to type runs, on the sandbox's model.

The commands of a page run in their order, in one folder that holds the two files they name, with
sizes cut down by further words. Reference pages are compared with the code they are made from.
"""

import csv
import importlib
import importlib.util
import json
import re
import shlex
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from annotation_truth import save_random_sae
from fault_server import Endpoint, serving
from saefty import cli, fsio
from saefty.config import load_config
from saefty.sandbox import demo, vision_demo
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.vision_model import VISION_MODEL_FOLDER, VISION_REFERENCE
from saefty.sandbox.world import World
from vision_data import write_memes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = [page for page in PAGES if page.stem.endswith((".ko", ".ru"))]
"""Pages with the commands of their English ones; those in Japanese have texts of their own."""
REFERENCE = ROOT / "docs" / "reference"
LARGE = "google/gemma-2-2b-it"
RELEASE = "gemma-scope-2b-pt-res-canonical"
"""A release that the pages name; here it is a folder with SAEs of random weights."""
LAYERS = {
    "0": "0",
    "1": "1",
    "2": "2",
    "4": "1",
    "6": "1",
    "11": "1",
    "12": "2",
    "13": "3",
    "18": "3",
}
"""A layer that the pages name -> one that the sandbox's model has."""
LATENT = "12332"
"""A latent that a page names; here it is one that the folder's SAEs have."""
JUDGE = "model: gpt-4o-mini"
"""A judge that a page names; here it is a server on this machine."""
QUICK = {
    "extract": ["engine.workers=1", "engine.threads=null"],
    "train": ["train.max_steps=4", "train.batch_size=128", "train.loss_recovered_examples=4",
              "sae.d_sae=128"],
    "eval": ["eval.permutations=100", "eval.boots=100", "intervention.max_new_tokens=2",
             "intervention.counts=1", "intervention.prompts=8"],
    "probe": ["probe.permutations=100", "probe.boots=100"],
    "steer generate": ["--max-new-tokens", "4"],
    "steer effects": ["effects.vectors=40", "effects.rollouts=8", "effects.max_new_tokens=4"],
    "steer sweep": ["data.limit=4", "steer.alpha_count=2", "steer.boots=100", "steer.coverage=0",
                    "steer.max_new_tokens=8"],
    "steer compare": ["data.limit=12", "harmless.limit=4", "compare.random=1", "compare.boots=100",
                      "compare.permutations=100", "compare.coverage=0", "compare.alphas=[0.5,1]",
                      "compare.max_new_tokens=12"],
}  # fmt: skip
SMALL = demo.Size(documents=900, requests=128, train_steps=80, counts="[1]")
"""What `saefty demo` on a page does here."""
SMALL_VISION = vision_demo.Size(pictures=32, questions=64, train_steps=20, replies=4)
IMAGES = {
    "AIML-TUDA/LlavaGuard-v1.2-7B-OV-hf": str(VISION_MODEL_FOLDER),
    "device_map: auto": "device_map: null",
    "name: meme_safety_bench": "name: meme_safety_bench\n  path: memes/memes.jsonl",
    "data.name=meme_safety_bench": "data.name=meme_safety_bench data.path=memes/memes.jsonl",
}
"""What the guide to images and its configurations name, and what stands for it here."""
NOT_HERE = ("sae_lens", 'load_sae("google/')
"""What marks Python that needs another package, or weights from the hub."""
QUICK_TRAINING = 'train={"max_steps": 4, "batch_size": 128, "loss_recovered_examples": 4}, arch='


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("saefty ")]


def written_files(page: Path) -> dict[str, str]:
    """Return the configurations that a page says to write: their first line is their name."""
    found = {block.partition("\n")[0]: block for block in blocks(page, "yaml")}
    return {line.removeprefix("# "): text for line, text in found.items() if line[:2] == "# "}


def settings(page: Path) -> dict[str, Any]:
    """Return what these say, whatever the language of their comments."""
    return {name: yaml.safe_load(text) for name, text in written_files(page).items()}


def python_blocks(page: Path) -> list[str]:
    """Return the page's Python, save what cannot run here."""
    return [code for code in blocks(page, "python") if not any(word in code for word in NOT_HERE)]


def here(text: str) -> str:
    """Put the sandbox's model and layers that it has in the place of a page's."""

    def renumbered(match: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda number: LAYERS[number[0]], match[0])

    text = re.sub(r"(layers?[= ]|layer_?)['\"]?\[?\d+(, ?\d+)*", renumbered, text)
    text = text.replace(RELEASE, "saes")
    text = text.replace(LATENT, "12")
    for named, one in IMAGES.items():
        text = text.replace(named, one)
    return re.sub(rf"{LARGE}|(?<=model\.name=)FOLDER", str(MODEL_FOLDER), text)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Work in a folder with the pages' files, of the sandbox's documents and requests, and SAEs."""
    world = World(0)
    texts = [{"text": document.text} for document in world.documents(40, seed=1)]
    requests = [one.example(response=False) for one in world.requests(32, seed=1)]
    prompts = [
        {"prompt": one.prompt, "label": one.label, "topic": one.group,
         "dataset": "ab"[i % 2], "kind": "xy"[i // 2 % 2]}
        for i, one in enumerate(requests)
    ]  # fmt: skip
    for name, rows in (("texts", texts), ("prompts", prompts), ("new", prompts[:4])):
        fsio.commit_text(tmp_path / f"{name}.jsonl", "".join(map(fsio.dump_json_line, rows)))
    answered = [one.example(response=True) for one in world.requests(8, seed=2)]
    samples = [{"prompt": f"{one.prompt} ", "response": one.response} for one in answered]
    fsio.commit_json(tmp_path / "results.json", {"results": [{"variations": samples}]})
    for layer in sorted(set(LAYERS.values())):
        save_random_sae(
            tmp_path / "saes" / f"layer_{layer}" / "width_16k" / "canonical",
            int(layer),
            "topk",
            128,
        )
    fsio.commit_text(tmp_path / "sentences.csv", "Yes, it is.\nHow can I repair the suitcase?\n")
    saes = "saes/layer_{layer}/width_16k/canonical"
    settings = {"model_id": str(MODEL_FOLDER), "sae_path": saes, "input_csvs": ["sentences.csv"],
                "pictures": {"sentences": 1, "formats": ["png"], "dpi": 40}}  # fmt: skip
    fsio.commit_json(tmp_path / "config.yaml", settings)
    write_memes(tmp_path / "memes", 48)
    for file in (ROOT / "configs").glob("*_vlm.yaml"):
        fsio.commit_text(tmp_path / "configs" / file.name, here(file.read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    monkeypatch.setattr(demo, "FULL", SMALL)
    monkeypatch.setattr(vision_demo, "FULL", SMALL_VISION)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def run(line: str, further: list[str], judge: str) -> str:
    """Run a command of a page, with further words for an evaluation; return what it printed."""
    line = here(line).replace(JUDGE, f"{JUDGE}, url: '{judge}'")
    words = shlex.split(line, comments=True)[1:]
    names = (words[0], " ".join(words[:2]))
    quick = [*(word for name in names for word in QUICK.get(name, []))]
    quick += further if words[0] == "eval" else []
    done = CliRunner().invoke(cli.app, [*words, *quick])
    sick = words[0] == "doctor" and done.exit_code == 9  # as SAEs of four steps are
    assert done.exit_code == 0 or sick, f"{line}\n{done.output}"
    return done.output


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.stem)
def test_a_translated_page_has_the_commands_and_the_python_of_the_english_one(page):
    english = page.with_name(f"{page.stem.rpartition('.')[0]}.md")
    assert settings(page) == settings(english)
    for language in ("sh", "python"):
        assert blocks(page, language) == blocks(english, language)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if commands(p) and p not in TRANSLATED], ids=lambda page: page.stem
)
def test_a_pages_commands_and_python_run_in_their_order(page, folder, capsys):
    for name, text in written_files(page).items():
        fsio.commit_text(folder / name, text)
    with serving(Endpoint()) as judge:
        for line in commands(page):
            run(line, [] if page.stem == "README" else ["eval.baselines=false"], judge)
    for code in python_blocks(page):
        code = here(code).replace('out="runs/', 'out="python/').replace("arch=", QUICK_TRAINING)
        exec(compile(code, page.name, "exec"), {})
        assert capsys.readouterr().out, f"{page.name}: this prints nothing\n{code}"
    if page.stem == "README":
        check_columns((folder / "runs" / "eval" / "layer_2.csv").read_text(encoding="utf-8"))
    if page.stem in {"README", "your-model"}:
        check_files(folder / "runs")


def check_files(runs: Path) -> None:
    """Compare what lies in the run folders with the page that names every file."""
    text = (REFERENCE / "files.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    patterns = [re.sub(r"<\w+>", "*", name) for name in named]
    for run_folder in runs.iterdir():
        for path in run_folder.rglob("*"):
            where = path.relative_to(run_folder)
            if path.is_file():
                assert any(where.match(pattern) for pattern in patterns), (
                    f"docs/reference/files.md does not name {where} of {run_folder.name}"
                )


def check_columns(table: str) -> None:
    """Compare the columns of a latent table with the page that explains every one."""
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", page)) | {"latent"}
    columns = table.splitlines()[0].split(",")
    assert {name for name in columns if not name.startswith("report_")} <= explained


def test_the_readme_shows_the_four_stages():
    first = [shlex.split(line)[1] for line in commands(PAGES[0])][:4]
    assert first == ["extract", "train", "encode", "eval"]


def loaded(script: Path) -> ModuleType:
    """Return a script of the pages as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_pages_are_up_to_date():
    for name, text in loaded(ROOT / "docs" / "make_reference.py").pages().items():
        committed = (REFERENCE / name).read_text(encoding="utf-8")
        assert committed == text, f"docs/reference/{name} is out of date; run `make docs`"


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^):]+)\)", text):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
            assert heading in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("stage", ["extract", "train", "encode", "analyze", "eval", "probe"])
def test_every_shipped_configuration_loads(stage):
    module = importlib.import_module(f"saefty.stages.{stage}")
    config_class = getattr(module, f"{stage.capitalize()}Config")
    assert load_config(config_class, ROOT / "configs" / f"{stage}.yaml").run.dir is not None


def test_every_key_that_a_page_or_a_configuration_names_exists():
    known = (REFERENCE / "configuration.md").read_text(encoding="utf-8")
    files = [*PAGES, *(ROOT / "configs").glob("*.yaml"), REFERENCE / "files.md"]
    sections = (
        "model|data|extract|train|sae|optimizer|encode|analyze|eval|probe|doctor|intervention|engine|"
        "run|pictures|output|steer|compare|effects"
    )
    for file in files:
        for key in re.findall(
            rf"[`\s]((?:{sections})\.[a-z_.]+)(?<!\.safetensors)(?<!\.json)(?<!\.yaml)(?<!\.md)[`=]",
            file.read_text("utf-8"),
        ):
            stem = re.sub(
                r"^(sae\.options|(?:intervention|steer)\.(?:judge|fluency)_options)\..*", r"\1", key
            )
            assert f"`{stem}`" in known, f"{file.name} names {key}"


@pytest.mark.parametrize("name", ["vision.md", "vision.ko.md"])
def test_the_guide_to_images_has_the_shipped_figures(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = re.findall(r"\| (\d\.\d\d), (\d\.\d\d), (\d\.\d\d) \|", text)
    worlds = fsio.read_json(VISION_REFERENCE)["worlds"]
    keys = ("words", "picture", "off", "on", "delta_zero_attention", "delta_knockout",
            "latents_knockout_1", "latents_knockout_5")  # fmt: skip
    assert found == [tuple(f"{world[key]:.2f}" for world in worlds) for key in keys]


@pytest.mark.slow
def test_what_the_guide_to_steering_says_of_the_sandbox_holds(tmp_path):
    maker = loaded(ROOT / "docs" / "pictures" / "make_steer.py")
    maker.run_page(tmp_path)
    compared = json.loads((tmp_path / "runs/compare/summary.json").read_text("utf-8"))
    best = {name: way["best"] for name, way in compared["ways"].items()}
    score = {name: one["score"]["estimate"] for name, one in best.items()}
    chance = max(score[name] for name in compared["controls"])
    assert min(score["caa"], score["sae_ts"]) >= max(0.6, chance + 0.25)
    others = ("latent difference", "decoder", "sae_ts, lambda 1")
    held = {
        (one["first"], one["second"]) for one in compared["differences"] if one["p_holm"] <= 0.05
    }
    assert {(way, other) for way in ("caa", "sae_ts") for other in others} <= held
    assert compared["harmless"]["sae_ts"]["kl"]["low"] > compared["harmless"]["caa"]["kl"]["high"]
    # Perplexity takes good French for bad English.
    with open(tmp_path / "runs/sweep/sweep.csv", encoding="utf-8") as file:
        half = [float(row["fluency"]) for row in csv.DictReader(file) if row["alpha"] == "0.5"]
    assert len(half) == 2
    assert max(half) < 0.5
    assert best["caa"]["alpha"] == 0.5
    assert best["caa"]["coherence"]["estimate"] > 0.9
