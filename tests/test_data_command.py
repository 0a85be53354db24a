"""`saefty data show`: tables on standard output, pictures and JSON in a folder."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from data.published_rows import as_csv, as_jsonl
from saefty import cli
from saefty.sandbox.language_model import MODEL_FOLDER

ROWS = [
    {"prompt": f"prompt number {i}", "source": "SEAS" if i % 3 else "BeaverTails", "cluster": i % 6}
    for i in range(24)
]


@pytest.fixture
def show(monkeypatch):
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)

    def run(*words):
        return CliRunner().invoke(cli.app, ["data", "show", *map(str, words)])

    return run


@pytest.fixture
def galtea(tmp_path):
    as_csv(tmp_path / "galtea.csv", ROWS)
    return f"data.path={tmp_path / 'galtea.csv'}"


def test_the_tables_are_printed_and_the_pictures_drawn(show, galtea, tmp_path):
    done = show("data.name=galtea", galtea, "--out", tmp_path / "pictures")
    assert done.exit_code == 0, done.output
    for line in (
        "galtea galtea.csv: 24 examples; label: 20 harmful, 0 harmless, 4 unknown",
        "- SEAS: 16 (66.67%)",
        "- BeaverTails: 8 (33.33%)",
        "by character",
    ):
        assert line in done.stdout.splitlines()
    assert "note: one class only" in done.stdout
    for name in ("source_category", "lengths", "mean_length", "composition"):
        picture = Image.open(tmp_path / "pictures" / f"{name}.png")
        assert min(picture.size) > 400
        assert str(tmp_path / "pictures" / f"{name}.png") in done.stdout
    record = json.loads((tmp_path / "pictures" / "overview.json").read_text(encoding="utf-8"))
    assert record["examples"] == 24
    assert sum(map(sum, record["counts"])) == 24


def test_json_is_one_object_and_tokens_are_counted_by_the_tokenizer(show, galtea):
    words = ("data.name=galtea", galtea, "--json")
    record = json.loads(show(*words, "--tokenizer", MODEL_FOLDER).stdout)
    assert record["unit"] == "tokens"
    assert set(record["by_token"]) == {"SEAS", "BeaverTails"}
    by_words = json.loads(show(*words, "--unit", "words").stdout)
    assert by_words["by_word"] == {"SEAS": 48, "BeaverTails": 24}
    assert "files" not in record


def test_a_mixture_is_read_from_a_file_of_settings(show, tmp_path):
    for name in ("web", "chat"):
        as_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(10)])
    settings = tmp_path / "mix.yaml"
    settings.write_text(f"""
data:
  name: mixture
  mixture:
    parts:
      - {{path: {tmp_path}/web.jsonl, part: web, unlabelled: harmless}}
      - {{path: {tmp_path}/chat.jsonl, part: chat}}
    shares: {{web: 0.25, chat: 0.75}}
""")
    done = show("-c", settings, "data.mixture.total=8")
    assert done.exit_code == 0, done.output
    assert "- chat: 6 (75.00%)" in done.stdout
    assert "- web: 2 (25.00%)" in done.stdout


def test_a_word_that_is_no_unit_and_a_part_that_runs_out_are_errors(show, galtea, tmp_path):
    done = show("data.name=galtea", galtea, "--unit", "bytes")
    assert (done.exit_code, "--unit is one of" in done.output) == (2, True)
    as_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    part = f"data.mixture.parts=[{{path: {tmp_path}/a.jsonl}}]"
    done = show("data.name=mixture", part, "data.mixture.total=5")
    assert done.exit_code == 3
    assert "a.jsonl holds 1 examples, but its share 1 of 5 is 5" in done.output


def test_categories_of_a_file_of_ones_own(show, tmp_path):
    as_jsonl(tmp_path / "a.jsonl", [{"text": "a", "kind": "東京"}] * 3 + [{"text": "b"}])
    done = show(f"data.path={tmp_path}/a.jsonl", "data.text=text", "data.category=kind", "--json")
    record = json.loads(done.stdout)
    assert record["categories"] == ["東京", "(no category)"]
    assert record["counts"] == [[3, 1]]


def test_images_are_counted_with_their_sizes_and_what_is_wrong_with_them(show, tmp_path):
    for i, size in enumerate([(10, 40), (30, 20), (50, 60)]):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    frames = [Image.new("L", (70, 80), level) for level in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "empty.png").touch()
    names = ["0.png", "1.png", "2.png", "2.png", "moving.gif", "empty.png", "none.png", "none.png"]
    rows = [{"prompt": "p", "image": name} for name in names] + [{"prompt": "p", "image": None}]
    as_jsonl(tmp_path / "a.jsonl", rows)
    words = (f"data.path={tmp_path}/a.jsonl", "data.prompt=prompt", "data.image=image")
    lines = show(*words).stdout.splitlines()
    assert "images: 8 of 9 examples have one, in 6 files; 3 (37.50%) cannot be read" in lines
    assert f"- there is no such file: 2; first {tmp_path}/none.png" in lines
    assert f"- is empty: 1; first {tmp_path}/empty.png (0 bytes)" in lines
    assert "kind by content: PNG 3, GIF 1; 1 animated, of which the first frame is read" in lines
    assert "width in pixels: min 10, median 40, max 70" in lines
    assert "height in pixels: min 20, median 50, max 80" in lines
    record = json.loads(show(*words, "--json").stdout)["images"]
    assert record["bad"] == {"there is no such file": 2, "is empty": 1}
    assert (record["with_image"], record["files"], record["animated"]) == (8, 6, 1)
    assert record["size"]["width"] == {"min": 10, "median": 40.0, "max": 70}
    assert "images" not in json.loads(show(*words[:2], "--json").stdout)


def test_a_dataset_whose_images_are_all_missing_is_shown_too(show, tmp_path):
    as_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "image": "none.png"}])
    done = show(f"data.path={tmp_path}/a.jsonl", "data.prompt=prompt", "data.image=image")
    assert done.exit_code == 0, done.output
    assert "1 (100.00%) cannot be read" in done.stdout
    assert "pixels" not in done.stdout
