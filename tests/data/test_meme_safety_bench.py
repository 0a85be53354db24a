"""MemeSafetyBench: each instruction with its meme, harmful where the sentiment is negative."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from data.published_rows import as_csv, as_jsonl, read
from saefty.data.base import DataSection, load_examples
from saefty.errors import InputError
from saefty.images import load_image

ROWS = [
    ("red", "mock her", "negative", "Hate Speech", "caption"),
    ("red", "describe it", "positive", "Hate Speech", "describe"),
    ("blue", "how to burn it", "negative", "Violence", "caption"),
]
NAMES = ("image_path", "instruction", "sentiment", "category", "task")


@pytest.fixture(autouse=True)
def _kept(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.fixture
def published(tmp_path):
    """A folder like the repository: images in Parquet, in the only split there is."""
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(NAMES)}
    columns["meme_image"] = [{"bytes": png(c), "path": None} for c in columns.pop("image_path")]
    kinds = {name: datasets.Value("string") for name in NAMES[1:]}
    features = datasets.Features(kinds | {"meme_image": datasets.Image()})
    made = datasets.Dataset.from_dict(columns, features=features)
    made.to_parquet(folder / "test-00000-of-00001.parquet")
    return tmp_path / "repository"


@pytest.fixture
def by_path(tmp_path):
    """A table with the paths of files."""
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    return [dict(zip(NAMES, (f"{row[0]}.png", *row[1:]), strict=True)) for row in ROWS]


def png(colour):
    out = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(out, "PNG")
    return out.getvalue()


def colours(found):
    return [tuple(np.asarray(load_image(one.image))[0, 0]) for one in found]


def test_the_published_columns_become_examples(published):
    found = read("meme_safety_bench", published)
    assert [one.prompt for one in found] == ["mock her", "describe it", "how to burn it"]
    assert colours(found) == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    assert [one.label for one in found] == [True, False, True]
    assert [one.category for one in found] == ["Hate Speech", "Hate Speech", "Violence"]
    assert {one.source for one in found} == {"meme_safety_bench"}
    assert not any(one.raw for one in found)


def test_instructions_on_one_meme_are_one_group(published, tmp_path, by_path):
    as_csv(tmp_path / "a.csv", by_path)
    for path in (published, tmp_path / "a.csv"):
        first, second, third = (one.group for one in read("meme_safety_bench", path))
        assert first == second != third


def test_images_by_path_lie_beside_the_table(tmp_path, by_path):
    as_jsonl(tmp_path / "a.jsonl", by_path)
    found = read("meme_safety_bench", tmp_path / "a.jsonl")
    assert colours(found) == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_which_labels_mean_harmful_is_the_configurations_choice(published):
    def labels(**keys):
        return [one.label for one in read("meme_safety_bench", published, **keys)]

    assert labels(label="sentiment", harmful=["positive"]) == [False, True, False]
    assert labels(label="sentiment", harmful=["negative"]) == labels()
    assert labels(harmful=["Violence"]) == [False, False, True]
    assert labels(label="task", harmful=["describe"]) == [False, True, False]


def test_groups_and_categories_can_be_others(published):
    found = read("meme_safety_bench", published, group="prompt", category="task")
    assert [one.group for one in found] == [one.prompt for one in found]
    assert [one.category for one in found] == ["caption", "describe", "caption"]


def test_an_unknown_sentiment_names_the_row_and_a_missing_one_is_no_label(tmp_path, by_path):
    by_path[1]["sentiment"] = ""
    as_csv(tmp_path / "a.csv", by_path)
    assert [one.label for one in read("meme_safety_bench", tmp_path / "a.csv")][1] is None
    by_path[2]["sentiment"] = "neutral"
    as_csv(tmp_path / "a.csv", by_path)
    with pytest.raises(InputError, match="row 2 .*'neutral', but known are negative, positive"):
        read("meme_safety_bench", tmp_path / "a.csv")
    given = read("meme_safety_bench", tmp_path / "a.csv", label="sentiment", harmful=["neutral"])
    assert [one.label for one in given] == [False, None, True]


def test_a_table_without_images_names_both_lists(tmp_path, by_path):
    as_jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "sentiment": "negative"}])
    with pytest.raises(InputError, match="meme_image, category, task is missing"):
        read("meme_safety_bench", tmp_path / "a.jsonl")


def test_its_only_split_is_read_unless_another_is_named(monkeypatch):
    calls = []

    def answer(path, **keys):
        calls.append((path, keys["split"], keys["revision"]))
        return [{"meme_image": {"bytes": png("red"), "path": None}, "instruction": "a",
                 "sentiment": "negative", "category": "c", "task": "t"}]  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", answer)
    load_examples(DataSection(name="meme_safety_bench"))
    load_examples(DataSection(name="meme_safety_bench", split="extra", revision="v2"))
    hub_id = "oneonlee/Meme-Safety-Bench"
    assert calls == [(hub_id, "test", None), (hub_id, "extra", "v2")]
