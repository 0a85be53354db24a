"""Training that reads the next batch meanwhile: the same batches, bytes and errors."""

import signal
import threading
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from saefty import fsio, training_pass
from saefty.checkpoints import latest_checkpoint
from saefty.errors import IntegrityError, NumericError
from saefty.interrupts import Terminated, handled
from saefty.saes.section import SaeSection
from saefty.stores.activations import ActivationStore
from saefty.training import OptimizerSection, TrainSection, train_saes
from saefty.training_data import Cursor, stream
from stores import planted_store

SIZE, COUNTS = 64, (150, 210, 130, 180)
ALL = np.ones(sum(COUNTS), dtype=bool)
TRAIN = TrainSection(
    max_steps=30, batch_size=SIZE, eval_every=10, log_every=1, checkpoint_every=7, dead_rows=900
)


@pytest.fixture
def store(tmp_path):
    return planted_store.make(tmp_path / "store", COUNTS, (0,), torch.float16)


def train(folder, store, **given):
    return train_saes(
        store, SaeSection(d_sae=12, k=2), TRAIN, OptimizerSection(lr=1e-3), folder, threads=1,
        **given,
    )  # fmt: skip


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def readers():
    """Threads that run. One whose start was interrupted may wait for ever, given nothing."""
    return [t for t in threading.enumerate() if t.name == "saefty aside" and t.is_alive()]


def by_hand(store, epochs, keep):
    """The batches of some epochs: the rows that are named, looked up one by one."""
    x = planted_store.rows_of(0, 0, store.n_rows).half().float()
    for epoch in range(epochs):
        order = training_pass.epoch_seed(5, epoch)
        for index, rows in enumerate(store.batch_rows(SIZE, order, keep=keep)):
            if 2 * len(rows) >= SIZE:
                yield Cursor(epoch, index), torch.stack([x[int(row)] for row in rows])


@pytest.mark.parametrize("ahead", [True, False])
def test_the_stream_of_a_store_is_that_of_its_rows_looked_up_one_by_one(store, ahead):
    keep = np.arange(store.n_rows) % 5 != 0
    wanted = list(by_hand(store, 3, keep))
    with closing(stream(store, 0, SIZE, 5, keep, Cursor(), ahead=ahead)) as batches:
        found = list(islice(batches, len(wanted)))
    assert [place for place, _ in found] == [place for place, _ in wanted]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(found, wanted, strict=True))
    assert not readers()


def test_training_ends_with_the_same_bytes_whether_it_reads_ahead_or_not(store, tmp_path):
    for name, overlap in (("ahead", True), ("after", False)):
        train(tmp_path / name, store, overlap=overlap)
    assert files(tmp_path / "ahead") == files(tmp_path / "after")
    lines = fsio.read_lines(tmp_path / "ahead" / "layer_0" / "train_log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert not readers()


def at_step(patch, moment, act):
    step = training_pass.Trainee.step

    def stepping(self, x, number):
        if number == moment:
            act()
        return step(self, x, number)

    patch.setattr(training_pass.Trainee, "step", stepping)


@pytest.mark.parametrize("again", [True, False])
def test_what_was_trained_on_is_remembered_and_not_what_was_read(
    store, tmp_path, monkeypatch, again
):
    train(tmp_path / "whole", store)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch, handled(), pytest.raises(Terminated):
        at_step(patch, 11, lambda: signal.raise_signal(signal.SIGTERM))
        train(stopped, store)
    assert not readers()
    found = latest_checkpoint(stopped / "checkpoints" / "layer_0")
    place = Cursor(*found.state["cursor"])
    n_train = sum(COUNTS) - fsio.read_json(tmp_path / "whole/layer_0/metrics.json")["n_rows"]
    per_epoch = -(-n_train // SIZE) - (2 * (n_train % SIZE) < SIZE)
    assert found.step == 12
    assert place.epoch * per_epoch + place.batch == 12
    train(stopped, store, overlap=again)
    assert files(stopped) == files(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_an_exception_in_a_step_leaves_no_thread_behind(store, tmp_path, monkeypatch, error):
    def fail():
        assert len(readers()) == 1
        raise error

    at_step(monkeypatch, 4, fail)
    with pytest.raises(error) as kept:  # its traceback holds on to all that was on the way
        train(tmp_path / "sae", store)
    assert not readers()
    assert kept.tb is not None


class Failing(ActivationStore):
    """A store of which one batch of the second epoch is damaged."""

    def stored_batches(self, layer, size, seed=None, *, keep=None, start=0):
        batches = super().stored_batches(layer, size, seed, keep=keep, start=start)
        for index, x in enumerate(batches, start):
            if seed == training_pass.epoch_seed(0, 1) and index == 2:
                raise IntegrityError("shard_00001 is damaged", then="repair it")
            yield x


def steps_before(error, source, folder, overlap):
    """Train into an error; return its words, and the log of the steps before it."""
    with pytest.raises(error) as caught:
        train(folder, source, overlap=overlap)
    assert not readers()
    return str(caught.value), (folder / "layer_0" / "train_log.jsonl").read_bytes()


def test_an_error_of_the_reader_comes_behind_the_steps_before_it(store, tmp_path):
    source = Failing(store.folder)
    ahead, after = (
        steps_before(IntegrityError, source, tmp_path / str(overlap), overlap)
        for overlap in (True, False)
    )
    assert ahead == after
    assert "shard_00001 is damaged" in ahead[0]
    assert ahead[1].count(b'"loss"') > 3


def test_a_row_that_is_not_finite_is_named_behind_the_steps_before_it(tmp_path):
    class Late(ActivationStore):
        def stored_batches(self, layer, size, seed=None, *, keep=None, start=0):
            batches = super().stored_batches(layer, size, seed, keep=keep, start=start)
            for index, x in enumerate(batches, start):
                if seed == training_pass.epoch_seed(0, 1) and index == 1:
                    x[7] = float("inf")
                yield x

    store = planted_store.make(tmp_path / "store", COUNTS, (0,), torch.float16)
    ahead, after = (
        steps_before(NumericError, Late(store.folder), tmp_path / str(overlap), overlap)
        for overlap in (True, False)
    )
    assert ahead == after
    assert "1 of the 64 rows of batch 1 of epoch 1 of layer 0 hold NaN or infinity" in ahead[0]


def test_finite_rows_whose_sum_is_too_large_are_no_error(tmp_path):
    store = planted_store.make(tmp_path, (128,), (0,), torch.float32)
    huge = torch.full((64, 3), 3e38)

    class Huge(ActivationStore):
        def stored_batches(self, *given, **named):
            yield huge.clone()

    place, x = next(stream(Huge(store.folder), 0, 64, 0, np.ones(128, bool), Cursor()))
    assert place == Cursor()
    assert torch.equal(x, huge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_batches_are_those_of_float32_in_their_own_dtype(tmp_path, dtype):
    store = planted_store.make(tmp_path, COUNTS, (0,), dtype)
    kept, cast = (list(read(0, 50, 3)) for read in (store.stored_batches, store.batches))
    assert {x.dtype for x in kept} == {dtype}
    assert {x.dtype for x in cast} == {torch.float32}
    rows = planted_store.rows_of(0, 0, store.n_rows).to(dtype).float()
    for x, y, numbers in zip(kept, cast, store.batch_rows(50, 3), strict=True):
        assert torch.equal(x.float(), y)
        assert torch.equal(y, rows[torch.from_numpy(numbers)])
    assert store.take(0, np.zeros(0, np.int64)).shape == (0, 3)
    assert len({x.data_ptr() for x in kept}) == len(kept)
