"""Pictures show Japanese, Korean, Cyrillic and emoji, or say which letters no font holds."""

import importlib.util
import logging
import sys
import warnings

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from saefty import fonts
from saefty.fonts import PACKAGES, Fitting, MissingLetters, fit, fit_figure
from saefty.plots import base, token_bars
from saefty.plots.base import save_plot
from saefty.plots.token_bars import TokenBars, TokenPanel

SCRIPTS = {
    "Japanese": "東京は日本の首都です。「カタカナ」龍",
    "Korean": "서울은 대한민국의 수도이다.",
    "Cyrillic": "Москва — столица России. Їжак",
    "emoji": "😀🎉🗼🍞🤖",
}
NOBODYS = "\U0010fffc\U0010fffd"
extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in PACKAGES),
    reason="needs saefty[fonts]",
)


@extra
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_fonts_of_the_extra_hold_every_script(script, monkeypatch):
    ours = {"DejaVu Sans", "IPAexGothic", "NanumGothic", "Noto Emoji"}
    entries = {name: one for name, one in fonts._entries().items() if name in ours}
    monkeypatch.setattr(fonts, "_entries", lambda: entries)
    fitting = fit(SCRIPTS[script])
    assert fitting.missing == frozenset()
    assert fitting.families[0] == "DejaVu Sans"


def picture():
    panels = tuple(
        TokenPanel(text, "token 1", np.arange(2), np.array([2.0, 1.0]), np.full((2, 3), 0.8))
        for text in SCRIPTS.values()
    )
    return TokenBars("Layer 1", " ".join(SCRIPTS.values()), (panels,))


@extra
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_all_scripts_misses_no_glyph(tmp_path, caplog, suffix):
    data = picture()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")  # "Glyph 26481 missing from font" is one
        save_plot("token_bars", data, tmp_path / f"a.{suffix}", size=data.size, dpi=60)
    assert caplog.records == []


def test_letters_that_no_font_holds_are_written_as_numbers_and_named(tmp_path, caplog, monkeypatch):
    only = {"DejaVu Sans": fonts._entries()["DejaVu Sans"]}
    monkeypatch.setattr(fonts, "_entries", lambda: only)
    for module in (base, token_bars):
        monkeypatch.setattr(module, "MISSING", MissingLetters())
    data = picture()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "saefty"):
        warnings.simplefilter("error")
        save_plot("token_bars", data, tmp_path / "a.png", size=data.size, dpi=60)
        save_plot("token_bars", data, tmp_path / "b.svg", size=data.size)
    (record,) = caplog.records
    said = record.getMessage()
    assert "(U+3001)" in said or "(U+3002)" in said
    assert "pip install 'saefty[fonts]'" in said
    assert fonts.REMEDY.get(sys.platform, fonts.REMEDY["linux"]) in said


def test_only_missing_letters_are_replaced():
    fitting = fit("a東" + NOBODYS)
    assert set(NOBODYS) <= fitting.missing
    assert Fitting(("DejaVu Sans",), frozenset("東")).written("a東b") == "a[U+6771]b"
    assert Fitting(("DejaVu Sans",)).written("a🗼\ufe0f\u200d") == "a🗼"


def test_latin_and_cyrillic_need_no_other_font():
    assert fit("Paris, Москва 1 + 1 = 2 ␣↵").families == ("DejaVu Sans",)


def test_every_text_of_a_figure_gets_its_fonts(tmp_path):
    figure = Figure()
    figure.suptitle("a" + NOBODYS[0])
    assert fit_figure(figure) == frozenset(NOBODYS[0])
    assert figure.get_suptitle() == "a[U+10FFFC]"


def test_bitmaps_placeholders_and_thin_fonts_are_not_taken():
    names = [name.lower() for name in fonts._entries()]
    assert not any("color emoji" in name or name.startswith("last resort") for name in names)
    assert "cmsy10" not in names
    assert all(fonts._weight(one) >= fonts.THINNEST for one in fonts._entries().values())


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_font_list_made_without_matplotlibs_own_fonts_leaves_formulas_whole(
    tmp_path, caplog, monkeypatch, suffix
):
    manager = font_manager.fontManager
    others = [one for one in manager.ttflist if not one.name.startswith(("STIX", "cm"))]
    monkeypatch.setattr(manager, "ttflist", others)
    manager._findfont_cached.cache_clear()
    fonts._entries.cache_clear()
    figure = Figure()
    figure.suptitle(f"$10^{{-3}}$ {suffix}")  # that no test drew before: formulas are kept
    fit_figure(figure)
    with caplog.at_level(logging.WARNING):
        figure.savefig(tmp_path / f"a.{suffix}")
    fonts._entries.cache_clear()
    assert caplog.records == []


def test_packages_of_fonts_are_found_without_being_imported():
    fonts._entries()
    assert not set(PACKAGES) & set(sys.modules)
