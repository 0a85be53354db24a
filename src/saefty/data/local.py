"""Files on this machine: JSONL, JSON (a list of objects), CSV with a header, Parquet, plain lines.

All but Parquet may be packed (.jsonl.gz). Text is UTF-8 or has a byte-order mark, unless
`data.encoding` says otherwise. A line that cannot be read is an error that names it; nothing is
skipped silently.
"""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saefty.data.base import DATASETS, GUESSED_COLUMNS, DataSection, Record
from saefty.errors import ConfigError, InputError
from saefty.textfile import PACKED, decode_text, read_text_lines, reading

MAX_CELL = 1 << 30
PARQUET_ROWS, PARQUET_BYTES = 1 << 16, 1 << 24
"""Most rows of a Parquet file that are held at once, and about how many bytes."""
LINES = (".lines", ".txt")
ENDS_OF_TEXT = (".", "!", "?", "。", "！", "？", "…")


@DATASETS.register("local")
def local(section: DataSection) -> Iterator[Record]:
    """Yield the rows of the file `data.path`; `data.format` or the suffix tells its format."""
    if section.path is None:
        raise ConfigError("data.path: required with data.name=local, but not given")
    path = Path(section.path)
    packed = path.suffix.lower() == PACKED
    suffix = path.with_suffix("").suffix if packed else path.suffix
    form = f".{section.format}" if section.format else suffix.lower()
    if form in LINES:
        yield from DATASETS["lines"](section)
        return
    reader = READERS.get(form)
    if reader is None:
        raise InputError(
            f"{path} is not a file of a known kind: its suffix is {suffix!r}, and the known "
            f"ones are {', '.join([*READERS, '.txt'])}.",
            then="Set data.format=lines for a file of one sentence a line, or name its kind.",
        )
    if not path.is_file():
        raise InputError(f"there is no file {path}.", then="Set data.path to a file that exists.")
    with reading(path):
        yield from reader(path, section)


def _bytes(path: Path) -> bytes:
    if path.suffix.lower() == PACKED:
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def _jsonl(path: Path, section: DataSection) -> Iterator[Record]:
    for number, line in read_text_lines(path, encoding=section.encoding):
        text = line.strip()
        if text:
            yield _object(text, f"{path}, line {number}")


def _json(path: Path, section: DataSection) -> Iterator[Record]:
    text = decode_text(_bytes(path), path, encoding=section.encoding)
    rows = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise InputError(
            f"{path} holds {_kind(rows)}, but a list of objects is wanted.",
            then="Write one object a line and call the file .jsonl, or wrap the rows in a list.",
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} (from 0) is {_kind(row)}, not an object.")
        yield row


def _csv(path: Path, section: DataSection) -> Iterator[Record]:
    csv.field_size_limit(MAX_CELL)
    text = decode_text(_bytes(path), path, encoding=section.encoding)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(reader.fieldnames or (), section, path)
        twice = [name for name, n in Counter(reader.fieldnames or ()).items() if n > 1]
        if twice:
            raise InputError(
                f"{path}: the header names the column {twice[0]!r} more than once.",
                then="Give every column a name of its own.",
            )
        for row in reader:
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                found = sum(cell is not None for cell in row.values()) - (None in row)
                found += len(row.get(None, ()))
                raise InputError(
                    f"{path}, line {reader.line_num}: the row has {found} cells, but the header "
                    f"has {wanted}.",
                    then="If every line is one sentence, set data.format=lines; else put cells "
                    "that hold commas in quotes, or write the data as JSONL."
                    if found > wanted
                    else "Write empty cells too (a,,c), or write the data as JSONL.",
                )
            yield row
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: not valid CSV: {error}.",
            then="Look for a quote that is not closed; a quote within a cell is doubled.",
        ) from None


def _check_header(names: Sequence[str], section: DataSection, path: Path) -> None:
    """Refuse a file of sentences: its first line names no column that is asked for.

    Raises:
        InputError: If the header reads like a sentence.
    """
    asked = {section.text, section.prompt, section.messages} - {None} or set(GUESSED_COLUMNS)
    first = ",".join(names)
    if names and asked.isdisjoint(names) and (first.count(" ") > 1 or first[-1:] in ENDS_OF_TEXT):
        raise InputError(
            f"{path} is read as CSV with a header, but its first line is {first!r:.80}, which "
            "looks like a sentence.",
            then="If every line is one sentence, set data.format=lines; else write a header.",
        )


def _parquet(path: Path, _: DataSection) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata)):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from None


def _rows_at_once(metadata: Any) -> int:
    """Return how many rows to hold at once: few where a row holds an image."""
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    per_row = sum(sizes) // max(metadata.num_rows, 1)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(per_row, 1)))


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text else ""
        reason = f"{error.msg} ({place}character {error.colno})"
    except RecursionError:
        reason = "it nests too deep"
    except ValueError as error:  # a number of more digits than Python reads
        reason = str(error)
    raise InputError(f"{where}: not valid JSON: {reason}.")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), "a number"
    )


def _object(text: str, where: str) -> Record:
    row = _parsed(text, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {_kind(row)}, but an object is wanted.")
    return row


READERS: dict[str, Callable[[Path, DataSection], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
