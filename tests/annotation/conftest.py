"""A tiny model with SAEs, in a folder of the test's own."""

from pathlib import Path

import pytest

from annotating import made_model


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A tiny Gemma 2 that takes 512 tokens, and SAEs of blocks 1 and 2."""
    return made_model("gemma2", tmp_path_factory.mktemp("gemma"), "jumprelu")
