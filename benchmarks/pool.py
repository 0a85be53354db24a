"""The rows that a timed training learns from: a file of float32 rows, read batch by batch.

It needs torch and NumPy alone, so that it runs in every library's environment.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Pool:
    """The batches of a `.npy` file in their order, over and over; its last one is held out.

    They are read and not mapped, so that the file's pages do not count as memory of the training.
    """

    def __init__(self, path: Path, batch: int) -> None:
        rows = np.load(path, mmap_mode="r")
        self.path, self.batch, self.d_in = path, batch, rows.shape[1]
        self.n_batches = len(rows) // batch - 1
        self._begin, self._row_bytes = rows.offset, rows.strides[0]

    def __getitem__(self, step: int) -> Tensor:
        """Read the batch of a step."""
        return self._read(step % self.n_batches)

    @property
    def held_out(self) -> Tensor:
        """The batch that no step gets."""
        return self._read(self.n_batches)

    def _read(self, number: int) -> Tensor:
        place = self._begin + number * self.batch * self._row_bytes
        rows = np.fromfile(self.path, np.float32, self.batch * self.d_in, offset=place)
        return torch.from_numpy(rows.reshape(self.batch, self.d_in))
