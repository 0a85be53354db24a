"""The data side of training: which rows train, which are held out, and the endless batch stream.

A split goes by example, and examples of one group stay together, so that no token of a held-out
text was trained on. The stream is a function of (seed, epoch, batch) alone, which is all that an
interrupted training has to remember of it.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty.errors import InputError, NumericError
from saefty.overlap import read_ahead
from saefty.records import Site

SEEDS_PER_RUN = 1_000_003
NAMED_ROWS = 5


@runtime_checkable
class ActivationSource(Protocol):
    """Where activations come from: an activation store, or rows in memory."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers there are."""
        ...

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def n_rows(self) -> int:
        """Rows of each layer."""
        ...

    def site(self, layer: int) -> Site:
        """Return where in the model a layer was read."""
        ...

    def rows(self) -> Mapping[str, np.ndarray]:
        """Return the row table; `example` is the index of each row's example."""
        ...

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """Return the example table; `group` names examples that belong together."""
        ...

    def batches(
        self,
        layer: int,
        size: int,
        seed: int | None = None,
        *,
        keep: Bool[np.ndarray, "n_rows"] | None = None,
        start: int = 0,
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Yield one epoch of float32 rows; without a seed in order; `start` batches are skipped."""
        ...

    def batch_rows(
        self,
        size: int,
        seed: int | None = None,
        *,
        keep: Bool[np.ndarray, "n_rows"] | None = None,
        start: int = 0,
    ) -> Iterator[Int[np.ndarray, "rows"]]:
        """Yield the row numbers of those batches."""
        ...


@runtime_checkable
class StoredSource(ActivationSource, Protocol):
    """A source whose rows need not be computed with to be read, as those of a store."""

    def stored_batches(
        self,
        layer: int,
        size: int,
        seed: int | None = None,
        *,
        keep: Bool[np.ndarray, "n_rows"] | None = None,
        start: int = 0,
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Yield the same batches as `batches`, in the dtype in which they are stored."""
        ...


@dataclass(frozen=True)
class Split:
    """Which rows train and which are held out; no row is both."""

    train: Bool[np.ndarray, "n_rows"]
    held_out: Bool[np.ndarray, "n_rows"]


@dataclass(frozen=True, order=True)
class Cursor:
    """A place in the stream: the batch to read next."""

    epoch: int = 0
    batch: int = 0

    @property
    def next(self) -> "Cursor":
        """The place after this one; past the last batch of an epoch the next epoch begins."""
        return Cursor(self.epoch, self.batch + 1)


def split_by_example(
    source: ActivationSource, share: float, seed: int, max_held_out: int | None = None
) -> Split:
    """Hold out a share of the examples, whole groups at a time.

    Args:
        source: The rows and the examples they come from.
        share: Share of the rows to hold out, from 0 (none) to below 1.
        seed: Which examples are held out.
        max_held_out: Hold out no more rows than about this, whatever the share.

    Raises:
        InputError: If the rows come from a single group, so that no split leaves both parts a row.
    """
    example = np.asarray(source.rows()["example"], dtype=np.int64)
    held_out = np.zeros(len(example), dtype=bool)
    if share == 0 or len(example) == 0:
        return Split(~held_out, held_out)
    names = [record.get("group") for record in source.examples()]
    group_of = {i: f"group {name}" for i, name in enumerate(names) if name not in (None, "")}
    present, inverse = np.unique(example, return_inverse=True)
    keys = np.array([group_of.get(int(i), f"example {i}") for i in present])
    _, codes = np.unique(keys, return_inverse=True)
    group = codes[inverse]
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise InputError(
            f"all {len(example)} rows come from one example or group, so none can be held out.",
            then="Extract more examples, or set train.validation=0 to train without validation.",
        )
    wanted = share * len(example)
    wanted = min(wanted, max_held_out) if max_held_out else wanted
    order = np.random.default_rng([seed, 2]).permutation(len(sizes))
    taken = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = order[: min(taken, len(sizes) - 1)]
    held_out = np.isin(group, chosen)
    return Split(~held_out, held_out)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's order."""
    return seed * SEEDS_PER_RUN + epoch


def stream(
    source: ActivationSource,
    layer: int,
    size: int,
    seed: int,
    keep: Bool[np.ndarray, "n_rows"],
    cursor: Cursor,
    *,
    device: torch.device | str = "cpu",
    ahead: bool = False,
) -> Generator[tuple[Cursor, Float[Tensor, "rows d_in"]], None, None]:
    """Yield (place, batch) for ever, epoch after epoch, from a place on, as float32.

    The rest of an epoch that would make less than half a batch is left out, unless it is all there
    is: a step on a handful of rows is as large as one on a full batch, and much noisier.

    Args:
        source: The rows.
        layer: Of which layer.
        size: Rows in a batch.
        seed: Order of the rows, with the number of the epoch.
        keep: Which rows to use.
        cursor: The place to begin at.
        device: Where batches are wanted.
        ahead: Read the next batch in a thread while one is in use. The thread ends when the
            generator is closed.

    Raises:
        NumericError: If a row holds NaN or infinity; the message names it.
    """
    enough = min(size, int(keep.sum()))
    batches = _read(source, layer, size, seed, keep, cursor)
    if ahead and torch.device(device).type == "cuda":
        batches = _copied(batches, torch.device(device))
    with closing(read_ahead(batches) if ahead else batches) as batches:
        for place, x in batches:
            if x.is_cuda:  # its memory belongs to the stream that copied it
                x.record_stream(torch.cuda.current_stream(x.device))
            x = x.to(device).float()
            # NaN and infinity survive a sum, which takes a tenth of the time.
            bad = [] if isfinite(float(x.sum())) else _not_finite(x)
            if bad:
                numbers = _batch_rows(source, size, seed, keep, place)
                named = ", ".join(str(int(numbers[i])) for i in bad[:NAMED_ROWS])
                raise NumericError(
                    f"{len(bad)} of the {len(x)} rows of batch {place.batch} of epoch "
                    f"{place.epoch} of layer {layer} hold NaN or infinity: rows {named} of the "
                    "store.",
                    safe="Checkpoints that were written before it are kept.",
                    then="Set extract.nonfinite=mask and extract again, to leave such rows out.",
                )
            if 2 * len(x) >= enough:
                yield place, x


def _read(
    source: ActivationSource,
    layer: int,
    size: int,
    seed: int,
    keep: Bool[np.ndarray, "n_rows"],
    cursor: Cursor,
) -> Generator[tuple[Cursor, Float[Tensor, "rows d_in"]], None, None]:
    """Yield (place, batch) for ever, as the rows are stored."""
    read = source.stored_batches if isinstance(source, StoredSource) else source.batches
    for epoch in count(cursor.epoch):
        first = cursor.batch if epoch == cursor.epoch else 0
        batches = read(layer, size, epoch_seed(seed, epoch), keep=keep, start=first)
        for index, x in enumerate(batches, first):
            yield Cursor(epoch, index), x


def _copied(
    batches: Iterable[tuple[Cursor, Float[Tensor, "rows d_in"]]], device: torch.device
) -> Generator[tuple[Cursor, Float[Tensor, "rows d_in"]], None, None]:
    """Copy batches to a GPU beside what it computes; each has arrived when it is yielded."""
    copying = torch.cuda.Stream(device)
    for place, x in batches:
        with torch.cuda.stream(copying):
            there = x.pin_memory().to(device, non_blocking=True)
        copying.synchronize()
        yield place, there


def _not_finite(x: Float[Tensor, "rows d_in"]) -> list[int]:
    """Return which rows hold NaN or infinity: none, if only their sum is too large."""
    return (~torch.isfinite(x).all(dim=1)).nonzero().squeeze(1).tolist()


def describe_batch(
    source: ActivationSource,
    x: Float[Tensor, "rows d_in"],
    size: int,
    seed: int,
    keep: Bool[np.ndarray, "n_rows"],
    place: Cursor,
) -> str:
    """Say in a sentence which batch of the stream this is, by what may be wrong with it.

    Args:
        source: Where the batch comes from.
        x: The batch, scaled.
        size: As for `stream`.
        seed: As for `stream`.
        keep: As for `stream`.
        place: The batch's place.
    """
    rows = _batch_rows(source, size, seed, keep, place)
    norms = x.double().norm(dim=1)
    far = norms.topk(min(NAMED_ROWS, len(norms)))
    named = ", ".join(
        f"{rows[i]} ({norm:.3g})"
        for norm, i in zip(far.values.tolist(), far.indices.tolist(), strict=True)
    )
    return (
        f"The {len(x)} rows of batch {place.batch} of epoch {place.epoch} are finite; farthest "
        f"from the mean are the store's rows {named}, as norms after scaling, of which the median "
        f"is {float(norms.median()):.3g}."
    )


def _batch_rows(
    source: ActivationSource,
    size: int,
    seed: int,
    keep: Bool[np.ndarray, "n_rows"],
    place: Cursor,
) -> Int[np.ndarray, "rows"]:
    """Return the row numbers of the batch at a place of the stream."""
    order = epoch_seed(seed, place.epoch)
    return next(iter(source.batch_rows(size, order, keep=keep, start=place.batch)))


def held_out_rows(
    source: ActivationSource, layer: int, size: int, keep: Bool[np.ndarray, "n_rows"]
) -> Float[Tensor, "rows d_in"]:
    """Return chosen rows of a layer in order, in memory."""
    return torch.cat([torch.empty(0, source.d_in), *source.batches(layer, size, keep=keep)])
