"""A tiny model, a vector to steer it with, and pictures that are quick."""

import pytest
import torch

import tiny_models
from saefty import steering_report
from saefty.interventions.vectors import SteeringVector
from steer_sweeps import SITE, write_data


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("vector") / "v"
    made = SteeringVector(values, SITE, "test", provenance={"model": "tiny"})
    return made.save(folder)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Write what a picture shows in its place: drawing takes most of a small sweep's time."""
    monkeypatch.setattr(steering_report, "save_plot", write_data)
