"""Files on this machine: JSONL, JSON (a list of objects), CSV with a header, and Parquet.

Text is UTF-8, with or without a byte-order mark. A line that cannot be read is an error that names
it; nothing is skipped silently.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from saefty.data.base import DATASETS, DataSection, Record
from saefty.errors import ConfigError, InputError

MAX_CELL = 1 << 30


@DATASETS.register("local")
def local(section: DataSection) -> Iterator[Record]:
    """Yield the rows of the file `data.path`, whose format is told by its suffix."""
    if section.path is None:
        raise ConfigError("data.path: required with data.name=local, but not given")
    path = Path(section.path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path} is not a file of a known kind: its suffix is {path.suffix!r}, and the known "
            f"ones are {', '.join(READERS)}."
        )
    if not path.is_file():
        raise InputError(f"there is no file {path}.", then="Set data.path to a file that exists.")
    try:
        yield from reader(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}.",
            then="Check the file's permissions.",
        ) from None


def _jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decoded(line, path, number)
            if text.strip():
                yield _object(text.strip(), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    rows = _parsed(_decoded(data, path, 1), str(path)) if data.strip() else []
    if not isinstance(rows, list):
        raise InputError(
            f"{path} holds {_kind(rows)}, but a list of objects is wanted.",
            then="Write one object a line and call the file .jsonl, or wrap the rows in a list.",
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} (from 0) is {_kind(row)}, not an object.")
        yield row


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_CELL)
    lines = (
        _decoded(line, path, number)
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1)
    )
    reader = csv.DictReader(lines, strict=True)
    try:
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
                    then="Put cells that hold commas in quotes, or write the data as JSONL."
                    if found > wanted
                    else "Write empty cells too (a,,c), or write the data as JSONL.",
                )
            yield row
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: not valid CSV: {error}.",
            then="Look for a quote that is not closed; a quote within a cell is doubled.",
        ) from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from None


def _decoded(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        utf16 = line == 1 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raise InputError(
            f"{path}, line {line}: byte {error.start} is not UTF-8 "
            f"({error.object[error.start]:#04x}){'; the file seems to be UTF-16' * utf16}.",
            then="Save the file as UTF-8.",
        ) from None


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


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
