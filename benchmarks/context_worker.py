"""A library's activations of fixed contexts: `context_speed.py` runs this file in each environment.

Usage: python benchmarks/context_worker.py LIBRARY DTYPE FOLDER PASSES

FOLDER holds a model and `tokens.npy`, contexts of one length. Each library reads block 5 over all
of them, once to warm up and then PASSES times, and leaves the rows in `FOLDER/LIBRARY_DTYPE.npy`.
The last line of the output is JSON.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import measure

BLOCK, CONTEXTS_AT_ONCE = 5, 8


class Saefty:
    """`saefty extract` but for loading the model: from texts to a store, and its rows read back."""

    def __init__(self, folder: Path, dtype: str, tokens: np.ndarray) -> None:
        from saefty.models.base import load_model
        from saefty.records import Example

        self.folder, self.dtype = folder, dtype
        self.adapter = load_model(str(folder / "model"), dtype=dtype, device="cpu")
        words = [" ".join(self.adapter.tokenizer.convert_ids_to_tokens(row)) for row in tokens]
        self.examples = [Example(str(i), text, raw=True) for i, text in enumerate(words)]

    def rows(self) -> torch.Tensor:
        from saefty.runs import RunSection
        from saefty.stages import extract
        from saefty.stores.activations import ActivationStore

        out = self.folder / f"store_{self.dtype}"
        shutil.rmtree(out, ignore_errors=True)
        config = extract.ExtractConfig(
            model={"name": str(self.folder / "model"), "dtype": self.dtype, "device": "cpu"},
            extract={"layers": [BLOCK]},
            run=RunSection(dir=str(out)),
        )
        extract.run(config, model=self.adapter, examples=self.examples)
        store = ActivationStore.open(out)
        return torch.cat([store.shard(BLOCK, i) for i in range(len(store.pieces))])


class SaeLens:
    """ActivationsStore over contexts that are tokens already, without its mixing, in memory."""

    def __init__(self, folder: Path, dtype: str, tokens: np.ndarray) -> None:
        from datasets import Dataset
        from sae_lens.load_model import load_model
        from sae_lens.training.activations_store import ActivationsStore

        model = load_model(
            "AutoModelForCausalLM", str(folder / "model"), "cpu", {"dtype": getattr(torch, dtype)}
        )
        self.batches = len(tokens) // CONTEXTS_AT_ONCE
        self.store = ActivationsStore(
            model,
            Dataset.from_dict({"input_ids": tokens.tolist()}),
            streaming=False,
            hook_name=f"model.layers.{BLOCK}",
            hook_head_index=None,
            context_size=tokens.shape[1],
            d_in=model.model.config.hidden_size,
            n_batches_in_buffer=1,
            total_training_tokens=tokens.size,
            store_batch_size_prompts=CONTEXTS_AT_ONCE,
            train_batch_size_tokens=4096,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype=dtype,
        )

    def rows(self) -> torch.Tensor:
        return torch.cat([self.store.get_raw_llm_batch()[0] for _ in range(self.batches)])


LIBRARIES = {"saefty": Saefty, "sae-lens": SaeLens}


def run(library: str, dtype: str, folder: Path, passes: int) -> dict[str, object]:
    reader = LIBRARIES[library](folder, dtype, np.load(folder / "tokens.npy"))
    np.save(folder / f"{library}_{dtype}.npy", reader.rows().float().numpy())
    before = measure.calibrate()
    times = measure.timed(reader.rows, passes)
    return {"times": times, "calibration": [before, measure.calibrate()]}


if __name__ == "__main__":
    name, kind, place, number = sys.argv[1:]
    print("\n" + json.dumps(run(name, kind, Path(place), int(number))))
