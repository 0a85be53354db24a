"""Killed, interrupted, out of space, crowded, damaged: nothing is lost, a rerun completes."""

import random
import re
import shutil
import signal
import time

import pytest

from pipeline.forkserver import wait_for

TOLD_APART = {"journal.jsonl", ".lock", "metadata.json"}
"""Files that say when and where a run was made; all others are the same bytes on every run."""


def bytes_of(folder, *, but=TOLD_APART):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def times_of(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in {"journal.jsonl", ".lock"}
    }


def same_but_for_its_place(a, b):
    """Whether two metadata.json differ in run.dir (and so in their seal) at most."""
    lines = zip((a / "metadata.json").read_text().splitlines(),
                (b / "metadata.json").read_text().splitlines(), strict=True)  # fmt: skip
    return all(x == y or '"dir"' in x or "xxh3_128" in x for x, y in lines)


def starts(folder):
    """How often a run was started or resumed, so far."""
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def check_kills(world, stage, done, kills, seed=0):
    """Kill a stage at random moments until some kills have hit, let it end, compare the bytes."""
    folder = world.folder / f"killed_{stage}"
    command = getattr(world, stage)(folder)
    shutil.rmtree(folder, ignore_errors=True)
    draw = random.Random(seed)
    span, hits = world.seconds[stage] / 2, 0
    while hits < kills:
        begun = starts(folder)
        child = world.saefty.start(*command)
        if hits % 4 != 3:  # one kill in four hits the loading of the model
            wait_for(lambda: starts(folder) > begun or child.state == "Z")  # noqa: B023
        time.sleep(draw.uniform(0, span))
        child.kill()
        if child.wait().code == -signal.SIGKILL:
            hits += 1
        else:  # it had ended: begin anew, and be quicker
            shutil.rmtree(folder)
            span *= 0.7
    metadata = folder / "metadata.json"
    before = metadata.read_bytes() if metadata.exists() else None
    result = world.saefty(*command)
    assert result.code == 0, result.err
    assert before in {None, metadata.read_bytes()}
    assert bytes_of(folder) == bytes_of(done)
    assert same_but_for_its_place(folder, done)
    assert not list(folder.rglob(".tmp-*"))


def test_extract_killed_at_six_random_moments_ends_with_the_same_bytes(world):
    check_kills(world, "extract", world.extracted, 6)


def test_train_killed_at_two_random_moments_ends_with_the_same_bytes(world):
    check_kills(world, "train", world.trained, 2)


def test_encode_killed_at_two_random_moments_ends_with_the_same_bytes(world):
    check_kills(world, "encode", world.encoded, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("stage", "done"), [("extract", "extracted"), ("train", "trained"), ("encode", "encoded")]
)
def test_fifty_kills_at_random_moments_change_nothing(world, stage, done):
    check_kills(world, stage, getattr(world, done), 50, seed=1)


def committed(folder):
    """The pieces of which a record stands, with its bytes."""
    return {path.name: path.read_bytes() for path in (folder / "records").glob("piece_*.json")}


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_resumes_that_are_killed_again_and_again_only_ever_go_forward(world, kills):
    folder = world.folder / "killed_again"
    shutil.rmtree(folder, ignore_errors=True)
    before, points = {}, []
    for kill in range(kills):
        # Each start lives through some more flushes and renames than one piece needs.
        killed = world.saefty(*world.extract(folder), die_at=11 + 7 * (kill % 4))
        if killed.code == 0:
            break
        assert killed.code == -signal.SIGKILL
        after = committed(folder)
        assert before.items() <= after.items()
        before = after
        points.append(len(after))
    assert points[-1] > 0
    assert world.saefty(*world.extract(folder)).code == 0
    assert before.items() <= committed(folder).items()
    assert bytes_of(folder) == bytes_of(world.extracted)


def little_extracting(world, *words):
    return lambda name: world.extract(
        name, "extract.limit_examples=3", "extract.layers=[1]", *words
    )


def little_training(world):
    return lambda name: [
        "train", f"train.store={world.extracted}", "train.layers=[0]", "sae.k=4",
        "train.max_steps=15", "train.batch_size=64", "train.checkpoint_every=5",
        "train.eval_every=5", "train.loss_recovered_examples=2", f"run.dir={name}",
    ]  # fmt: skip


def little_encoding(world):
    return lambda name: world.encode(name, "encode.limit_examples=3", "encode.layers=[0]")


LITTLE = [little_extracting, little_training, little_encoding]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", ["die_at", "fail_at"])
@pytest.mark.parametrize("stage", LITTLE)
def test_a_fault_at_any_flush_or_rename_is_mended_by_running_again(world, stage, fault):
    assert check_every_fault(world, stage, fault, step=1) > 25


def test_a_full_disk_at_some_flushes_and_renames_is_mended_by_running_again(world):
    assert check_every_fault(world, little_extracting, "fail_at", step=13) > 2


def check_every_fault(world, stage, fault, step):
    """Let the command fail at its first flush or rename, run it again; then at a later one."""
    command = stage(world)
    clean, folder = world.folder / "clean", world.folder / "faulty"
    shutil.rmtree(clean, ignore_errors=True)
    assert world.saefty(*command("clean")).code == 0
    point, points = 1, 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        result = world.saefty(*command(folder.name), **{fault: point})
        if result.code == 0:
            break
        if fault == "fail_at":
            assert result.code == 5, result.err
            assert "the disk is full" in result.err
            assert "Free some space" in result.err
            assert not list(folder.rglob(".tmp-*"))
        assert world.saefty(*command(folder.name)).code == 0
        assert bytes_of(folder) == bytes_of(clean), point
        point, points = point + step, points + 1
    return points


AT_WORK = 60
"""The flush or rename at which a command of 40 pieces is in the midst of its work."""


def test_ctrl_c_exits_130_at_once_and_the_line_it_prints_completes_the_run(world):
    folder = world.folder / "artifacts" / "extract"
    shutil.rmtree(folder, ignore_errors=True)
    words = [word for word in world.extract("unused") if not word.startswith("run.dir")]
    child = world.saefty.start(*words, hold_at=AT_WORK)
    child.wait_until_held()
    child.kill(signal.SIGINT)
    child.wake()
    began = time.monotonic()
    result = child.wait()
    assert time.monotonic() - began < 3
    assert result.code == 130
    assert "Interrupted. What was committed is safe." in result.err
    line = re.search(r"^To resume: (saefty .*)$", result.err, re.MULTILINE).group(1)
    resumed = world.saefty.line(line)
    assert resumed.code == 0, resumed.err
    (run,) = folder.iterdir()
    assert "pieces are done" in resumed.err
    assert bytes_of(run) == bytes_of(world.extracted)


@pytest.mark.parametrize("stage", ["extract", "train", "encode"])
def test_sigterm_exits_143_with_a_line_that_resumes(world, stage):
    command = getattr(world, stage)
    child = world.saefty.start(*command(f"terminated_{stage}"), hold_at=8)
    child.wait_until_held()
    child.kill(signal.SIGTERM)
    child.wake()
    result = child.wait()
    assert result.code == 143
    line = re.search(r"^To resume: (saefty .*)$", result.err, re.MULTILINE).group(1)
    assert world.saefty.line(line).code == 0
    done = {"extract": world.extracted, "train": world.trained, "encode": world.encoded}[stage]
    assert bytes_of(world.folder / f"terminated_{stage}") == bytes_of(done)


def test_a_full_disk_exits_5_keeps_what_was_committed_and_is_resumed(world):
    words = world.extract("full", "extract.save.shard_size=2000")
    limit = 100_000  # the 1,130 rows of a layer take 144 KB; tables and tokenizer stay below
    result = world.saefty(*words, fsize=limit)
    assert result.code == 5
    assert "the disk is full" in result.err
    assert "Files that were already committed are whole" in result.err
    assert "To resume: saefty extract" in result.err
    kept = times_of(world.folder / "full")
    assert "examples.jsonl" in kept
    assert not list((world.folder / "full").rglob(".tmp-*"))
    assert world.saefty(*words).code == 0
    after = times_of(world.folder / "full")
    assert {name: after[name] for name in kept} == kept


def test_a_second_process_in_the_same_folder_exits_5_and_names_the_first(world):
    words = world.extract("shared")
    first = world.saefty.start(*words, hold_at=AT_WORK)
    first.wait_until_held()
    second = world.saefty(*words)
    first.wake()
    assert first.wait().code == 0
    assert second.code == 5
    assert f"another process is writing in shared: pid {first.pid} on " in second.err


@pytest.fixture
def store(world, tmp_path):
    """A copy of the extracted store under its own name, to be damaged."""
    folder = tmp_path / "x"
    shutil.copytree(world.extracted, folder)
    return folder


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil(path):
    damage(path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [spoil, remove])
def test_a_harmed_shard_is_named_and_only_its_piece_is_made_again(world, store, harm):
    shard = store / "layer_2" / "shard_00003.safetensors"
    before, times = bytes_of(store), times_of(store)
    harm(shard)
    verified = world.saefty("store", "verify", store)
    assert verified.code == 4
    assert f"layer_2/shard_00003.safetensors of {store} is" in verified.err
    assert len([line for line in verified.err.splitlines() if ".safetensors of" in line]) == 1
    assert f"Run saefty store repair {store}" in verified.err
    repaired = world.saefty("store", "repair", store)
    assert repaired.code == 0, repaired.err
    assert bytes_of(store) == before
    after = times_of(store)
    assert [name for name in after if after[name] != times[name]] == [
        "layer_2/shard_00003.safetensors"
    ]
    assert world.saefty("store", "verify", store).out == "whole\n"


@pytest.mark.parametrize(
    "name", ["examples.jsonl", "plan.json", "rows/shard_00001.safetensors", "manifest.json"]
)
def test_any_other_file_of_a_store_is_mended_too(world, store, name):
    before = bytes_of(store)
    damage(store / name)
    verified = world.saefty("store", "verify", store)
    assert verified.code == 4
    assert name in verified.err
    assert "store repair" in verified.err
    assert world.saefty("store", "repair", store).code == 0
    assert bytes_of(store) == before


def test_a_damaged_manifest_and_a_damaged_shard_are_mended_at_once(world, store):
    before = bytes_of(store)
    damage(store / "manifest.json")
    damage(store / "layer_0" / "shard_00000.safetensors")
    assert world.saefty("store", "repair", store).code == 0
    assert bytes_of(store) == before


def test_a_store_of_features_is_mended_like_one_of_activations(world, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(world.encoded, folder)
    before = bytes_of(folder)
    damage(folder / "layer_0" / "index.safetensors")
    damage(folder / "layer_2" / "shard_00001.safetensors")
    verified = world.saefty("store", "verify", folder)
    assert verified.code == 4
    assert "index.safetensors" in verified.err
    assert "shard_00001" in verified.err
    assert world.saefty("store", "repair", folder).code == 0
    assert bytes_of(folder) == before


def test_a_deleted_record_costs_its_piece_and_no_more(world, store):
    before, times = bytes_of(store), times_of(store)
    (store / "records" / "piece_00002.json").unlink()
    assert world.saefty("store", "verify", store).code == 0
    assert world.saefty("store", "repair", store).code == 0
    assert bytes_of(store) == before
    after = times_of(store)
    assert [name for name in after if after[name] != times[name]] == ["records/piece_00002.json"]


def test_reading_a_damaged_store_names_the_shard_before_any_value_is_used(world, store):
    damage(store / "layer_0" / "shard_00000.safetensors")
    result = world.saefty("train", f"train.store={store}", "sae.k=4", "train.max_steps=2",
                          "run.dir=never")  # fmt: skip
    assert result.code == 4
    assert "layer_0/shard_00000.safetensors" in result.err
    assert f"saefty store repair {store}" in result.err


def test_a_run_resumed_with_other_settings_exits_6_and_names_the_keys(world):
    times = times_of(world.extracted)
    words = world.extract(world.extracted, "extract.limit_examples=7", "data.limit=20")
    result = world.saefty(*words)
    assert result.code == 6
    assert "extract.limit_examples: None -> 7" in result.err
    assert "data.limit: None -> 20" in result.err
    assert "inputs.data.examples: 40 -> 20" in result.err
    assert "set run.dir to a new folder" in result.err
    assert times_of(world.extracted) == times


def test_a_run_whose_data_changed_is_refused(world, tmp_path):
    data = tmp_path / "prompts.jsonl"
    shutil.copy(world.prompts, data)
    words = [f"data.path={data}" if "data.path" in w else w for w in world.extract("data")]
    assert world.saefty(*words).code == 0
    data.write_text(data.read_text().replace("bread", "toast"))
    result = world.saefty(*words)
    assert result.code == 6
    assert "inputs.data.xxh3_128" in result.err


def test_a_finished_run_run_again_changes_nothing(world):
    for folder, command in (
        (world.extracted, world.extract),
        (world.trained, world.train),
        (world.encoded, world.encode),
    ):
        times = times_of(folder)
        result = world.saefty(*command(folder))
        assert result.code == 0, result.err
        assert times_of(folder) == times


def test_a_folder_with_other_files_is_not_touched(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".tmp-notes").write_text("mine too")
    result = world.saefty(*world.extract(tmp_path))
    assert result.code == 2
    assert "is not empty and holds no run" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "thesis.tex"]
