"""What all tests share: no network, one thread of arithmetic order, tiny models built once."""

import logging
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes and types in signatures are checked in every test; an int may stand for a float.
install_import_hook("saefty", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# A shell that starts a job in the background lets it ignore Ctrl-C, and its children inherit that;
# the tests of interruption need it as a terminal gives it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Where there is no GPU, Triton's programs are interpreted; Triton asks when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Refuse every connection that leaves the machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise ConnectionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """Take away what a command in this process sets up: its stream is closed by the next test."""
    ours = logging.getLogger("saefty")
    before = (list(ours.handlers), ours.level, ours.propagate)
    yield
    ours.handlers[:], ours.propagate = before[0], before[2]
    ours.setLevel(before[1])


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder with a random Llama of 3 blocks, 32 wide, and its tokenizer."""
    import tiny_models

    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.build("llama", folder)
    return folder
