"""All pieces of a reading, done in this process or in several, and what became of its examples."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from saefty.engine import EngineSection, Step, Work, share_out, shares
from saefty.errors import NumericError
from saefty.log import progress
from saefty.pieces import PieceTask, by_layer, check_failed
from saefty.reading import Reading, write_tables
from saefty.stores.base import EXAMPLES, StoreWriter

log = logging.getLogger(__name__)

Record = dict[str, Any]


def do_pieces(
    writer: StoreWriter,
    reading: Reading,
    work: Work,
    open_work: Callable[[], Work] | None = None,
    engine: EngineSection | None = None,
    release: Callable[[], None] | None = None,
    check: Callable[[Reading], None] | None = None,
) -> list[Record]:
    """Do the pieces that are not done yet; also write the example table and the plan.

    Args:
        writer: Of the store, whose folder the caller has locked.
        reading: The dataset, made ready; examples that fail are entered in its ledger.
        work: Does a piece in this process.
        open_work: Opens the same in a worker process; needed for more than one worker.
        engine: How many workers, and how many examples may fail.
        release: Lets go of what `work` holds, when workers do it all.
        check: Looks whether the work can be done at all, where some is left, before the tables are
            written.

    Returns:
        The records of all pieces, in order.

    Raises:
        InputError: If too many examples fail.
        NumericError: If an activation is not finite and `nonfinite` is `stop`.
        ResourceError: If an example does not fit in memory, or workers cannot begin.
    """
    engine = engine or EngineSection()
    records = writer.done()
    if records:
        log.info("%d of %d pieces are done", len(records), len(reading.plan.pieces))
    if check is not None and len(records) < len(reading.plan.pieces):
        check(reading)
    earlier = writer.complete()
    failed = enter_failed(reading, [*earlier.values(), *records.values()])
    write_tables(writer.folder, reading, EXAMPLES)
    n_tokens = [int(reading.computed[list(members)].sum()) for members in _members(reading)]
    before = sum(n_tokens[index] for index in records)
    waiting = [index for index in range(len(n_tokens)) if index not in records]
    allowed = max(1, int(engine.max_failed * reading.ledger.total))
    tasks = _tasks(reading, waiting, earlier, allowed)
    if open_work is not None and shares(len(waiting), engine.workers) and release is not None:
        release()
    known = len(failed)
    with (
        progress("reading", sum(n_tokens), "tokens", done=before) as bar,
        closing(
            share_out(
                tasks, len(waiting), work, open_work, _narrow, engine.workers, bar.advance,
                overlap=engine.overlap,
            )
        ) as done,
    ):  # fmt: skip
        for record in done:
            records[int(record["piece"])] = record
            failed |= enter_failed(reading, [record])
            check_failed(failed, allowed)
    if len(failed) > known:
        write_tables(writer.folder, reading, EXAMPLES)
    return [records[i] for i in sorted(records)]


def enter_failed(reading: Reading, records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Enter the examples that failed into the reading's table and ledger; return why, by id.

    Raises:
        InputError: If none is left.
    """
    failed = {
        name: str(why) for record in records for name, why in (record.get("failed") or {}).items()
    }
    if not failed:
        return {}
    for i, example in enumerate(reading.examples):
        if example.id in failed and reading.statuses[i] == "ok":
            reading.statuses[i] = "failed"
            reading.ledger.ok -= 1
            reading.ledger.failed["forward_pass"] += 1
    if not reading.ledger.ok:
        check_failed(failed, 0)
    return failed


def count_masked(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return for each layer how many rows of a store were dropped as not finite.

    Raises:
        NumericError: If no row is left.
    """
    masked: Counter[str] = Counter()
    rows = 0
    for record in records:
        masked.update(record["masked"])
        rows += record["rows"]
    if not rows:
        raise NumericError(
            f"no row is left: all were NaN or infinite ({by_layer(masked)}).",
            then="Set model.dtype=bfloat16 or float32, with run.dir on a new folder.",
        )
    return dict(masked)


def _tasks(
    reading: Reading,
    waiting: Iterable[int],
    earlier: Mapping[int, Mapping[str, Any]],
    allowed: int,
) -> Iterator[PieceTask]:
    """Yield pieces, each tokenised when it is drawn; one of a store under repair as before."""
    for index in waiting:
        batches = reading.plan.pieces[index]
        items = reading.items([i for batch in batches for i in batch])
        record = earlier.get(index, {})
        as_read = tuple(tuple(batch) for batch in record.get("batches") or batches)
        number_of = {item.example.id: i for i, item in items.items()}
        failed = {number_of[name]: why for name, why in (record.get("failed") or {}).items()}
        yield PieceTask(index, as_read, batches, items, failed, allowed)


def _members(reading: Reading) -> Iterator[list[int]]:
    for batches in reading.plan.pieces:
        yield [i for batch in batches for i in batch]


def _narrow(task: PieceTask, step: Step, how: str) -> PieceTask:
    log.warning("examples %s bring a worker down; they are read in smaller parts", list(step))
    return task.narrowed(step, how)
