"""A run of `saefty tokens` on a tiny model with random SAEs."""

from pathlib import Path

import pytest
import torch

import tiny_models
from saefty import sentences
from saefty.records import Site
from saefty.saes.base import ARCHITECTURES, SaeConfig
from saefty.saes.native import save_sae
from token_place import D_SAE, FIRST, SECOND, SEED_CONFIG, K, Place


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Place:
    """A tiny Llama with a byte-level tokenizer, random SAEs, and the seed's files."""
    folder = tmp_path_factory.mktemp("tokens")
    model = tiny_models.build("llama", folder / "llama")
    torch.manual_seed(0)
    for layer in (0, 1, 2):
        config = SaeConfig(arch="topk", d_in=tiny_models.D_MODEL, d_sae=D_SAE, k=K)
        sae = ARCHITECTURES["topk"](config)
        sae.site = Site(layer)
        for parameter in sae.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_sae(sae, folder / "saes" / f"layer_{layer}")
    (folder / "data").mkdir()
    (folder / "data" / "sentences1.csv").write_text("\n".join(FIRST))
    (folder / "data" / "sentences2.csv").write_text("\r\n".join(SECOND) + "\r\n")
    config = SEED_CONFIG.format(model=model, saes=folder / "saes")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return Place(folder, model, folder / "saes")


@pytest.fixture
def place(made, monkeypatch) -> Place:
    monkeypatch.chdir(made.folder)
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    return made


@pytest.fixture(scope="module")
def run(made) -> Path:
    """A run of the seed's config with the tree of JSONL and one sentence's pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        words = ["output.jsonl=true", "pictures.sentences=1", "dpi=30", "run.dir=made"]
        return made.folder / sentences.run(made.config(*words)).folder
