"""One world for all: the sandbox's activations, an SAE of each architecture, other texts."""

from pathlib import Path

import pytest
import torch

import planted_faults
import saefty as sf
from saefty.models.base import ModelAdapter
from saefty.records import Example
from saefty.sandbox.language_model import MODEL_FOLDER


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a store of four blocks, and a folder of SAEs of block 1 an architecture."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    return planted_faults.train_all(folder, 500, planted_faults.ARCHITECTURES, width=96)


@pytest.fixture(scope="session")
def sandbox() -> ModelAdapter:
    return sf.load_model(str(MODEL_FOLDER))


@pytest.fixture(scope="session")
def other_texts() -> list[Example]:
    """Texts of the same world that nothing was trained or measured on."""
    return planted_faults.texts(300, 77)


@pytest.fixture(scope="session")
def zoo_home(tmp_path_factory) -> Path:
    """The folder of the patients of tests/zoo.py, who share their trainings."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("zoo")
