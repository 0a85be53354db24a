import signal

import pytest
import torch

from saefty import fsio, matmul, training_pass
from saefty.backends import Backend
from saefty.errors import IntegrityError, MismatchError
from saefty.interrupts import Terminated, handled
from saefty.kernels.base import choose_kernels
from test_matmul import OTHER, reachable, says, says_inaccurate, switch
from test_resuming import at_step, train
from test_training import files

KERNELS = type(choose_kernels("cpu")).__name__


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _as_if_nothing_were_faster(monkeypatch):
    says(monkeypatch, default=1.0)


def test_a_new_run_takes_torchs_number_of_threads_or_the_one_asked_for(tmp_path):
    torch.set_num_threads(2)
    assert Backend.choose(tmp_path, "cpu") == Backend("cpu", KERNELS, 2)
    assert Backend.choose(tmp_path, "cpu", 1).threads == 1


def test_a_run_goes_on_with_the_threads_it_was_begun_with(tmp_path):
    Backend("cpu", KERNELS, 2).note(tmp_path)
    torch.set_num_threads(1)
    backend = Backend.choose(tmp_path, "cpu")
    with backend.in_use():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_threads_come_back_after_an_error(tmp_path):
    torch.set_num_threads(1)
    with pytest.raises(ZeroDivisionError), Backend("cpu", KERNELS, 2).in_use():
        _ = 1 / 0
    assert torch.get_num_threads() == 1


def test_other_threads_or_another_device_are_refused_with_both_values(tmp_path):
    Backend("cpu", KERNELS, 2).note(tmp_path)
    assert Backend.choose(tmp_path, "cpu", 2).threads == 2
    with pytest.raises(MismatchError, match=r"backend\.threads: 2 -> 1") as caught:
        Backend.choose(tmp_path, "cpu", 1)
    assert "set run.dir to a new folder" in caught.value.then
    with pytest.raises(MismatchError, match=r"backend\.device: 'cpu' -> 'meta'"):
        Backend.choose(tmp_path, "meta")


def test_a_damaged_note_is_named(tmp_path):
    (tmp_path / "backend.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"backend\.json"):
        Backend.choose(tmp_path, "cpu")


def test_the_way_to_multiply_is_noted_with_the_errors_of_all_and_kept(tmp_path, monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    backend = Backend.choose(tmp_path, "cpu")
    assert backend.matmul == OTHER
    backend.note(tmp_path)
    note = fsio.read_json(tmp_path / "backend.json")
    assert note["matmul"] == OTHER
    assert note["matmul_errors"] == {"default": "1e-07", OTHER: "1e-07"}
    says(monkeypatch, default=1.0, onednn_tf32=9.0)
    assert Backend.choose(tmp_path, "cpu") == backend
    says_inaccurate(monkeypatch)
    with pytest.raises(MismatchError, match=r"backend\.matmul: 'onednn-tf32' -> 'default'"):
        Backend.choose(tmp_path, "cpu")


def test_a_note_that_says_nothing_of_it_is_of_torchs_default(tmp_path, monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    fsio.commit_json(tmp_path / "backend.json", {"device": "cpu", "kernels": KERNELS, "threads": 2})
    assert Backend.choose(tmp_path, "cpu").matmul == matmul.DEFAULT
    monkeypatch.setenv(matmul.VARIABLE, OTHER)
    with pytest.raises(MismatchError, match=r"backend\.matmul: 'default' -> 'onednn-tf32'"):
        Backend.choose(tmp_path, "cpu")


def test_another_device_than_the_cpu_has_no_way_of_ours(tmp_path, monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    assert Backend.choose(tmp_path, "meta").matmul == matmul.DEFAULT


@reachable
def test_an_interrupted_training_goes_on_the_way_it_was_begun(tmp_path, monkeypatch):
    says(monkeypatch, default=9.0, onednn_tf32=1.0)
    before, seen, step = switch(), [], training_pass.Trainee.step

    def stepping(self, x, number):
        seen.append(switch())
        return step(self, x, number)

    monkeypatch.setattr(training_pass.Trainee, "step", stepping)
    train(tmp_path / "whole", max_steps=14)
    with monkeypatch.context() as patch, handled(), pytest.raises(Terminated):
        at_step(patch, 9, signal.SIGTERM)
        train(tmp_path / "halves", max_steps=14)
    assert switch() == before
    says(monkeypatch, default=1.0, onednn_tf32=9.0)
    train(tmp_path / "halves", max_steps=14)
    assert set(seen) == {"tf32"}
    assert len(seen) == 2 * (14 + 14)  # two SAEs, twice
    note = tmp_path / "halves" / "backend.json"
    assert files(tmp_path / "halves") == files(tmp_path / "whole")
    assert fsio.read_json(note)["matmul"] == OTHER
