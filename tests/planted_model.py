"""A model that answers like another, but for chosen numbers."""

import copy
from collections.abc import Sequence

import torch

from saefty.models.base import ModelAdapter
from saefty.records import Site

NAN, INF = float("nan"), float("inf")


def planted(model: ModelAdapter, bad: Sequence[tuple[int, str, int, float]]) -> ModelAdapter:
    """Return the model with a value put into some rows.

    Args:
        model: The model.
        bad: Layer, example's id, token position, and the value.
    """
    twin = copy.copy(model)

    def capture(batch, sites, rows=None):
        found = model.capture(batch, sites, rows=rows)
        for layer, name, position, value in bad:
            for place, (i, at) in enumerate(torch.nonzero(rows).tolist()):
                if batch.items[i].example.id == name and at == position:
                    found[Site(layer)][place, 3] = value
        return found

    twin.capture = capture
    return twin
