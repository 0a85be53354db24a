"""SAEs of whose latents 58 % fire on a token, built on purpose and for different reasons.

11,864 of 20,480 latents fire on a token in the figures that these are like; here it is the same
share of fewer latents. Their codes are kept in a dump of dense chunks, as a script keeps them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from saefty.diagnosis import finding
from zoo import LAYER, Files, Patient, Ward, fresh_ward, rows_of, write_dump

ACTIVE = 11_864 / 20_480
CHUNKS = 2


def build(kind: str, folder: Path, seed: int = 0) -> Patient:
    """Build a dense SAE and the dump of its codes.

    Args:
        kind: One of `KINDS`.
        folder: Where everything lies; trainings that are there already are used.
        seed: Of the texts and of the trainings.
    """
    return KINDS[kind](fresh_ward(folder, seed, f"dense {kind}"), kind)


def _weak(ward, kind):
    sae = ward.copy(ward.trained("weak"))
    return _patient(ward, kind, sae, rows_of(ward.store()), finding.WEAK_SPARSITY)


def _bias(ward, kind):
    sae = ward.copy(ward.trained("relu"))
    x = rows_of(ward.store())
    pre = x @ sae.w["W_enc"] + sae.w["b_enc"]
    size = amount(lambda by: pre + by)
    sae.w["b_enc"] = sae.w["b_enc"] + size
    return _patient(ward, kind, sae, x, finding.ENCODER_BIAS)


def _offset(ward, kind):
    # A model whose rows have a large mean along what many latents read; the SAE was trained on
    # rows less their mean, and the mean was lost.
    sae = ward.copy(ward.trained("relu"))
    x = rows_of(ward.store())
    sae.reading(shift=-x.mean(axis=0))  # reads x - mean, and is given x + along
    along = sae.w["W_enc"].mean(axis=1)
    pre = x @ sae.w["W_enc"] + sae.w["b_enc"]
    along = along * amount(lambda by: pre + by * (along @ sae.w["W_enc"]))
    store = ward.derived(lambda rows: rows + along)
    return _patient(ward, kind, sae, x + along, finding.INPUT_OFFSET, store=store, model=None)


KINDS: dict[str, Callable[[Ward, str], Patient]] = {
    "weak sparsity": _weak,
    "encoder bias": _bias,
    "input offset": _offset,
}


def amount(pre: Callable[[float], np.ndarray]) -> float:
    """Return by how much to plant a fault so that the wanted share of latents fires."""
    low, high = 0.0, 1.0
    while (pre(high) > 0).mean() < ACTIVE:
        high *= 2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if (pre(middle) > 0).mean() < ACTIVE else (low, middle)
    return high


def _patient(ward: Ward, kind: str, sae: Files, x: np.ndarray, cause: str, **keys) -> Patient:
    chunks = np.array_split(sae.latents(x).astype(np.float32), CHUNKS)
    dump = write_dump(ward.bed / f"sae_feats_layer{LAYER}", chunks)
    return ward.patient(kind, sae.write(), (cause,), dump=dump, **keys)
