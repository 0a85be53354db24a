"""The language of replies, told among a few."""

import sys

import numpy as np
import pytest

from saefty.errors import ConfigError, MissingExtraError
from saefty.judges import language as module
from saefty.judges.base import make_judge
from saefty.judges.language import LANGUAGES, LanguageJudge

SENTENCES = {
    "en": "The children are playing in the garden behind the old house.",
    "fr": "Les enfants jouent dans le jardin derrière la vieille maison.",
    "de": "Die Kinder spielen im Garten hinter dem alten Haus.",
    "es": "Los niños juegan en el jardín detrás de la casa vieja.",
    "it": "I bambini giocano nel giardino dietro la vecchia casa.",
    "pt": "As crianças estão brincando no jardim atrás da casa velha.",
    "ru": "Дети играют в саду за старым домом.",
    "ja": "子供たちは古い家の裏の庭で遊んでいます。",
    "ko": "아이들이 오래된 집 뒤의 정원에서 놀고 있습니다.",
    "zh": "孩子们正在老房子后面的花园里玩耍。",
}


@pytest.mark.parametrize("target", LANGUAGES)
def test_a_sentence_is_in_its_own_language_and_in_no_other(target):
    found = LanguageJudge(target).score([""] * len(SENTENCES), list(SENTENCES.values()))
    for language, score in zip(SENTENCES, found, strict=True):
        assert score > 0.8 if language == target else score < 0.2


def test_the_confidences_of_all_languages_add_up_to_one():
    text = SENTENCES["pt"]
    total = sum(LanguageJudge(target).score([""], [text])[0] for target in LANGUAGES)
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize(
    "reply", ["", " \n", "ok", "123 456 789 012", "?!…", "Oui, merci.", "はい。"]
)
def test_what_is_too_short_to_tell_is_missing(reply):
    assert np.isnan(LanguageJudge("fr").score([""], [reply])).all()


def test_a_few_characters_of_japanese_are_enough():
    assert LanguageJudge("ja").score([""], ["はい、そうです"])[0] > 0.8


def test_a_script_that_none_of_the_languages_has_scores_0():
    found = LanguageJudge("fr", ["en", "de"]).score([""], [SENTENCES["ja"]])
    assert found.tolist() == [0.0]


def test_fewer_languages_are_told_apart_more_surely():
    text = "La casa es grande y bonita."
    few = LanguageJudge("es", ["en"]).score([""], [text])[0]
    assert few >= LanguageJudge("es").score([""], [text])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tlh"}, "there is no language tlh; the known are af, ar, "),
        ({"target": "fr", "languages": ["en", "xx"]}, "there is no language xx"),
        ({"target": "fr", "languages": ["fr"]}, "name at least one language that fr is told from"),
        ({}, "missing a required argument: 'target'"),
    ],
)
def test_languages_that_cannot_be_told_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_judge("language", options)


def test_without_lingua_it_says_what_to_install(monkeypatch):
    module._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'saefty\[langid\]'"):
        LanguageJudge("fr")
