"""Fonts that hold the letters of a text: found on the machine or in installed font packages.

Matplotlib draws each letter from the first font of a list that holds it, so a list is chosen by
what the fonts hold. Letters that none of them holds are written as `[U+6771]`, and said once, with
what to install.
"""

import importlib.util
import logging
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matplotlib import font_manager, get_data_path
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

log = logging.getLogger(__name__)

FIRST = "DejaVu Sans"
"""Latin, Greek, Cyrillic and symbols; it comes with matplotlib."""

PREFERRED = (
    "Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "Meiryo", "IPAexGothic",
    "IPAPGothic", "MS Gothic", "Noto Sans CJK KR", "Noto Sans KR", "Apple SD Gothic Neo",
    "Malgun Gothic", "NanumGothic", "Noto Sans CJK SC", "Noto Sans SC", "PingFang SC",
    "Microsoft YaHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Noto Emoji", "Segoe UI Emoji",
    "Segoe UI Symbol", "Symbola", "Arial Unicode MS", "Droid Sans Fallback", "Unifont",
)  # fmt: skip
"""Fonts that are asked first, in this order; then all others that the machine has."""

PACKAGES = ("matplotlib_fontja", "koreanize_matplotlib", "manimgx_fonts")
"""Python packages that hold fonts; `pip install saefty[fonts]` brings them. They are not imported:
some change matplotlib's settings when they are."""

REMEDY = {
    "linux": "apt install fonts-noto-cjk fonts-symbola (Debian, Ubuntu), or dnf install "
    "google-noto-sans-cjk-fonts (Fedora)",
    "darwin": "install Noto Sans CJK and Noto Emoji with the Font Book",
    "win32": "add the Japanese and Korean supplemental fonts under Settings, Optional features",
}
UNFIT = ("last resort", "cmr10", "cmmi10", "cmsy10", "cmex10", "cmss10", "cmtt10",
         "cmb10", "stixsize", "stixnonunicode")  # fmt: skip
"""Placeholders, and fonts that hold other letters than they say."""
THINNEST = 300  # below this weight letters are too thin to read
UNSEEN = {"\ufe0e", "\ufe0f", "\u200d"}
"""What asks for another form of the letter before it, and is nothing by itself."""


@dataclass(frozen=True)
class Fitting:
    """Fonts for a text."""

    families: tuple[str, ...]
    """Names of fonts, the first one first."""
    missing: frozenset[str] = frozenset()
    """Letters that no font holds."""

    def written(self, text: str) -> str:
        """Return a text with the letters that no font holds written as code points."""
        if not self.missing and not UNSEEN & set(text):
            return text
        return "".join(
            f"[U+{ord(letter):04X}]" if letter in self.missing else letter
            for letter in text
            if letter not in UNSEEN
        )


def fit(letters: Iterable[str]) -> Fitting:
    """Choose fonts that together hold the letters.

    Args:
        letters: What is to be drawn; its order does not matter.
    """
    wanted = {ord(letter) for letter in letters if letter not in UNSEEN and _is_drawn(letter)}
    families = [FIRST]
    wanted -= _held_by(FIRST)
    for family in _others():
        if not wanted:
            break
        held = wanted & _held_by(family)
        if held:
            families.append(family)
            wanted -= held
    return Fitting(tuple(families), frozenset(map(chr, wanted)))


def fit_figure(figure: Figure) -> frozenset[str]:
    """Give every text of a figure the fonts that it needs; return the letters that none holds."""
    texts = [one for one in figure.findobj(Text) if isinstance(one, Text) and one.get_text()]
    fitting = fit({letter for one in texts for letter in one.get_text()})
    for one in texts:
        one.set_fontfamily(list(fitting.families))
        one.set_text(fitting.written(one.get_text()))
    return fitting.missing


@contextmanager
def quiet() -> Iterator[None]:
    """Let matplotlib take a font's regular weight for its bold one without a line on each."""
    finder = logging.getLogger("matplotlib.font_manager")
    finder.addFilter(_is_no_weight)
    try:
        yield
    finally:
        finder.removeFilter(_is_no_weight)


def _is_no_weight(record: logging.LogRecord) -> bool:
    return "Failed to find font weight" not in record.getMessage()


class MissingLetters:
    """Say once, for all pictures of a command, which letters no font holds."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, missing: Iterable[str]) -> None:
        """Warn of letters that were not said before, with what to install."""
        new = sorted(set(missing) - self._said)
        if not new:
            return
        self._said.update(new)
        shown = " ".join(f"{letter} (U+{ord(letter):04X})" for letter in new[:8])
        more = f" and {len(new) - 8} more" if len(new) > 8 else ""
        log.warning(
            "no installed font holds %s%s; pictures show their numbers instead. Install fonts: "
            "pip install 'saefty[fonts]', or %s",
            shown, more, REMEDY.get(sys.platform, REMEDY["linux"]),
        )  # fmt: skip


def _is_drawn(letter: str) -> bool:
    return letter != "\n" and not (unicodedata.category(letter) == "Cf" and letter != "\u00ad")


def _others() -> Iterator[str]:
    """Yield the other fonts of the machine by name, the preferred ones first."""
    known = _entries()
    yield from (name for name in PREFERRED if name in known)
    yield from (name for name in known if name not in PREFERRED and name != FIRST)


@cache
def _entries() -> dict[str, FontEntry]:
    """Return the machine's fonts and those of installed packages by name, one of each.

    Of a name's weights the one next to regular is taken; those that cannot be scaled are left out.
    """
    listed = {Path(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in _in_packages():
        if path not in listed:
            font_manager.fontManager.addfont(path)
    found: dict[str, FontEntry] = {}
    for entry in font_manager.fontManager.ttflist:
        if entry.name.lower().startswith(UNFIT) or "color emoji" in entry.name.lower():
            continue
        if _weight(entry) < THINNEST:
            continue
        if entry.name not in found or _distance(entry) < _distance(found[entry.name]):
            found[entry.name] = entry
    return dict(sorted(found.items()))


def _in_packages() -> Iterator[Path]:
    """Yield the files of matplotlib's own fonts and of installed packages.

    Matplotlib keeps a list of fonts that is made once for all its installations; one made by an
    installation without the fonts lacks them, and formulas are then drawn in others.
    """
    yield from sorted(Path(get_data_path()).glob("fonts/ttf/*.ttf"))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).rglob("*.[to]tf"))


def _weight(entry: FontEntry) -> int:
    weight = entry.weight
    return weight if isinstance(weight, int) else font_manager.weight_dict.get(weight, 400)


def _distance(entry: FontEntry) -> tuple[int, bool, str]:
    return abs(_weight(entry) - 400), entry.style != "normal", str(entry.fname)


@cache
def _held_by(name: str) -> frozenset[int]:
    """Return the code points that a font holds."""
    entry = _entries().get(name)
    if entry is None:
        return frozenset()
    try:
        return frozenset(FT2Font(entry.fname).get_charmap())
    except (OSError, RuntimeError):  # a file that is gone or no font
        return frozenset()
