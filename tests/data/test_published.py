"""Where a published dataset is read from: a file, a folder like its repository, or the hub."""

import datasets
import pytest

from data.published_rows import as_json, as_jsonl, as_packed_jsonl, as_parquet, read
from saefty.data.base import DATASETS, DataSection, load_examples
from saefty.errors import ConfigError, ExternalError, InputError

PAIR = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


def test_a_folder_like_the_repository_is_read_as_the_hub_would_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "harmless-base").mkdir()
    (tmp_path / "helpful-base").mkdir()
    for split in ("train", "test"):
        as_packed_jsonl(tmp_path / "harmless-base" / f"{split}.jsonl.gz", [PAIR] * len(split))
        as_packed_jsonl(tmp_path / "helpful-base" / f"{split}.jsonl.gz", [PAIR])
    assert len(read("hh_rlhf", tmp_path, subset="harmless-base", split="test")) == 8
    assert len(read("hh_rlhf", tmp_path, subset="harmless-base")) == 10


def test_of_sharegpts_files_the_usual_one_is_read(tmp_path):
    as_json(tmp_path / "other.json", [{"id": "b_0", "conversations": TURNS}] * 3)
    usual = tmp_path / "ShareGPT_V3_unfiltered_cleaned_split.json"
    as_json(usual, [{"id": "a_0", "conversations": TURNS}])
    assert [one.id for one in read("sharegpt", tmp_path)] == ["a_0"]
    assert len(read("sharegpt", tmp_path, subset="other.json")) == 3


@pytest.fixture
def asked(monkeypatch):
    """Take the place of the hub, and keep what it was asked."""
    calls = []

    def answer(path, **keys):
        calls.append((path, keys))
        return [{"text": "page"}, {"text": "another"}]

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return calls


def test_without_a_path_the_repository_is_read_at_the_revision_that_needs_no_script(asked):
    assert len(load_examples(DataSection(name="openwebtext"))) == 2
    keys = {"split": "train", "revision": "refs/convert/parquet", "streaming": True}
    assert asked == [("stas/openwebtext-10k", keys)]


def test_another_id_is_read_without_the_revision_of_the_first(asked):
    load_examples(DataSection(name="openwebtext", path="someone/copy", split="test"))
    assert asked == [("someone/copy", {"split": "test", "revision": None, "streaming": True})]


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(asked, tmp_path):
    for missing in ("data/pages.jsonl", "data/pages.jsonl.gz", str(tmp_path / "a" / "b")):
        with pytest.raises(InputError, match="there is no file|not a file of a known kind"):
            load_examples(DataSection(name="openwebtext", path=missing))
    assert not asked


def test_a_dataset_with_a_script_says_where_its_rows_are(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found a.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ExternalError) as error:
        load_examples(DataSection(name="hub", path="a/b"))
    assert "data.revision=refs/convert/parquet" in error.value.then


def test_several_files_are_read_one_after_the_other(tmp_path):
    for name in "ab":
        as_parquet(tmp_path / f"{name}.parquet", [{"prompt": name, "target": "t"}] * 2)
    files = tuple(str(tmp_path / f"{name}.parquet") for name in "ab")
    found = load_examples(DataSection(name="advbench", files=files))
    assert [(one.id, one.prompt) for one in found] == [
        ("0", "a"), ("1", "a"), ("2", "b"), ("3", "b"),
    ]  # fmt: skip


def test_plain_lines_are_no_table(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="advbench is a table of prompt, target"):
        read("advbench", tmp_path / "a.txt", format="lines")


def test_a_damaged_gzip_file_is_an_error_that_says_so(tmp_path):
    as_packed_jsonl(tmp_path / "a.jsonl.gz", [PAIR] * 50)
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    for bad in (whole[:-20], b"plain text", whole[:40] + b"\0\0\0\0" + whole[44:]):
        (tmp_path / "a.jsonl.gz").write_bytes(bad)
        with pytest.raises(InputError, match="not a whole gzip file"):
            read("hh_rlhf", tmp_path / "a.jsonl.gz")


def test_a_limit_counts_examples(tmp_path):
    as_jsonl(tmp_path / "a.jsonl", [PAIR] * 5)
    assert len(read("hh_rlhf", tmp_path / "a.jsonl", limit=3)) == 3


PUBLISHED = (
    "advbench", "galtea", "hh_rlhf", "jailbreak", "meme_safety_bench", "openwebtext", "sharegpt",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_file_says_where_it_is_from_its_licence_and_what_becomes_of_it(name):
    import importlib

    text = importlib.import_module(f"saefty.data.{name}").__doc__
    for word in ("https://huggingface.co/datasets/", "Licence:", "What becomes of", "`label`"):
        assert word in text, word
    assert name in DATASETS


@pytest.mark.parametrize("surrogate", ["\ud800", "a\udc00"])
def test_half_a_character_is_refused_here_too(tmp_path, surrogate):
    as_jsonl(tmp_path / "a.jsonl", [{"text": surrogate}])
    with pytest.raises(InputError, match="half of a character"):
        read("openwebtext", tmp_path / "a.jsonl")
