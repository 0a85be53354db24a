import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from saefty import fsio
from saefty.errors import ConfigError, LockedError, MismatchError
from saefty.runs import Ledger, Run, RunSection, find_run, read_metadata, run_folder

CONFIG = {"sae": {"k": 4}, "run": {"dir": "here"}}


def test_a_ledger_adds_up_and_says_so():
    ledger = Ledger(ok=3)
    ledger.skipped["too_long"] += 2
    assert ledger.total == 5
    assert str(ledger) == "in 5 = ok 3 + skipped 2 (too_long 2) + failed 0"


def test_a_run_resumed_with_other_settings_is_refused_and_the_keys_are_named(tmp_path):
    with Run(tmp_path, "train", CONFIG, {"store": "a"}):
        pass
    changed = {"sae": {"k": 8}, "run": {"dir": "there"}}
    with pytest.raises(MismatchError) as error, Run(tmp_path, "train", changed, {"store": "b"}):
        pass
    message = str(error.value)
    assert "sae.k: 4 -> 8" in message
    assert "inputs.store: 'a' -> 'b'" in message
    assert "run.dir" not in message.splitlines()[1] + message.splitlines()[2]


def test_a_run_resumed_with_the_same_settings_elsewhere_keeps_its_fingerprint(tmp_path):
    with Run(tmp_path, "train", CONFIG) as first:
        pass
    with Run(tmp_path, "train", {**CONFIG, "run": {"dir": "there"}}) as second:
        assert second.fingerprint == first.fingerprint


def test_metadata_says_what_is_needed_to_repeat_the_run(tmp_path):
    with Run(tmp_path, "train", CONFIG):
        pass
    facts = read_metadata(tmp_path)
    assert facts["config"] == CONFIG
    assert set(facts) >= {"git_sha", "versions", "python", "inputs", "stage"}
    assert facts["versions"]["torch"][0].isdigit()


def test_a_folder_with_foreign_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and holds no run: thesis\.tex"):
        Run(tmp_path, "train", CONFIG).__enter__()
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_second_process_is_refused_and_told_who_works_there(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from saefty.runs import FolderLock\n"
        f"FolderLock(Path({str(tmp_path)!r})).acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"pid {holder.pid} on "):
            Run(tmp_path, "train", CONFIG).__enter__()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with Run(tmp_path, "train", CONFIG):  # the lock of a dead process is taken over
        pass


def test_temporaries_of_an_interrupted_run_are_removed_and_counted(tmp_path):
    with Run(tmp_path, "train", CONFIG):
        pass
    (tmp_path / ".tmp-0-shard").write_text("half")
    with Run(tmp_path, "train", CONFIG):
        assert not (tmp_path / ".tmp-0-shard").exists()
    assert fsio.read_lines(tmp_path / "journal.jsonl")[-1]["temporaries_removed"] == 1


def test_fifty_runs_started_in_one_second_have_fifty_folders(tmp_path):
    section = RunSection(root=tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder(section, "extract"), range(50)))
    assert len(set(folders)) == 50


def test_latest_is_the_newest_complete_run(tmp_path):
    for number, name in enumerate(["a", "b", "c"]):
        with Run(tmp_path / "sae" / name, "train", CONFIG) as run:
            if name != "c":
                run.finish({})
                os.utime(run.folder / "finished.json", (number, number))
    assert find_run("latest", "sae", tmp_path).name == "b"
    with pytest.raises(ConfigError, match="not complete"):
        find_run(tmp_path / "sae" / "c", "sae", tmp_path)
    with pytest.raises(ConfigError, match="no complete run below"):
        find_run("latest", "extract", tmp_path)


def test_an_error_inside_a_run_knows_the_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt) as error, Run(tmp_path, "train", CONFIG):
        raise KeyboardInterrupt
    assert error.value.run_folder == tmp_path
