"""What the pictures share: the registry, the style, and the one way to a file.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; a colour means
the same in every picture, and no difference is told by colour alone. Text falls back through fonts
that hold Japanese, Korean and Cyrillic, of those that are installed.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from saefty import fsio
from saefty.registry import Registry

log = logging.getLogger(__name__)

Canvas: TypeAlias = Figure | SubFigure

PLOTS: Registry[Callable[[Any, Canvas], None]] = Registry("plot", "saefty.plots")
"""A plot is `draw(data, figure)`: it adds axes to an empty figure and writes no file."""

HARMFUL = "#D55E00"
HARMLESS = "#0072B2"
FOUND = "#009E73"
NEUTRAL = "#6B6B6B"
FAINT = "#D9D9D9"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B6B6B")

DPI = 160
SIZE = (7.2, 4.5)
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans JP",
    "Noto Sans KR",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Yu Gothic",
    "Malgun Gothic",
    "IPAexGothic",
    "NanumGothic",
    "Arial Unicode MS",
)


def save_plot(
    name: str, data: Any, path: Path | str, *, size: tuple[float, float] = SIZE, dpi: int = DPI
) -> Path:
    """Draw a registered plot and write it to a file, whose suffix chooses the format.

    Args:
        name: The plot's name in `PLOTS`.
        data: What it draws.
        path: The file, such as `plots/gate_curve.png`.
        size: Width and height in inches.
        dpi: Dots an inch.

    Returns:
        The path.
    """
    final = Path(path)
    with mpl.rc_context(style()):
        figure = Figure(figsize=size, layout="constrained")
        PLOTS[name](data, figure)
        # Without the software's version two runs of the same data write the same bytes.
        metadata = {"Software": None} if final.suffix == ".png" else None
        with fsio.staged(final) as temporary, _counted_glyphs(final):
            figure.savefig(temporary, dpi=dpi, metadata=metadata)
    return final


def style() -> dict[Any, Any]:
    """Return matplotlib's settings for every picture."""
    return {
        "font.family": list(installed_fonts()),
        "font.size": 10.0,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": NEUTRAL,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=SERIES),
        "grid.color": "#ECECEC",
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "xtick.color": "#404040",
        "ytick.color": "#404040",
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "axes.unicode_minus": True,
    }


@cache
def installed_fonts() -> tuple[str, ...]:
    """Return those of the fonts that this machine has; the first ships with matplotlib."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(font for font in FONTS if font in known)


@contextmanager
def _counted_glyphs(path: Path) -> Iterator[None]:
    """Say once how many letters no installed font holds, instead of a warning for each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = {str(one.message) for one in caught if "missing from font" in str(one.message)}
    for one in caught:
        if str(one.message) not in missing:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        log.warning(
            "%s shows boxes for %d letters that no installed font holds; install Noto Sans CJK",
            path,
            len(missing),
        )


def say_nothing_to_draw(ax: Axes, why: str) -> None:
    """Write on empty axes why there is nothing on them."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color=NEUTRAL)
