"""What a run will write, by its plan, against what it does write."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty import fsio
from saefty.checkpoints import Checkpoint, best_weights, save_checkpoint, save_tensors
from saefty.optimisation import Trainee
from saefty.reading import PoolingSection, ReadingSection, prepare
from saefty.records import Example
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae
from saefty.space import activation_bytes, feature_bytes, planned_rows, training_bytes
from saefty.stores import index
from saefty.stores.activations import ROW_COLUMNS, commit_activations
from saefty.stores.base import StoreWriter
from saefty.stores.features import commit_features
from saefty.stores.index import build_index
from saefty.tensorfile import pack
from saefty.training_settings import OptimizerSection


def held(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("pooling", ["none", "eos", "text_only_mean"])
def test_the_rows_of_a_plan_are_the_tokens_kept_or_one_an_example(pooling):
    model = tiny_models.load("llama")
    texts = ["How do I bake bread?", "Mix.", "word " * 200, ""]  # one too long, one empty
    examples = [Example(f"e{i}", text, raw=True) for i, text in enumerate(texts)]
    section = ReadingSection(pooling=PoolingSection(name=pooling))
    reading = prepare(model, examples, section)
    tokens = [len(model.tokenize([one])[0].ids) - 1 for one in examples[:2]]  # BOS is no row
    assert planned_rows(reading, section) == (sum(tokens) if pooling == "none" else 2)


def test_the_bytes_of_a_store_of_features_are_those_of_its_files(tmp_path):
    n, k, d_sae = 4000, 16, 64
    writer = StoreWriter(tmp_path, "features", "f")
    rows = {name: np.zeros(n, kind) for name, kind in ROW_COLUMNS.items()}
    code = {
        "indptr": np.arange(n + 1) * k,
        "ids": np.tile(np.arange(k), n),
        "values": np.ones(n * k, np.float32),
    }
    commit_features(writer, 0, {0: code, 1: code}, rows, {})
    for layer in (0, 1):
        build_index(tmp_path, layer, 1, d_sae)
    assert feature_bytes(n, [k, k]) == pytest.approx(held(tmp_path), rel=0.01)


def test_a_large_index_needs_room_for_its_buckets_too(tmp_path, monkeypatch):
    n, layers = 4000, [16, 8]
    at_once = feature_bytes(n, layers)
    monkeypatch.setattr("saefty.stores.index.ENTRIES_AT_ONCE", 30_000)
    monkeypatch.setattr("saefty.space.ENTRIES_AT_ONCE", 30_000)
    ends = []
    read = index._Buckets.read
    monkeypatch.setattr(
        index._Buckets, "read", lambda self, places: ends.append(self._end) or read(self, places)
    )
    for layer, k in enumerate(layers):
        rng = np.random.default_rng(0)
        code = {
            "indptr": np.arange(n + 1) * k,
            "ids": rng.integers(0, 64, n * k).astype(np.uint32),
            "values": rng.random(n * k, dtype=np.float32),
        }
        fsio.commit_bytes(tmp_path / f"layer_{layer}/shard_00000.safetensors", pack(code, {}))
        build_index(tmp_path, layer, 1, 64)
    assert feature_bytes(n, layers) - at_once == max(ends)


def test_the_bytes_of_a_store_are_those_of_its_files(tmp_path):
    n, d, layers = 5000, 64, 3
    writer = StoreWriter(tmp_path, "activations", "f")
    rows = {name: np.zeros(n, kind) for name, kind in ROW_COLUMNS.items()}
    x = {layer: torch.zeros(n, d, dtype=torch.bfloat16) for layer in range(layers)}
    commit_activations(writer, 0, x, rows, {})
    assert activation_bytes(n, d, layers, 2) == pytest.approx(held(tmp_path), rel=0.001)


def test_the_bytes_of_a_training_are_those_of_its_checkpoints_and_saes(tmp_path):
    config = SaeConfig("topk", 64, 1024, 8)
    pupil = Trainee(config, OptimizerSection(), grad_clip=None, n_steps=9, dead_after=9)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    pupil.start(x, 0)
    for step in (1, 2):
        pupil.step(x, step)
        save_checkpoint(tmp_path / "c", Checkpoint(step, pupil.state(), {}))
    save_tensors(best_weights(tmp_path / "c", 0), pupil.weights())
    save_sae(config.build(), tmp_path / "layer_0")
    one_checkpoint = (tmp_path / "c" / "step_00000002.safetensors").stat().st_size
    # A third checkpoint is there before the first is removed.
    assert training_bytes([config], 1) == pytest.approx(held(tmp_path) + one_checkpoint, rel=0.02)
