"""The compiled kernels come once, from this machine's compiler, or not at all and with a reason."""

import logging
import shutil
import stat

import pytest
import torch

from saefty.kernels import compiled
from saefty.kernels.base import KERNELS, choose_kernels


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A machine that has compiled nothing yet; what this process found out comes back behind it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiled.library.cache_clear()
    yield tmp_path / "saefty" / "kernels"
    compiled.library.cache_clear()


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiled.COMPILERS)), reason="there is no compiler"
)


@needs_compiler
def test_the_first_use_compiles_and_says_so_and_the_second_does_not(fresh, caplog):
    caplog.set_level(logging.INFO)
    assert compiled.library().functions is not None
    assert caplog.text.count("compiling") == 1
    compiled.library.cache_clear()
    assert "compiled by" in compiled.library().reason
    assert caplog.text.count("compiling") == 1
    assert len(list(fresh.glob("*.so"))) == 1


@needs_compiler
def test_another_source_is_another_library(fresh, tmp_path, monkeypatch):
    compiled.library()
    first, *others = compiled.SOURCES
    changed = tmp_path / first.name
    changed.write_text(first.read_text("utf-8") + "// changed\n", "utf-8")
    monkeypatch.setattr(compiled, "SOURCES", (changed, *others))
    compiled.library.cache_clear()
    compiled.library()
    assert len(list(fresh.glob("*.so"))) == 2


def test_without_a_compiler_torch_runs_and_the_reason_is_known(fresh, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert compiled.library().functions is None
    assert "no compiler" in compiled.library().reason
    assert type(choose_kernels("cpu")) in (KERNELS["screened"], KERNELS["torch_sparse"])
    with pytest.raises(RuntimeError, match="no compiler"):
        KERNELS["cpu"]()


def test_a_compiler_that_fails_is_a_warning_with_its_first_line(
    fresh, tmp_path, monkeypatch, caplog
):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'out of licences' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert compiled.library().functions is None
    assert "out of licences" in compiled.library().reason
    assert "pure torch runs" in caplog.text
    assert not list(fresh.glob("*"))


@needs_compiler
def test_a_library_in_a_folder_that_others_can_write_to_is_not_loaded(fresh):
    compiled.library()
    fresh.chmod(0o777)
    compiled.library.cache_clear()
    assert compiled.library().functions is None
    assert "others than you can write" in compiled.library().reason
    fresh.chmod(stat.S_IRWXU)


def test_a_run_can_ask_for_the_kernels_that_it_began_with():
    assert type(choose_kernels("cpu", "TorchSparse")) is KERNELS["torch_sparse"]
    assert type(choose_kernels("cpu", "Unknown")) is type(choose_kernels("cpu"))


def test_threads_do_not_change_a_bit_of_the_compiled_sums():
    kernels = choose_kernels("cpu")
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    code = kernels.topk(x, W, torch.zeros(4096), 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            error, dots = kernels.errors(code, x, W.T.contiguous(), x[0])
            found.append((error, dots, kernels.latent_gradients(code, dots, x, error, 1.0, 4096)))
    finally:
        torch.set_num_threads(before)
    (error, dots, one), (other, again, two) = found
    assert torch.equal(error, other)
    assert torch.equal(dots, again)
    assert torch.equal(one.W_enc, two.W_enc)
    assert torch.equal(one.W_dec, two.W_dec)
