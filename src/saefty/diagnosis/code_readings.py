"""What kept codes may be: what an SAE makes of rows, of other layers, and of normalised rows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.diagnosis.finding import (
    INPUT_OFFSET,
    PRE_ACTIVATIONS,
    RECONSTRUCTION,
    SCALE,
    STANDARDISATION,
    WRONG_TENSOR,
)
from saefty.saes.base import SparseAutoencoder

CODES = "the SAE's codes"
STATISTICS_ROWS = 8192
PART = 2048

Rows = Float[Tensor, "rows d_in"]


@runtime_checkable
class RowSource(Protocol):
    """Activations by row number, such as an `ActivationStore`."""

    layers: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Rows of each layer."""
        ...

    def take(self, layer: int, indices: Int[np.ndarray, "rows"]) -> Float[Tensor, "rows d_in"]:
        """Return chosen rows of a layer as float32."""
        ...


@dataclass(frozen=True)
class Reading:
    """One thing that kept numbers may be.

    Attributes:
        name: In words.
        layer: The layer of the rows it is made of.
        width: Its width.
        cause: What is wrong if the numbers are this; None for the codes themselves.
        make: Makes it of rows.
    """

    name: str
    layer: int
    width: int
    cause: str | None
    make: Callable[[Rows], Float[Tensor, "rows width"]]

    @torch.no_grad()
    def made(self, x: Float[Tensor, "rows d_in"]) -> Float[np.ndarray, "rows width"]:
        """Return it as float64."""
        parts = [self.make(part).double().cpu().numpy() for part in x.split(PART)]
        return np.concatenate([*parts, np.zeros((0, self.width))])


def code_readings(sae: SparseAutoencoder, store: RowSource, layer: int) -> list[Reading]:
    """Return everything that kept numbers are compared with, the codes themselves first.

    Args:
        sae: The SAE.
        store: Its activations, and those of other layers where there are any.
        layer: The layer that the SAE reads.
    """
    width = sae.d_sae
    return [
        Reading(CODES, layer, width, None, sae.encode),
        *_before_selection(sae, layer),
        Reading("the reconstruction", layer, sae.d_out, RECONSTRUCTION, sae.reconstruct),
        Reading("the activations themselves", layer, sae.d_in, WRONG_TENSOR, lambda x: x),
        *(
            Reading(f"the SAE's codes of layer {other}", other, width, WRONG_TENSOR, sae.encode)
            for other in store.layers
            if other != layer
        ),
        *_of_changed_rows(sae, store, layer),
    ]


def _before_selection(sae: SparseAutoencoder, layer: int) -> Iterator[Reading]:
    if sae.config.row_norm != "none":
        return

    def pre(x: Rows) -> Tensor:
        return x.to(sae.W_enc.dtype) @ sae.W_enc + sae.b_enc

    def positive(x: Rows) -> Tensor:
        return pre(x).relu()

    yield Reading("the pre-activations", layer, sae.d_sae, PRE_ACTIVATIONS, pre)
    if sae.config.arch != "relu":
        name = "the positive pre-activations, before latents are selected"
        yield Reading(name, layer, sae.d_sae, PRE_ACTIVATIONS, positive)


def _of_changed_rows(sae: SparseAutoencoder, store: RowSource, layer: int) -> Iterator[Reading]:
    """Yield the codes of rows that a script changed first, by figures of the store's rows."""
    count = min(store.n_rows, STATISTICS_ROWS)
    x = store.take(layer, np.linspace(0, store.n_rows - 1, count).astype(np.int64)).double()
    mean, root = x.mean(dim=0), math.sqrt(x.shape[1])
    std = x.std(dim=0, correction=0).clamp(min=1e-30)
    overall = std.square().mean().sqrt()
    factor = root / x.norm(dim=1).mean().clamp(min=1e-30)

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30) * root

    def layer_norm(rows: Tensor) -> Tensor:
        return unit(rows - rows.mean(dim=1, keepdim=True))

    changes: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "rows less their mean": (INPUT_OFFSET, lambda rows: rows - mean),
        "standardised rows": (STANDARDISATION, lambda rows: (rows - mean) / std),
        "rows less their mean and divided by one scale": (
            STANDARDISATION,
            lambda rows: (rows - mean) / overall,
        ),
        "rows times √d / mean norm": (SCALE, lambda rows: rows * factor),
        "rows divided by √d / mean norm": (SCALE, lambda rows: rows / factor),
        "rows of norm √d": (STANDARDISATION, unit),
        "rows after a layer norm": (STANDARDISATION, layer_norm),
    }
    b_dec = sae.b_dec.detach().double().cpu()
    if sae.d_out == sae.d_in and bool(b_dec.any()):
        changes["rows less b_dec"] = (INPUT_OFFSET, lambda rows: rows - b_dec)
        changes["rows plus b_dec"] = (INPUT_OFFSET, lambda rows: rows + b_dec)
    for name, (cause, change) in changes.items():
        yield Reading(f"the SAE's codes of {name}", layer, sae.d_sae, cause, _encoding(sae, change))


def _encoding(
    sae: SparseAutoencoder, change: Callable[[Tensor], Tensor]
) -> Callable[[Rows], Tensor]:
    def encode(x: Rows) -> Tensor:
        return sae.encode(change(x.double().cpu()).to(sae.W_enc))

    return encode
