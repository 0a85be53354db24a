import errno
import os
import resource
import stat
import subprocess
import sys

import pytest

from saefty import fsio
from saefty.errors import DiskError, IntegrityError, UnsafeArtifactError


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    fsio.commit_json(path, {"old": 1})
    with pytest.raises(RuntimeError), fsio.staged(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert fsio.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_disk_keeps_the_old_file_and_is_typed(tmp_path, monkeypatch, call, number):
    path = tmp_path / "a.json"
    fsio.commit_json(path, {"old": 1})

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskError, match=r"a\.json could not be written"):
        fsio.commit_json(path, {"new": 2})
    monkeypatch.undo()
    assert fsio.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_disk_that_fills_in_the_middle_of_a_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    fsio.commit_bytes(path, b"old")
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
from saefty import fsio
from saefty.errors import DiskError
try:
    fsio.commit_bytes({str(path)!r}, b"x" * 100_000)
except DiskError as error:
    sys.exit(error.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 5
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_committed_file_has_the_mode_that_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        fsio.commit_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_nan_both_ways(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        fsio.commit_json(tmp_path / "a.json", value)
    (tmp_path / "b.json").write_text("[NaN]")
    with pytest.raises(IntegrityError, match="NaN is not JSON"):
        fsio.read_json(tmp_path / "b.json")


def test_a_torn_last_line_of_a_journal_is_left_out_but_a_damaged_one_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    fsio.append_line(path, {"a": 1})
    fsio.append_line(path, {"a": 2})
    with open(path, "a") as file:
        file.write('{"a": ')
    assert fsio.read_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(IntegrityError, match="line 2 is damaged"):
        fsio.read_lines(path)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b", "C:x", "link/x"]
)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafeArtifactError):
        fsio.safe_join(tmp_path / "store", name)


def test_a_name_inside_its_folder_is_joined(tmp_path):
    assert fsio.safe_join(tmp_path, "layer_0/x.safetensors") == tmp_path / "layer_0/x.safetensors"
