"""A folder with a tiny vision-language model, memes and a store of their contrasts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import tiny_vlms
from pipeline.forkserver import Commands
from saefty.stores.activations import ActivationStore
from vision_data import write_memes

CONFIGS = Path(__file__).parents[2] / "configs"
N = 48
LAYERS = (0, 2)


@dataclass(frozen=True)
class Memes:
    """A folder with a tiny vision-language model, memes, and a store of their contrasts."""

    saefty: Commands
    folder: Path
    data: list[str]
    """The words that name the model and the memes."""
    extracted: Path

    def extract(self, out: Path | str, *words: str) -> list[str]:
        """The command that made `extracted`: pooled contrasts in pieces of six."""
        return [
            "extract", "-c", str(CONFIGS / "extract_vlm.yaml"), *self.data,
            "extract.layers=[0,2]", "extract.save.shard_size=6", *words, f"run.dir={out}",
        ]  # fmt: skip

    def run(self, *words: object) -> str:
        """Run a command that must succeed; return what it printed."""
        result = self.saefty(*words)
        assert result.code == 0, result.err
        return result.out


def make(saefty: Commands, folder: Path) -> Memes:
    """Write model and memes, and run the first command."""
    model = tiny_vlms.build("llava", folder / "llava")
    table = write_memes(folder, N)
    data = [
        f"model.name={model}", "model.dtype=float32", "model.device_map=null", "data.name=local",
        f"data.path={table}", "data.prompt=instruction", "data.image=image_path", "data.id=id",
        "data.label=sentiment", "data.harmful=[negative]",
    ]  # fmt: skip
    made = Memes(saefty, folder, data, folder / "extracted")
    made.run(*made.extract(made.extracted))
    return made


def store_of(folder: Path) -> ActivationStore:
    return ActivationStore.open(folder)


def rows_of(store: ActivationStore, layer: int) -> np.ndarray:
    return torch.cat(list(store.batches(layer, 100))).numpy()
