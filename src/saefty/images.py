"""Images: what of a file is looked at, what is refused and why, and how those in memory are kept.

A file's content tells its kind, whatever its name says. A file is read as *one upright picture*:
its first frame where it is animated, turned as its EXIF says, transparency laid on white, colours
as 8-bit RGB without a colour profile. Size and kind are judged by the header, before anything is
decoded, so that a small file cannot fill the memory. Only formats whose decoders do nothing but
decode are opened (PostScript, which would run a program, is not), and nothing is ever fetched.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from saefty import fsio
from saefty.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""How files of these formats begin."""

MAX_PIXELS = 1 << 26
"""Pixels of the largest image that is decoded, such as 8192 × 8192: 256 MiB at most."""

MAX_BYTES = 1 << 27
"""Bytes of the largest file, as some decoders take all of it into memory."""

SHOWN_PATH = 120
SHOWN_BYTES = 12
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")
ORIENTATION = 0x0112
"""EXIF's tag for which way up the picture is."""

DIGESTS_KEPT = 1 << 17


class BadImageError(InputError):
    """An image that cannot be used; the message is the reason.

    Attributes:
        kind: The reason in a few words, the same for all images with this fault.
        place: The image, and what else is known of this one.
    """

    def __init__(self, kind: str, place: object, detail: str = "") -> None:
        shown = str(place)
        if len(shown) > SHOWN_PATH:
            shown = f"…{shown[-SHOWN_PATH:]}"
        more = f" ({detail})" if detail else ""
        super().__init__(f"{shown}: {kind}{more}")
        self.kind = kind
        self.place = f"{shown}{more}"


@dataclass(frozen=True)
class ImageFacts:
    """What an image's header says."""

    format: str
    """Such as PNG, by content."""
    width: int
    height: int
    """Pixels, as stored: before it is turned."""
    mode: str
    """Pillow's name of how pixels are stored, such as RGB, CMYK or P (palette)."""
    animated: bool
    """Whether there are frames behind the first, which are not looked at."""


def load_image(path: Path | str) -> "Image":
    """Return the picture that a file shows: RGB, upright, first frame, transparency on white.

    Raises:
        BadImageError: If it is missing, empty, cut off, damaged, no image, too large, or not a
            file but an address.
    """
    with _opened(path) as image:
        image.load()
        return _upright_rgb(image, path)


def image_facts(path: Path | str) -> ImageFacts:
    """Return what an image's header says, without decoding it.

    Raises:
        BadImageError: As `load_image`, but for damage behind the header.
    """
    with _opened(path) as image:
        animated = bool(getattr(image, "is_animated", False))
        return ImageFacts(image.format or "", image.width, image.height, image.mode, animated)


def image_digest(path: Path | str) -> str:
    """Return the xxh3-128 checksum of an image file's bytes.

    A file that has not changed since this process last asked is not read again.

    Raises:
        BadImageError: If there is no such file, or it cannot be read.
    """
    found = _file(path)
    try:
        return _digest(str(path), found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise BadImageError("cannot be read", path, error.strerror or str(error)) from None


def digest_or_none(path: Path | str) -> str | None:
    """Return `image_digest`, or None where there is no such file, or it cannot be read."""
    try:
        return image_digest(path)
    except BadImageError:
        return None


@lru_cache(maxsize=DIGESTS_KEPT)
def _digest(path: str, _inode: int, _size: int, _changed: int) -> str:
    return fsio.digest(path)


def keep_image(data: "bytes | Image", folder: Path | None = None) -> str:
    """Keep an image that is not a file, once, and return the path of its copy.

    Bytes are kept as they are, bad ones too, so that a run can count them with their reason. A
    Pillow image is kept as the picture that `load_image` gives of it, in PNG.

    Args:
        data: The file's bytes, or a Pillow image.
        folder: Where to keep it; None takes `kept_folder()`.

    Returns:
        The absolute path, whose name is the checksum of its bytes.

    Raises:
        BadImageError: If a Pillow image cannot be decoded.
        DiskError: If the copy cannot be written.
    """
    held = data if isinstance(data, bytes) else _png(data)
    path = (folder or kept_folder()) / fsio.digest_bytes(held)
    fsio.commit_bytes(path, held)
    return str(path.absolute())


def kept_folder() -> Path:
    """Return where images that are not files are kept: in the hub's folder of assets (HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE).expanduser() / "saefty" / "images"


def _png(image: "Image") -> bytes:
    place = getattr(image, "filename", "") or "an image in memory"
    _check_size(image, place)
    with _explained(place):  # it may be decoded only now
        image.load()
        picture = _upright_rgb(image, place)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _file(path: Path | str) -> os.stat_result:
    """Return what the system says of a file.

    Raises:
        BadImageError: If there is no file.
    """
    if ADDRESS.match(str(path)):
        raise BadImageError("is an address, and images are read from files only", path)
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        raise BadImageError("there is no such file", path) from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise BadImageError("cannot be read", path, _said(error)) from None
    if stat.S_ISDIR(found.st_mode):
        raise BadImageError("is a folder", path)
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
        raise BadImageError("is not a regular file", path)
    return found


@contextmanager
def _opened(path: Path | str) -> Iterator["Image"]:
    """Open an image by its header, and explain what goes wrong while it is read.

    Raises:
        BadImageError: If it is no image, too large, or damaged.
    """
    size = _file(path).st_size
    if size == 0:
        raise BadImageError("is empty", path, "0 bytes")
    if size > MAX_BYTES:
        raise BadImageError("is too large", path, f"{size:,} bytes, at most {MAX_BYTES:,}")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise BadImageError("cannot be read", path, _said(error)) from None
    with file, warnings.catch_warnings(), _explained(path):
        # Of large images, which are an error here, and of metadata that nobody reads.
        warnings.simplefilter("ignore")
        image = _header(file, path)
        _check_size(image, path)
        yield image


def _header(file: BinaryIO, path: Path | str) -> "Image":
    import PIL.Image

    try:
        return PIL.Image.open(file, formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        detail = f"{int(pixels[1]):,} pixels, at most {MAX_PIXELS:,}" if pixels else str(error)
        raise BadImageError("is too large", path, detail) from None
    except PIL.UnidentifiedImageError:
        file.seek(0)
        begin = file.read(SHOWN_BYTES)
        if begin.startswith(SIGNATURES) or begin[4:8] == b"ftyp":
            raise BadImageError("is damaged", path, "its header cannot be read") from None
        raise BadImageError(
            "is not an image of a known kind",
            path,
            f"it begins with {begin!r}; known are {', '.join(FORMATS)}",
        ) from None


@contextmanager
def _explained(path: object) -> Iterator[None]:
    """Turn the ways in which a decoder fails on damaged bytes, which are many, into one.

    Raises:
        BadImageError: If it fails.
        MemoryError: If that is why.
    """
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise whatever the bytes lead them to
        said = _said(error)
        kind = "is cut off" if "truncated" in said.lower() else "is damaged"
        raise BadImageError(kind, path, said) from None


def _check_size(image: "Image", path: object) -> None:
    """Refuse an image by the size that its header announces.

    Raises:
        BadImageError: If it has too many pixels, or none.
    """
    width, height = image.size
    if not width or not height:
        raise BadImageError("has no pixels", path, f"{width} × {height}")
    if width * height > MAX_PIXELS:
        raise BadImageError(
            "is too large",
            path,
            f"{width:,} × {height:,} = {width * height:,} pixels, at most {MAX_PIXELS:,}",
        )


def _upright_rgb(image: "Image", path: Path | str) -> "Image":
    """Return a picture of its own: nothing of the file, such as its EXIF, goes with it."""
    import PIL.Image

    turn = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_270,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_90,
    }.get(_orientation(image))
    if image.mode.startswith("I;16"):
        import numpy as np

        # The high byte, which Pillow takes of 16-bit colours too; its own way cuts off at 255.
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImageError(
            "has pixels of 32 bits",
            path,
            "nothing says which value is white; save it with 8 or 16 bits",
        )
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        white = PIL.Image.new("RGBA", clear.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, clear).convert("RGB")
    else:
        picture = image.convert("RGB")
    if turn is not None:
        picture = picture.transpose(turn)
    # A processor that turns pictures itself would turn it a second time.
    picture.info.clear()
    return picture


def _orientation(image: "Image") -> int:
    """Return which way up a picture is; upright where its EXIF cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - the picture itself is whole
        return 1


def _said(error: Exception) -> str:
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(told.split())[:SHOWN_PATH]
