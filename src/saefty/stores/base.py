"""What all stores share: pieces that are committed one by one, and a manifest that is written last.

A store is made from a plan. Each *piece* of the plan yields a few safetensors files and, after
them, a record in `records/` with the size and checksum of each. A piece whose record stands is
done; resuming is the plan less those. `manifest.json` gathers the records when all are there, and
readers start from it: a folder without a manifest is an unfinished store, whatever files it holds.

The bytes of a piece depend on the plan and its index alone (no times, hosts or process numbers), so
committing a piece twice changes nothing. Every file is verified against its checksum before the
first value is returned, once per process and version of the file; of a file with checksums of its
blocks, those that are read.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from saefty import fsio
from saefty.errors import IntegrityError, SaeftyError
from saefty.stores.blocks import BlockFile, head_facts
from saefty.tensorfile import Bf16, TensorFile, blocks_of

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST, RECORDS, EXAMPLES = "manifest.json", "records", "examples.jsonl"

_verified: dict[tuple[str, int, int, int], str] = {}


class StoreWriter:
    """Commit the pieces of a plan into a folder, then the manifest.

    Args:
        folder: The store's folder, which the caller has locked.
        kind: "activations" or "features".
        fingerprint: The run's fingerprint, kept in every file.
    """

    def __init__(self, folder: Path, kind: str, fingerprint: str) -> None:
        self.folder = folder
        self.kind = kind
        self.fingerprint = fingerprint
        self._manifest: dict[str, Any] | None = None

    def done(self) -> dict[int, dict[str, Any]]:
        """Return the records of the pieces whose files are all there and whole, by index.

        A record whose files are damaged counts as not done, so that its piece is made again.
        """
        records = {}
        for path in sorted((self.folder / RECORDS).glob("piece_*.json")):
            try:
                record = fsio.read_sealed(path)
                if record["fingerprint"] != self.fingerprint:
                    log.warning("%s will be made again: it belongs to another run", path.stem)
                    continue
                for name, facts in record["files"].items():
                    check_file(self.folder, name, facts)
                records[int(record["piece"])] = record
            except (SaeftyError, KeyError, TypeError) as error:
                reason = error.message if isinstance(error, SaeftyError) else repr(error)
                log.warning("%s will be made again: %s", path.stem, reason)
        return records

    def commit(
        self,
        piece: int,
        files: Mapping[str, Mapping[str, np.ndarray | Bf16]],
        counts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write a piece's files, then its record.

        Args:
            piece: The piece's index in the plan.
            files: For each file name (relative, without suffix) its arrays.
            counts: What became of the piece's rows; kept in the record.

        Returns:
            The record.
        """
        facts = {}
        for name, arrays in files.items():
            header = {
                "format_version": FORMAT_VERSION,
                "kind": self.kind,
                "fingerprint": self.fingerprint,
                "piece": piece,
            }
            data = blocks_of(arrays, header)
            self._check_reproduced(f"{name}.safetensors", fsio.digest_blocks(data))
            checksum = fsio.commit_bytes(self.folder / f"{name}.safetensors", data)
            size = sum(map(len, data))
            facts[f"{name}.safetensors"] = {"bytes": size, "xxh3_128": checksum}
        record = {"piece": piece, "fingerprint": self.fingerprint, "files": facts, **counts}
        fsio.commit_sealed(self.folder / RECORDS / f"piece_{piece:05d}.json", record)
        return record

    def complete(self) -> dict[int, dict[str, Any]]:
        """Return the records of a store that was complete already, by index; else none."""
        if self._manifest is None:
            try:
                self._manifest = fsio.read_sealed(self.folder / MANIFEST)
            except IntegrityError:  # missing or damaged: written again when all pieces are there
                self._manifest = {"pieces": []}
        return {int(record["piece"]): record for record in self._manifest["pieces"]}

    def _check_reproduced(self, name: str, checksum: str) -> None:
        """Refuse to put other bytes into a store that is complete: a repair must reproduce them."""
        for piece in self.complete().values():
            facts = piece["files"].get(name)
            if facts is not None and facts["xxh3_128"] != checksum:
                raise IntegrityError(
                    f"{name} of {self.folder} was made again, but with other bytes: checksum "
                    f"{checksum}, not {facts['xxh3_128']}. The machine or a library differs from "
                    "the one that wrote the store.",
                    safe="The store was not changed.",
                    then="Extract into a new folder, or repair it where it was written.",
                )

    def finish(
        self, records: Iterable[Mapping[str, Any]], facts: Mapping[str, Any], extra: Iterable[str]
    ) -> None:
        """Write the manifest.

        Args:
            records: The record of every piece, in order.
            facts: What the store is: layers, widths, counts.
            extra: Names of further files to protect by a checksum, such as the example table.
        """
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            **facts,
            "extra": {name: file_facts(self.folder / name) for name in extra},
            "pieces": list(records),
        }
        fsio.commit_sealed(self.folder / MANIFEST, manifest)


class StoreReader:
    """A complete store: its manifest, and its files verified before their first use.

    Args:
        folder: The store's folder.
        kind: "activations" or "features".

    Raises:
        IntegrityError: If the store is not complete, of another kind or of a newer format.
    """

    def __init__(self, folder: Path | str, kind: str) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            begun = (self.folder / RECORDS).exists()
            state = "is not complete" if begun else "holds no store"
            raise IntegrityError(
                f"{self.folder} {state}: there is no {MANIFEST}.",
                then="Run the command that writes it again; it resumes where it stopped."
                if begun
                else "Name a folder that extract, encode or store import wrote.",
            )
        self.manifest = read_manifest(self.folder)
        try:
            version, found = self.manifest["format_version"], self.manifest["kind"]
        except (KeyError, TypeError):
            raise IntegrityError(f"{self.folder / MANIFEST} is not a store's manifest.") from None
        if version > FORMAT_VERSION:
            raise IntegrityError(
                f"{self.folder} has store format {version}; this version reads up to "
                f"{FORMAT_VERSION}.",
                then="Update saefty.",
            )
        if found != kind:
            raise IntegrityError(
                f"{self.folder} is a store of {found}, but one of {kind} is wanted.",
                then="Activations are what extract writes, features what encode writes.",
            )
        self.pieces: list[dict[str, Any]] = self.manifest["pieces"]

    def file(self, name: str) -> TensorFile:
        """Open one of the store's files, verified.

        Raises:
            IntegrityError: If its bytes are not those that were written.
        """
        return TensorFile(self._checked(name))

    def block_file(self, name: str) -> BlockFile:
        """Open one of the store's files to verify of it what is read, if it allows that.

        Raises:
            IntegrityError: If it is missing, not of the size that was written, or damaged where
                all depends on it; a file without checksums of its blocks, if it is damaged at all.
        """
        facts = self._facts_of(name) or {}
        head = facts.get("head")
        path = self._checked(name) if head is None else sized_file(self.folder, name, facts)[0]
        return BlockFile(path, head, said=f"{name} of {self.folder}", then=_repair(self.folder))

    def examples(self) -> list[dict[str, Any]]:
        """Return the example table: one record an example that came in, in order."""
        return fsio.read_lines(self._checked(EXAMPLES))

    def examples_file(self) -> Path:
        """Return the file of the example table, verified: one JSON record a line."""
        return self._checked(EXAMPLES)

    def copy_examples(self, folder: Path) -> None:
        """Put the example table into another store's folder, byte for byte."""
        with fsio.staged(folder / EXAMPLES) as temporary:
            shutil.copyfile(self._checked(EXAMPLES), temporary)

    def verify(self) -> list[str]:
        """Read every file; return what is wrong, one line a damaged file, or nothing."""
        damage = []
        for name, facts in self._files().items():
            try:
                check_file(self.folder, name, facts, cached=False)
            except IntegrityError as error:
                damage.append(error.message)
        return damage

    def n_bytes(self) -> int:
        """Return the size of all files."""
        return sum(int(facts["bytes"]) for facts in self._files().values())

    def _files(self) -> dict[str, Any]:
        files = dict(self.manifest["extra"])
        for piece in self.pieces:
            files.update(piece["files"])
        return files

    def _checked(self, name: str) -> Path:
        facts = self._facts_of(name)
        if facts is None:
            raise IntegrityError(f"the manifest of {self.folder} names no file {name}.")
        return check_file(self.folder, name, facts)

    def _facts_of(self, name: str) -> Mapping[str, Any] | None:
        return self._files().get(name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a store's manifest.

    Raises:
        IntegrityError: If it is missing or damaged.
    """
    try:
        return fsio.read_sealed(folder / MANIFEST)
    except IntegrityError as error:
        raise IntegrityError(
            error.message, then=f"Run saefty store repair {folder}; it writes the manifest again."
        ) from None


def file_facts(path: Path) -> dict[str, Any]:
    """Return the size and checksum by which a file is known again, and those of its head if any."""
    head = head_facts(path)
    facts = {"bytes": path.stat().st_size, "xxh3_128": fsio.digest(path)}
    return facts if head is None else {**facts, "head": head}


def check_file(folder: Path, name: str, facts: Mapping[str, Any], *, cached: bool = True) -> Path:
    """Verify a file against its size and checksum; return its path.

    Args:
        folder: The store's folder.
        name: The file's name in the manifest.
        facts: `bytes` and `xxh3_128`.
        cached: Trust a file of the same inode, size and time that this process verified before.

    Raises:
        IntegrityError: If the file is missing or differs.
    """
    path, status = sized_file(folder, name, facts)
    key = (str(path), status.st_ino, status.st_mtime_ns, status.st_size)
    if not (cached and _verified.get(key) == facts["xxh3_128"]):
        try:
            found = fsio.digest(path)
        except OSError as error:
            _refuse_unreadable(folder, name, error)
        if found != facts["xxh3_128"]:
            raise IntegrityError(
                f"{name} of {folder} is damaged: its checksum is {found}, but "
                f"{facts['xxh3_128']} was written.",
                then=_repair(folder),
            )
        _verified[key] = found
    return path


def sized_file(folder: Path, name: str, facts: Mapping[str, Any]) -> tuple[Path, os.stat_result]:
    """Return a file's path and status.

    Raises:
        IntegrityError: If the file is missing or of another size.
    """
    path = fsio.safe_join(folder, name)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise IntegrityError(f"{name} of {folder} is missing.", then=_repair(folder)) from None
    except OSError as error:
        _refuse_unreadable(folder, name, error)
    if status.st_size != facts["bytes"]:
        raise IntegrityError(
            f"{name} of {folder} has {status.st_size} bytes, but {facts['bytes']} were written.",
            then=_repair(folder),
        )
    return path, status


def _repair(folder: Path) -> str:
    return f"Run saefty store repair {folder}; it makes only the damaged pieces again."


def _refuse_unreadable(folder: Path, name: str, error: OSError) -> NoReturn:
    raise IntegrityError(
        f"{name} of {folder} cannot be read: {error.strerror or error}.",
        then="Check the disk and the file's permissions, then run the same command again.",
    ) from None


def piece_ranges(sizes: Iterable[int], limit: int) -> list[tuple[int, int]]:
    """Cut a sequence of sizes into consecutive ranges whose sums stay within a limit.

    An item larger than the limit has a range of its own.
    """
    ranges, start, total = [], 0, 0
    position = -1
    for position, size in enumerate(sizes):
        if total and total + size > limit:
            ranges.append((start, position))
            start, total = position, 0
        total += size
    if position >= start:
        ranges.append((start, position + 1))
    return ranges
