"""The folder of a guard: saved, moved, interrupted, and somebody else's."""

import pytest

import guard_cases
from guard_cases import KINDS, make_guard, rewrite, spec_of
from saefty import fsio
from saefty.errors import (
    ConfigError,
)
from saefty.guards.files import read_guard
from saefty.guards.place import check_place
from saefty.guards.scoring import load_guard


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_was_read_is_the_guard_that_was_saved(kind, saved):
    found = read_guard(saved[kind])
    assert found.spec == spec_of(kind, "max")
    assert found.facts == guard_cases.facts()


@pytest.mark.parametrize("kind", KINDS)
def test_saving_the_same_guard_again_changes_nothing(kind, tmp_path):
    folder = make_guard(tmp_path / "guard", kind, "max")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    make_guard(folder, kind, "max")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_guard_whose_writing_was_interrupted_is_finished(copied):
    folder = copied("latents")
    (folder / "guard.json").unlink()
    (folder / "guard.md").unlink()
    (folder / f"{fsio.TEMP_PREFIX}123-guard.json").write_text("half")
    with pytest.raises(ConfigError, match="it has no guard.json"):
        read_guard(folder)
    make_guard(folder, "latents", "max")
    assert read_guard(folder).spec.reads == "latents"


def test_another_guards_folder_is_left_alone(copied):
    folder = copied("dense")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"another guard; they differ in reads, .*files"):
        make_guard(folder, "dense", "mean")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else than a guard: notes.txt"):
        make_guard(tmp_path, "words")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="is a file, and a guard is a folder"):
        make_guard(tmp_path / "notes.txt", "words")


def test_a_place_is_refused_before_any_work_unless_the_run_itself_wrote_there(copied, tmp_path):
    folder = copied("words")
    with pytest.raises(ConfigError, match="which this run did not write"):
        check_place(folder, tmp_path / "run")
    rewrite(folder, lambda record: record["facts"].update(run=str(tmp_path / "run")))
    check_place(folder, tmp_path / "run")
    check_place(tmp_path / "new", tmp_path / "run")
    with pytest.raises(ConfigError, match="something else than a guard: copy-of-words"):
        check_place(tmp_path, tmp_path / "run")


def test_the_card_says_what_was_measured_and_where_it_ends(saved):
    page = (saved["latents"] / "guard.md").read_text()
    for said in (
        "Latents of an SAE at blocks.1.hook_resid_post",
        "the largest over tokens that are not special",
        "AUROC 0.910 [0.840, 0.970]",
        "forum 0.700 [0.600, 0.800]",
        "`fpr_1pct`: 0.8176 (log-odds 1.5",
        "in this folder, under `sae/`",
        "not calibrated",
        "from `default` on: harmful examples that are flagged 0.800 [0.600, 0.900]",
        "harmless examples that are flagged 0.100 [0.050, 0.300]",
        "the best F1 on training examples, each scored by a fit that left its fold out, and not by "
        "this guard",
        "never below the default",
        "left out of the fit (measured with another probe)",
    ):
        assert said in page


@pytest.mark.parametrize(
    ("folder", "what"),
    [("nowhere", "no such folder"), ("empty", "but nothing"), ("file", "is a file")],
)
def test_a_place_without_a_guard_is_named(folder, what, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=what) as caught:
        load_guard(tmp_path / folder)
    assert "saefty probe --save" in caught.value.then
