"""Cells that hold or name an image, as a table has them: each becomes the path of a file.

A path is relative to the folder of the data file. Bytes, the hub's {"bytes", "path"} and Pillow
images are kept as files (`saefty.images.keep_image`) while rows are read, so that a dataset of
images takes no more memory than one of texts.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saefty.data.labels import is_missing
from saefty.errors import InputError
from saefty.fsio import digest_bytes
from saefty.images import ADDRESS, keep_image

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
Bytes = bytes | bytearray | memoryview


def rows_with_paths(
    rows: Iterable[Record], column: str | None, kept: Collection[str], path: str | None, name: str
) -> Iterator[Record]:
    """Yield rows with the path of an image instead of the image, and without images nobody reads.

    Args:
        rows: The rows.
        column: The column of images; None if none is read.
        kept: Columns that are read, which stay as they are.
        path: The file or folder the rows come from, or their id on the hub.
        name: The dataset's name.

    Raises:
        InputError: If a cell is no image.
    """
    folder, where, told = _folder_of(path), path or name, column is not None
    for i, row in enumerate(rows):
        unread = [key for key, cell in row.items() if key not in kept and _holds_image(cell)]
        unread = [key for key in unread if key != column]
        if unread and not told:
            told = True
            log.warning(
                "%s: the images in the column %r are not read; data.image=%s reads them",
                where, unread[0], unread[0],
            )  # fmt: skip
        if not unread and row.get(column or "") is None:
            yield row
            continue
        light = {key: cell for key, cell in row.items() if key not in unread}
        if column is not None and column in light:
            place = f"{where}, row {i} (counted from 0): column {column!r} (data.image)"
            light[column] = image_path(light[column], folder, place)
        yield type(row)(light)  # type: ignore[call-arg]  # a dict, or a child of it


def image_path(cell: Any, folder: Path | None, where: str) -> str | None:
    """Return the path of the image that a cell names or holds; None where it is empty.

    Whether there is such an image is not asked here: a run counts those that cannot be read.

    Args:
        cell: A path, bytes, {"bytes", "path"}, a Pillow image, or a list of one of them.
        folder: Where relative paths begin; None if there is no such folder.
        where: The cell's place, for messages.

    Raises:
        InputError: If it is something else, several images, or a relative path without a folder.
    """
    one = _single(cell, where)
    held = _bytes(one)
    if held is not None:
        return keep_image(held)
    if isinstance(one, Mapping):
        one = one.get("path")
    if is_missing(one):
        return None
    if isinstance(one, str | Path):
        return _located(str(one), folder, where)
    import PIL.Image

    if isinstance(one, PIL.Image.Image):
        return keep_image(one)
    raise InputError(
        f"{where} holds a {type(one).__name__}, not an image.",
        then="An image is a path, the bytes of a file, {bytes, path} or a Pillow image.",
    )


def image_name(cell: Any, where: str) -> str | None:
    """Return what tells an image from others: a checksum of its bytes, or its path as it stands.

    Raises:
        InputError: If a cell holds several images.
    """
    one = _single(cell, where)
    held = _bytes(one)
    if held is not None:
        return digest_bytes(held)
    named = one.get("path") if isinstance(one, Mapping) else one
    return str(named) if isinstance(named, str | Path) and str(named) else None


def _folder_of(path: str | None) -> Path | None:
    """Return the folder in which a dataset's relative paths begin; None for one of the hub."""
    if path is None or not Path(path).exists():
        return None
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _holds_image(cell: Any) -> bool:
    """Return whether a cell holds bytes, as an image's does, rather than text or a number."""
    if isinstance(cell, str):
        return False
    while isinstance(cell, list | tuple) and cell:
        cell = cell[0]
    return _bytes(cell) is not None


def _single(cell: Any, where: str) -> Any:
    if not isinstance(cell, list | tuple):
        return cell
    if len(cell) > 1:
        raise InputError(
            f"{where} holds {len(cell)} images, but an example has one.",
            then="Write one row an image, or name a column of single images.",
        )
    return cell[0] if cell else None


def _bytes(cell: Any) -> bytes | None:
    if isinstance(cell, Mapping):
        cell = cell.get("bytes")
    return bytes(cell) if isinstance(cell, Bytes) else None


def _located(path: str, folder: Path | None, where: str) -> str:
    if ADDRESS.match(path) or Path(path).is_absolute():
        return path
    if folder is None:
        raise InputError(
            f"{where} names the image {path!r:.80}, but rows that come from no file or folder here "
            "have no folder in which it would lie.",
            then="Fetch the dataset with its images (hf download ID --repo-type dataset "
            "--local-dir FOLDER) and set data.path=FOLDER, or give absolute paths.",
        )
    return str((folder / path).absolute())
