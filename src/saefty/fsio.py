"""The only place that writes a final path.

A file appears under its name whole or not at all: the bytes go to a temporary file in the same
folder, are flushed to the disk, and are renamed; then the folder is flushed, so that the name
survives a power cut too. A reader can therefore trust any file that exists, and a good old file is
never destroyed by a full disk. Checksums are xxh3-128: made to catch damage, not malice.
"""

import errno
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from saefty.errors import DiskError, IntegrityError, UnsafeArtifactError

TEMP_PREFIX = ".tmp-"
READ_BLOCK = 1 << 22
SEAL = "content_xxh3_128"
Block = bytes | memoryview
_asking = threading.Lock()
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; commit it under `path` when the block succeeds.

    The suffix is kept, for writers that choose a format by it. When the block fails the temporary
    file is removed and whatever was at `path` stays; a file that holds these bytes already is left
    alone.

    Raises:
        DiskError: If the file cannot be written.
    """
    final = Path(path)
    temporary = final.with_name(f"{TEMP_PREFIX}{secrets.token_hex(6)}-{final.name[-80:]}")
    try:
        with disk_errors(final):
            make_folder(final.parent)
            yield temporary
            if _holds(final, temporary.stat().st_size, temporary):
                temporary.unlink()
                return
            _flush(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, final)
            _flush(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def commit_bytes(path: Path | str, data: bytes | Sequence[Block]) -> str:
    """Write a file atomically; one that holds these bytes already is left alone.

    Args:
        path: The final path.
        data: Its bytes, in one block or several.

    Returns:
        The checksum of the bytes.

    Raises:
        DiskError: If the file cannot be written; what was at `path` stays.
    """
    blocks = [data] if isinstance(data, bytes) else data
    checksum = digest_blocks(blocks)
    if not _holds(Path(path), sum(map(len, blocks)), checksum):
        with staged(path) as temporary, open(temporary, "wb") as file:
            file.writelines(blocks)
    return checksum


def commit_text(path: Path | str, text: str) -> str:
    """Write a UTF-8 text file atomically; return its checksum."""
    return commit_bytes(path, text.encode("utf-8"))


def commit_json(path: Path | str, value: Any) -> str:
    """Write a JSON file atomically; return its checksum. NaN and infinity are refused.

    Raises:
        ValueError: If the value holds NaN or infinity, which JSON does not have.
    """
    return commit_text(path, dump_json(value) + "\n")


def dump_json(value: Any) -> str:
    """Return strict, readable JSON in which Japanese, Korean and Cyrillic stay legible."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def dump_json_line(record: Any) -> str:
    """Return a record as one line of strict JSON, with its newline."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path | str, record: Any) -> None:
    """Append one JSON line to a journal and flush it to the disk.

    A reader of a journal must tolerate a torn last line (`read_lines` does).

    Raises:
        DiskError: If the line cannot be written.
    """
    line = dump_json_line(record)
    with disk_errors(Path(path)):
        make_folder(Path(path).parent)
        with open(path, "ab") as file:
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path | str) -> list[Any]:
    """Return the records of a journal; a torn last line is left out."""
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(parse_json(line.decode("utf-8"), str(path)))
        except (IntegrityError, UnicodeDecodeError):
            if number != len(lines) - 1:
                raise IntegrityError(f"{path}: line {number + 1} is damaged.") from None
    return records


def read_json(path: Path | str) -> Any:
    """Read a JSON file strictly: no NaN, no infinity.

    Raises:
        IntegrityError: If the file is missing, unreadable or not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from None
    return parse_json(text, str(path))


def parse_json(text: str, what: str) -> Any:
    """Parse strict JSON.

    Raises:
        IntegrityError: If the text is not JSON, holds NaN, or nests too deep.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what} is not valid JSON: {error}") from None


def commit_sealed(path: Path | str, record: Mapping[str, Any]) -> str:
    """Write a JSON object together with a checksum of its content; return the file's checksum."""
    return commit_json(path, {**record, SEAL: _seal(record)})


def read_sealed(path: Path | str) -> dict[str, Any]:
    """Read what `commit_sealed` wrote, without the seal.

    Raises:
        IntegrityError: If the file is missing or unreadable, or its content is not what was sealed.
    """
    record = read_json(path)
    if not isinstance(record, dict) or SEAL not in record:
        raise IntegrityError(f"{path} carries no checksum of its content.")
    found = record.pop(SEAL)
    if found != _seal(record):
        raise IntegrityError(
            f"{path} is damaged: the checksum of its content is {_seal(record)}, but {found} was "
            "written."
        )
    return record


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return digest_bytes(text.encode())


def digest(path: Path | str) -> str:
    """Return the xxh3-128 checksum of a file's bytes, in hexadecimal."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BLOCK):
            state.update(block)
    return state.hexdigest()


def digest_blocks(blocks: Iterable[Block]) -> str:
    """Return the xxh3-128 checksum of blocks of bytes, one after another, in hexadecimal."""
    state = xxhash.xxh3_128()
    for block in blocks:
        state.update(block)
    return state.hexdigest()


def digest_bytes(data: bytes) -> str:
    """Return the xxh3-128 checksum of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def safe_join(root: Path | str, relative: str) -> Path:
    """Return the path of a file that a manifest names, held inside its folder.

    Raises:
        UnsafeArtifactError: If the name is absolute, climbs out of the folder, or leaves it through
            a link.
    """
    inside = PurePosixPath(relative)
    plain = "\\" not in relative and "\0" not in relative and ":" not in relative
    if not relative or inside.is_absolute() or ".." in inside.parts or not plain:
        raise UnsafeArtifactError(f"the name {relative!r} does not stay inside {root}.")
    path = Path(root) / inside
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise UnsafeArtifactError(f"the name {relative!r} leads out of {root} through a link.")
    return path


def free_bytes(folder: Path) -> int:
    """Return how much an ordinary user may still write where a folder lies, or will lie."""
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(present).free


def remove_temporaries(folder: Path) -> int:
    """Remove what interrupted writes left below a folder; return how many files that were.

    Only the holder of the folder's lock may call this.
    """
    count = 0
    for path in folder.rglob(f"{TEMP_PREFIX}*"):
        if path.is_file():
            path.unlink(missing_ok=True)
            count += 1
    return count


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _holds(path: Path, size: int, content: str | Path) -> bool:
    """Return whether a file holds certain bytes already: a resumed run commits much again."""
    try:
        if path.stat().st_size != size:
            return False
        return digest(path) == (content if isinstance(content, str) else digest(content))
    except OSError:
        return False


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    with _asking:  # two threads at once would leave the process without one
        mask = os.umask(0)
        os.umask(mask)
    return mask


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the ways in which a write fails into one error that says where and what is safe."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError) and error.filename is None:
            raise
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> DiskError:
    """Return what to tell the user of a write that failed."""
    full = error.errno in DISK_FULL
    # np.save reports a full disk as an OSError without a number: "... requested and ... written".
    short_write = error.errno is None and "written" in str(error)
    if full or short_write:
        return DiskError(
            f"the disk is full: {path} could not be written ({error.strerror or error}).",
            safe="Files that were already committed are whole; no partial file was left.",
            then="Free some space and run the same command again; it continues.",
        )
    return DiskError(
        f"{path} could not be written: {error.strerror or error}.",
        safe="Files that were already committed are whole; no partial file was left.",
        then="Check the folder's permissions and name, or set run.dir to another folder.",
    )
