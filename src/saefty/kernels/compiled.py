"""The C++ files as one library: compiled at first use by this machine's own compiler, and kept.

They have plain C functions, so they need no headers of Python or torch and compile in a second
or two. The library's name holds a checksum of source, flags, compiler and the processor's own
instructions: another of any of them compiles anew, and machines that share a home folder do not
meet each other's. Without a compiler there is no library, and the kernels in pure torch run.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefty import fsio

log = logging.getLogger(__name__)

PARTS = ("cpu", "pointwise", "reaching", "slices", "split", "tiles")
SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in PARTS)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("sums.h", "tiles.h", "selection.h"))
FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-std=c++17",
    "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Library:
    """What came of compiling: the functions, or why there are none."""

    functions: ctypes.CDLL | None
    reason: str
    """In a run's record: what was compiled with what, or why the kernels in torch run instead."""


@cache
def library() -> Library:
    """Return the compiled kernels of this process, compiling them if this machine has not yet."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if sys.byteorder != "little":
        return Library(None, "the compiled kernels are for little-endian processors")
    if compiler is None:
        return Library(None, f"no compiler ({', '.join(COMPILERS)}; CXX names another)")
    try:
        machine = _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
        sources = [path.read_text("utf-8") for path in (*SOURCES, *HEADERS)]
        told = "\n".join([*sources, *FLAGS, *_openmp(), machine])
        path = _folder() / f"{fsio.digest_blocks([told.encode()])}.so"
        if not path.is_file():
            log.info("compiling the CPU kernels with %s (once, a few seconds)", compiler)
            with fsio.staged(path) as temporary:
                files = (*map(str, SOURCES), *_openmp())
                _run(compiler, *FLAGS, "-I", str(HEADERS[0].parent), *files, "-o", str(temporary))
        return Library(ctypes.CDLL(str(path)), f"compiled by {compiler} for this processor")
    except (OSError, subprocess.SubprocessError, fsio.DiskError) as error:
        told = getattr(error, "stderr", None) or str(error)
        reason = f"{compiler} failed: {str(told).strip().splitlines()[0] if told else error}"
        log.warning("the CPU kernels are not compiled (%s); pure torch runs, more slowly", reason)
        return Library(None, reason)


def plain(*tensors: Tensor) -> bool:
    """Return whether these are what the C functions read: contiguous float32 on the CPU."""
    return all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def call(function: Callable[..., Any], *arguments: Tensor | int | float) -> None:
    """Call a C function: tensors by address, integers as int64, numbers as float."""
    function(*map(_as_c, arguments))


def _as_c(given: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(given, Tensor):
        return ctypes.c_void_p(given.data_ptr())
    return ctypes.c_int64(given) if isinstance(given, int) else ctypes.c_float(given)


def _folder() -> Path:
    """Return where libraries are kept: a folder that nobody else can write to.

    Raises:
        OSError: If it belongs to another user, whose code would be run.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "saefty" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(f"others than you can write to {folder}, and code is loaded from it")
    return folder


def _openmp() -> list[str]:
    """Return torch's own OpenMP library, so that both work with the same threads."""
    return sorted(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*")))


def _run(*command: str) -> str:
    # The compiler is the user's own, named by CXX or found on the PATH.
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout
