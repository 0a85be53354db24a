"""How many bytes a run will write, by its plan: known before the first forward pass.

Estimates of the large files alone; tables, records and logs are small beside them. What a run needs
is compared with what is free by `Run.require_space`.
"""

from collections.abc import Sequence

import numpy as np

from saefty.checkpoints import KEPT
from saefty.reading import Reading, ReadingSection
from saefty.saes.base import SaeConfig
from saefty.stores.activations import ROW_COLUMNS
from saefty.stores.index import ENTRIES_AT_ONCE, ENTRY

ROW_BYTES = sum(np.dtype(kind).itemsize for kind in ROW_COLUMNS.values())
CODE_BYTES = 4 + 4  # a latent's number and its value, by token
INDEX_BYTES = 8 + 4  # a row's number and the value, by latent
FLOAT_BYTES = 4


def planned_rows(reading: Reading, section: ReadingSection) -> int:
    """Return how many rows a reading will give, if none is dropped as not finite."""
    usable = np.array(reading.statuses) == "ok"
    return int(usable.sum() if section.pooling.name != "none" else reading.kept[usable].sum())


def activation_bytes(rows: int, d_in: int, n_layers: int, item_bytes: int) -> int:
    """Return the size of a store of activations.

    Args:
        rows: Rows of each layer.
        d_in: Values in a row.
        n_layers: Layers.
        item_bytes: Bytes of a value: 4 in float32, 2 in float16 and bfloat16.
    """
    return rows * (ROW_BYTES + n_layers * d_in * item_bytes)


def feature_bytes(rows: int, fired: Sequence[float]) -> int:
    """Return the size of a store of features, its index included and how that is made.

    Args:
        rows: Tokens.
        fired: For each layer how many latents fire on a token, on average.
    """
    entries = rows * max(fired, default=0.0)  # the layers are turned round one after another
    aside = entries * ENTRY.itemsize if entries > ENTRIES_AT_ONCE else 0
    stored = ROW_BYTES + sum(8 + n * (CODE_BYTES + INDEX_BYTES) for n in fired)
    return round(rows * stored + aside)


def training_bytes(configs: Sequence[SaeConfig], n_layers: int) -> int:
    """Return the most that a training holds: finished SAEs, and checkpoints of one layer.

    A checkpoint holds the weights and two moments of each, and the one before is removed only when
    a newer one was read back; the best weights so far are kept beside them.

    Args:
        configs: The SAEs trained together on a layer.
        n_layers: Layers, which are trained one after another.
    """
    weights = sum(
        FLOAT_BYTES * (2 * one.d_in * one.d_sae + one.d_sae + one.d_in) for one in configs
    )
    return weights * (n_layers + 3 * (KEPT + 1) + 1)
