"""A fault at every system call that writes: whatever was committed stays, a rerun completes."""

import itertools
import json
import os
import shutil

import pytest

from pipeline import forkserver
from pipeline.test_faults import LITTLE, bytes_of, little_extracting
from pipeline.tracer import CALLS, inject, needs_tracer

pytestmark = needs_tracer

ERRORS = {"ENOSPC": "the disk is full", "EIO": "could not be written",
          "EACCES": "could not be written"}  # fmt: skip


def commits(name):
    return ["commits", name]


def whole_or_absent(folder, clean):
    """Check that every file under a final name is one of the clean run's, byte for byte.

    A training's log grows line by line and may end in a torn one, which its readers leave out; its
    figures get the loss recovered last; its checkpoints are gone when it is done, and are verified
    by the rerun.
    """
    for name, data in bytes_of(folder).items():
        if "/.tmp-" in f"/{name}" or name.startswith("checkpoints/"):
            continue
        if name.endswith("train_log.jsonl"):
            assert clean[name].startswith(data), name
        elif name.endswith("metrics.json"):
            whole = json.loads(clean[name])
            assert all(whole[key] == value for key, value in json.loads(data).items()), name
        else:
            assert data == clean[name], name


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """Starts the little program that writes a store, quickly."""
    server = forkserver.Commands(tmp_path_factory.mktemp("writer"), lean=True)
    yield server
    server.close()


def check_every_call(saefty, command, fault, rerun):
    """Let each call of each kind meet the fault in turn; return how many there were.

    A fault is a signal, or a function of the point that gives an error.
    """
    clean_folder, folder = saefty.cwd / "clean_injected", saefty.cwd / "injected"
    shutil.rmtree(clean_folder, ignore_errors=True)
    assert saefty(*command(clean_folder.name)).code == 0
    clean = bytes_of(clean_folder)
    points = 0
    for call in CALLS:
        for number in itertools.count(1):
            shutil.rmtree(folder, ignore_errors=True)
            error = None if fault == "signal=KILL" else fault(points)
            told = inject(saefty, command(folder.name), call, number, error or fault)
            if told.hit is None:
                assert told.result.code == 0, told.result.err
                break
            points += 1
            if folder.exists():
                whole_or_absent(folder, clean)
            if error is None:
                assert told.result.code == -9
            elif told.hit.startswith(str(folder)) and not told.hit.endswith("/.lock"):
                said = ERRORS[error.removeprefix("error=")]
                assert told.result.code in {2, 5}, told.result.err
                assert "Traceback" not in told.result.err
                assert said in told.result.err or told.result.code == 2
                assert not list(folder.rglob(".tmp-*")) if folder.exists() else True
            rerun(folder)
            assert bytes_of(folder) == clean, (call, number)
    return points


def an_error_of_each_kind(point):
    return f"error={list(ERRORS)[point % len(ERRORS)]}"


def test_a_kill_at_every_call_of_a_store_s_writer_loses_nothing_and_a_rerun_completes_it(writer):
    assert check_every_call(writer, commits, "signal=KILL", forkserver.commits) > 50


def test_an_error_of_the_disk_at_every_call_of_a_store_s_writer_keeps_what_was_there(writer):
    assert check_every_call(writer, commits, an_error_of_each_kind, forkserver.commits) > 50


def test_what_was_complete_survives_an_error_at_every_call_of_a_rerun(writer):
    """A rerun of a complete run opens its folder, and leaves every file as it was."""
    folder = writer.cwd / "complete"
    assert writer(*commits(folder.name)).code == 0
    before = bytes_of(folder)
    for call in CALLS:
        for number in itertools.count(1):
            fault = an_error_of_each_kind(number)
            if inject(writer, commits(folder.name), call, number, fault).hit is None:
                break
            assert bytes_of(folder) == before


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("stage", LITTLE)
@pytest.mark.parametrize("fault", ["signal=KILL", "ENOSPC", "EIO", "EACCES"])
def test_a_fault_at_every_call_of_a_stage_loses_nothing_and_a_rerun_completes_it(
    world, stage, fault
):
    # The tracer counts the calls of one thread: all are made by it.
    command = stage(world, "engine.overlap=false") if stage is little_extracting else stage(world)

    def rerun(folder):
        again = world.saefty(*command(folder.name))
        assert again.code == 0, again.err

    given = fault if "=" in fault else lambda point: f"error={fault}"
    assert check_every_call(world.saefty, command, given, rerun) > 50


def test_a_folder_that_cannot_be_written_is_named(writer, tmp_path):
    """As on a read-only disk; root may write anywhere else."""
    told = inject(writer, commits(tmp_path / "new"), "mkdir", 1, "error=EROFS")
    assert told.hit is not None
    assert told.result.code == 2
    assert f"the folder {tmp_path / 'new'} cannot be used: Read-only file system" in (
        told.result.err
    )
    assert "Set run.dir (or run.root) to a folder that can be written." in told.result.err
    assert os.listdir(tmp_path) == []
