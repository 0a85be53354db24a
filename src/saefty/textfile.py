"""Bytes of a text file become text: UTF-8, or what a byte-order mark says, and nothing by guessing.

A file in another encoding (cp932, EUC-KR, cp1251, …) is an error that names the line, the byte, the
encoding it seems to be in and how the line would read in it, because a guess that is wrong would be
analysed as if it were the text. With `encoding` the reader says which it is. A line ends at LF,
CRLF or CR, and at no other character: U+2028 and U+0085 belong to their sentence.
"""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saefty.errors import ConfigError, InputError
from saefty.registry import nearest

MARKS = (  # UTF-32's first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
KNOWN = (
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp932", "shift_jis", "euc-jp",
    "iso2022_jp", "euc-kr", "cp949", "gb18030", "big5", "cp1251", "koi8-r", "cp1252", "latin-1",
)  # fmt: skip
PACKED = ".gz"
"""What may follow a text file's suffix."""
SAMPLE = 64 * 1024
PLAUSIBLE = 0.4
_NUL, _NUL_OR_ESCAPE = re.compile("\0"), re.compile("\0|\x1b\\$")
_ENDS = re.compile(r"\r\n|\r|\n")


def decode_text(
    data: bytes, where: Path | str, *, encoding: str | None = None, option: str = "data.encoding"
) -> str:
    """Return the text of a whole file, without its byte-order mark.

    Args:
        data: The file's bytes.
        where: The file, for messages.
        encoding: The encoding to read it in; None is UTF-8, or what a byte-order mark says.
        option: What a user sets to name the encoding, for messages.

    Raises:
        InputError: If a byte cannot be read, or the text holds NUL characters; it names the line
            (from 1), the byte (from 0) and the likely encoding.
        ConfigError: If there is no such encoding.
    """
    mark, codec = _mark(data)
    if encoding is not None:
        named = _known(encoding, option)
        if named not in (codec, codec and codec[:6]):  # utf-16 is what its mark says
            mark, codec = 0, named
    codec = codec or "utf-8"
    try:
        text = data[mark:].decode(codec)
        bad = _refused(encoding).search(text)
        place = mark + len(text[: bad.start()].encode(codec)) if bad else None
    except UnicodeDecodeError as error:
        place = mark + error.start
    if place is not None:
        message, then = _unreadable(data, place, codec, where, option, encoding)
        raise InputError(message, then=then)
    return text


def read_text_lines(
    path: Path, *, encoding: str | None = None, option: str = "data.encoding"
) -> Iterator[tuple[int, str]]:
    """Yield each line's number, counted from 1, and its text without its end.

    UTF-8 is held a line at a time; another encoding, and a file that cannot be read, as a whole.

    Args:
        path: The file; it may be packed, and then ends in .gz.
        encoding: As for `decode_text`.
        option: As for `decode_text`.

    Raises:
        InputError: As `decode_text`, when the line that cannot be read is reached; or if the file
            cannot be opened, or unpacked.
        ConfigError: If there is no such encoding.
    """
    with reading(path):
        yield from _lines(path, encoding, option)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be opened, read or unpacked.

    Raises:
        InputError: In the place of the system's and the packer's own errors.
    """
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}.") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}.",
            then="Check that the file exists, and its permissions.",
        ) from None


def _lines(path: Path, encoding: str | None, option: str) -> Iterator[tuple[int, str]]:
    number, packed = 0, path.suffix.lower() == PACKED
    with gzip.open(path) if packed else open(path, "rb") as file:
        mark, codec = _mark(file.read(4))
        if {codec, encoding and _known(encoding, option)} <= {None, "utf-8"}:
            file.seek(mark)
            for data in file:  # ends at LF; a CR may end lines within
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError:
                    break
                if _refused(encoding).search(text):
                    break
                for line in text_lines(text):
                    number += 1
                    yield number, line
            else:
                return
        file.seek(0)
        whole = decode_text(file.read(), path, encoding=encoding, option=option)
    yield from list(enumerate(text_lines(whole), 1))[number:]


def text_lines(text: str) -> list[str]:
    """Return the lines of a text; an end at the very end begins no further line."""
    lines = _ENDS.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def likely_encoding(data: bytes) -> str | None:
    """Return the encoding in which bytes that are not UTF-8 read most like a written language.

    Each candidate that can read all of them is judged by the letters that come out: those in daily
    use in its language count for it, rare ones and odd neighbours against it.
    """
    if b"\x1b$" in data:
        return "iso2022_jp"
    wide = _without_mark(data)
    if wide:
        return wide
    sample = _sample(data)
    scores: dict[str, float] = {}
    for codec, weigh in CANDIDATES.items():
        try:
            text = sample.decode(codec)
        except UnicodeDecodeError:
            continue
        places = [i for i, letter in enumerate(text) if letter > "\x7f"]
        if places:
            scores[codec] = sum(weigh(text, i) for i in places) / len(places)
    best = max(scores, key=lambda codec: scores[codec], default=None)
    return best if best is not None and scores[best] >= PLAUSIBLE else None


def _refused(encoding: str | None) -> re.Pattern[str]:
    """Return what no text holds; ISO-2022-JP is ASCII bytes, so it is told by its escapes."""
    return _NUL if encoding else _NUL_OR_ESCAPE


def _mark(data: bytes) -> tuple[int, str | None]:
    for mark, codec in MARKS:
        if data.startswith(mark):
            return len(mark), codec
    return 0, None


def _known(encoding: str, option: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # bytes-to-bytes codecs such as base64 are no encodings of text
    except LookupError:
        raise ConfigError(
            f"{option}: there is no encoding {encoding!r}.{nearest(encoding, list(KNOWN))} "
            f"Known: {', '.join(KNOWN)}, and the others that Python reads."
        ) from None
    return {"utf-8-sig": "utf-8"}.get(name, name)


def _without_mark(data: bytes) -> str | None:
    """Tell UTF-16 without a mark by its zero bytes: every second one in text of Latin letters."""
    head = data[: SAMPLE - SAMPLE % 2]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if min(even, odd) * 4 < max(even, odd) >= max(3, len(head) // 16):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _sample(data: bytes) -> bytes:
    """Return the lines that hold letters beyond ASCII, up to `SAMPLE` bytes of them."""
    found, size = [], 0
    for line in data.splitlines():
        if not line.isascii():
            found.append(line)
            size += len(line)
            if size > SAMPLE:
                break
    return b"\n".join(found)


def _unreadable(
    data: bytes, place: int, codec: str, where: Path | str, option: str, encoding: str | None
) -> tuple[str, str]:
    """Return what is wrong with a byte, and what to do."""
    line, column = _line_and_column(data, place, codec)
    here = data[place : place + 3]
    of_file = "" if column == place else f"byte {place} of the file; "
    likely = likely_encoding(data) if encoding is None and not _mark(data)[0] else None
    if b"\0" in data and likely not in ("utf-16-le", "utf-16-be"):
        likely = None
    if here[:1] == b"\0":
        reason = f"byte {column} is a NUL, which no text holds ({of_file}counted from 0)"
    elif here[:2] == b"\x1b$":
        reason = f"byte {column} begins an escape sequence ({of_file}counted from 0)"
    else:
        value = f"{here[0]:#04x}" if here else "the file ends there"
        label = {"utf-8": "UTF-8"}.get(codec, codec)
        reason = f"byte {column} is not {label} ({value}; {of_file}counted from 0)"
        if codec == "utf-8" and re.match(rb"\xed[\xa0-\xbf][\x80-\xbf]", here):
            reason += ": half of a surrogate pair, written as if it were a character"
    if likely is None:
        then = f"Save the file as UTF-8, or name its encoding: {option}=cp932, say."
        if here[:1] == b"\0":
            then = "Save the file as UTF-8 without NUL characters."
        return f"{where}, line {line}: {reason}.", then
    return (
        f"{where}, line {line}: {reason}. It seems to be {likely}, in which the line reads "
        f"{_shown(data, place, likely)!r}.",
        f"If that is right, set {option}={likely}; or save the file as UTF-8.",
    )


def _line_and_column(data: bytes, place: int, codec: str) -> tuple[int, int]:
    """Return a byte's line, from 1, and its place in the line, from 0."""
    if codec.startswith(("utf-16", "utf-32")):  # a byte of a letter there may equal a line's end
        before = data[_mark(data)[0] : place].decode(codec, "ignore")
        return len(_ENDS.split(before)), place
    ends = [match.end() for match in re.finditer(rb"\r\n|\r|\n", data[:place])]
    return len(ends) + 1, place - (ends[-1] if ends else 0)


def _shown(data: bytes, place: int, codec: str) -> str:
    """Return the line of a byte, read in another encoding and cut short."""
    if codec.startswith("utf-16"):
        lines = _ENDS.split(data.decode(codec, "ignore"))
        return lines[0][:40]
    begin = max(data.rfind(b"\n", 0, place), data.rfind(b"\r", 0, place)) + 1
    ends = [end for end in (data.find(b"\n", place), data.find(b"\r", place)) if end >= 0]
    line = data[begin : min(ends, default=len(data))].decode(codec, "ignore")
    if len(line) <= 40:
        return line
    # A long line is shown around the byte: its beginning may hold nothing that is in question.
    first = max(0, len(data[begin:place].decode(codec, "ignore")) - 20)
    first = 0 if first < 10 else first
    shown = line[first : first + 39]
    return ("…" if first else "") + shown + ("…" if first + 39 < len(line) else "")


def _between(letter: str, low: str, high: str) -> bool:
    return low <= letter <= high


def _asian(
    codec: str, first: int, last: int, script: tuple[str, str] | None
) -> Callable[[str, int], float]:
    """Return the judge of an East Asian encoding.

    Args:
        codec: Its name.
        first: The first two-byte code of the letters in daily use (its standard's first level).
        last: The last one.
        script: The letters that only this language uses, such as kana.
    """

    def weigh(text: str, i: int) -> float:
        letter = text[i]
        if script and _between(letter, *script):
            return 1.0 if codec != "euc-kr" or _daily(letter) else 0.1
        if _between(letter, "\u3000", "\u303f") or _between(letter, "\uff01", "\uff5e"):
            return 0.8
        if _between(letter, "\u2010", "\u203b"):
            return 0.5
        if _between(letter, "\u4e00", "\u9fff"):
            # Kana lift Japanese above Chinese; without any, EUC bytes are rather Chinese.
            common = {"cp932": 0.9, "euc-jp": 0.6, "euc-kr": 0.1}.get(codec, 0.8)
            return common if _daily(letter) else 0.1
        if _between(letter, "\u3040", "\u30ff"):
            return 0.3
        return -0.3

    def _daily(letter: str) -> bool:
        return first <= int.from_bytes(letter.encode(codec), "big") <= last

    return weigh


def _cyrillic(text: str, i: int) -> float:
    letter, before = text[i], text[i - 1] if i else " "
    after = text[i + 1] if i + 1 < len(text) else " "
    if not ("\u0410" <= letter <= "\u044f" or letter in "ёЁіІїЇєЄґҐ"):
        return 0.5 if letter in "«»—–“”„…№’" else -0.3
    if any(one.isascii() and one.isalpha() for one in (before, after)):
        return -0.5
    if letter.isupper() and (before.islower() or (before.isalpha() and after.islower())):
        return -0.5  # what the other Cyrillic encoding makes of small letters
    return 1.0


def _latin(text: str, i: int) -> float:
    letter, before = text[i], text[i - 1] if i else " "
    after = text[i + 1] if i + 1 < len(text) else " "
    if not letter.isalpha():
        return 0.5 if letter in "«»—–“”‘’„…€£§°¿¡\xa0" else -0.3
    if letter.isupper() and before.islower():
        return -0.5
    beside = [one for one in (before, after) if one.isalpha()]
    return 0.9 if any(one.isascii() for one in beside) or not beside else 0.0


CANDIDATES: dict[str, Callable[[str, int], float]] = {
    "cp932": _asian("cp932", 0x889F, 0x9872, ("\u3041", "\u30fe")),
    "euc-jp": _asian("euc-jp", 0xB0A1, 0xCFD3, ("\u3041", "\u30fe")),
    "euc-kr": _asian("euc-kr", 0xB0A1, 0xC8FE, ("\uac00", "\ud7a3")),
    "gb18030": _asian("gb18030", 0xB0A1, 0xD7F9, None),
    "big5": _asian("big5", 0xA440, 0xC67E, None),
    "cp1251": _cyrillic,
    "koi8-r": _cyrillic,
    "cp1252": _latin,
}
"""Encodings that are told apart, each with a judge: (text, place of a letter) -> -0.5 to 1."""
