"""Guards of the three kinds, and the model that they read."""

import shutil

import pytest

import tiny_models
from guard_cases import KINDS, make_guard


@pytest.fixture(scope="session")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """One guard of each kind; never written to."""
    folder = tmp_path_factory.mktemp("guards")
    return {kind: make_guard(folder / kind, kind, "max") for kind in KINDS}


@pytest.fixture
def copied(saved, tmp_path):
    """Return a function that copies a guard, to be damaged."""

    def copy_of(kind):
        return shutil.copytree(saved[kind], tmp_path / f"copy-of-{kind}")

    return copy_of
