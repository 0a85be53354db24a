"""The rows of a piece while it is read: their table and their vectors, in dataset order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.reading import PoolingSection, ReadingSection, kept_tokens
from saefty.records import ROLES, Site
from saefty.stores.activations import ROW_COLUMNS, RowTable


class PieceRows:
    """The rows of a piece, each at its place in dataset order from the start.

    Kept batch by batch and joined in the end, they would be in memory twice.
    """

    def __init__(
        self,
        items: Mapping[int, TokenizedExample],
        sites: Sequence[Site],
        section: ReadingSection,
        model: ModelAdapter,
    ) -> None:
        pooled = section.pooling.name != "none"
        self.tables: dict[int, RowTable] = {}
        self._places: dict[int, slice] = {}
        end = 0
        for i in sorted(items):
            begin, end = (
                end,
                end + (1 if pooled else int(kept_tokens(items[i], section).sum())),
            )
            self._places[i] = slice(begin, end)
        dtype = section.rows_dtype(model.dtype)
        self._x = {site: torch.empty(end, model.d_model, dtype=dtype) for site in sites}
        self._finite = {site: np.zeros(end, dtype=bool) for site in sites}
        self.beyond = 0.0
        """The largest value that is finite, but not in the rows' number format; 0 if all are."""

    def put(self, i: int, table: RowTable, x: Mapping[Site, Float[Tensor, "rows d_model"]]) -> None:
        """Enter one example."""
        for site, values in x.items():
            kept = self._x[site][self._places[i]]
            kept.copy_(values)
            # Here, because over the whole piece it would need as much memory again.
            finite = finite_rows(kept)
            self._finite[site][self._places[i]] = finite
            if not finite.all():
                lost = values[torch.isfinite(values) & ~torch.isfinite(kept)].abs()
                self.beyond = max(self.beyond, float(lost.max()) if len(lost) else 0.0)
        self.tables[i] = table

    def in_order(
        self,
    ) -> tuple[
        RowTable,
        dict[Site, Float[Tensor, "rows d_model"]],
        dict[Site, Bool[np.ndarray, "rows"]],
    ]:
        """Return the rows of the examples that were entered, and which of them are finite."""
        order = sorted(self.tables)
        rows = {
            name: np.concatenate([np.zeros(0, kind), *(self.tables[i][name] for i in order)])
            for name, kind in ROW_COLUMNS.items()
        }
        x, finite = self._x, self._finite
        if len(order) < len(self._places):
            kept = [np.arange(self._places[i].start, self._places[i].stop) for i in order]
            chosen = np.concatenate([np.zeros(0, np.int64), *kept])
            x = {site: values[torch.from_numpy(chosen)] for site, values in x.items()}
            finite = {site: ok[chosen] for site, ok in finite.items()}
        return rows, x, finite


def finite_rows(x: Float[Tensor, "rows d_model"]) -> Bool[np.ndarray, "rows"]:
    """Return which rows hold neither NaN nor infinity."""
    # Both survive a sum, which takes a tenth of the time; a sum may overflow by itself, too.
    finite = torch.isfinite(x.sum(dim=1))
    if not finite.all():
        finite[~finite] = torch.isfinite(x[~finite]).all(dim=1)
    return finite.numpy()


def row_table(
    index: int,
    item: TokenizedExample,
    kept: Bool[np.ndarray, "tokens"],
    pooling: PoolingSection,
) -> RowTable:
    """Return the table's rows of one example: one a kept token, or one if they are pooled."""
    positions = np.flatnonzero(kept)
    if pooling.name != "none":
        span = item.offsets[positions]
        columns: dict[str, Any] = {
            "example": [index],
            "token_pos": [-1],
            "token_id": [-1],
            "char_start": [span[:, 0].min()],
            "char_end": [span[:, 1].max()],
            "role": [item.roles[positions[-1]]],
            "modality": [0],
        }
    else:
        columns = {
            "example": np.full(len(positions), index),
            "token_pos": positions,
            "token_id": item.ids[positions],
            "char_start": item.offsets[positions, 0],
            "char_end": item.offsets[positions, 1],
            "role": item.roles[positions],
            "modality": item.roles[positions] == ROLES.index("image"),
        }
    return {name: np.asarray(columns[name]).astype(kind) for name, kind in ROW_COLUMNS.items()}
