"""A small store of known rows: row r of layer l is [1000 l + r, ...]."""

from pathlib import Path

import numpy as np
import torch

from saefty import fsio
from saefty.stores.activations import KIND, ROW_COLUMNS, ActivationStore, commit_activations
from saefty.stores.base import EXAMPLES, StoreWriter

D_IN = 3


def make(
    folder: Path,
    counts=(5, 7, 4),
    layers=(0, 2),
    dtype=torch.float32,
    examples=None,
    contrast=None,
    part="resid_post",
) -> ActivationStore:
    writer = StoreWriter(folder, KIND, "fingerprint")
    records, first = [], 0
    for piece, n in enumerate(counts):
        x = {layer: rows_of(layer, first, n).to(dtype) for layer in layers}
        owner = piece if examples is None else examples[piece]
        table = {name: np.full(n, owner, kind) for name, kind in ROW_COLUMNS.items()}
        table["token_pos"] = np.arange(n, dtype=np.int32)
        records.append(commit_activations(writer, piece, x, table, {"masked": {}}))
        first += n
    examples = [
        {"example_id": f"e{i}", "label": [True, False, None][i % 3]} for i in range(len(counts))
    ]
    fsio.commit_text(folder / EXAMPLES, "".join(map(fsio.dump_json_line, examples)))
    facts = {
        "layers": list(layers),
        "sites": {str(layer): f"blocks.{layer}.hook_{part}" for layer in layers},
        "d_in": D_IN,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if contrast is not None:
        facts["contrast"] = contrast
    writer.finish(records, facts, [EXAMPLES])
    return ActivationStore.open(folder)


def rows_of(layer: int, first: int, n: int) -> torch.Tensor:
    base = 1000 * layer + torch.arange(first, first + n)
    return base[:, None].expand(n, D_IN).float() + torch.arange(D_IN) / 4
