import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from saefty.metrics.intervals import Interval
from saefty.metrics.leaks import (
    duplicate_leaks,
    find_leaks,
    length_leak,
    normalise,
    source_leak,
    words_leak,
)

WORDS = [
    ["river", "stone", "winter", "ladder", "copper"][i % 5] + str(i * i * 7919 % 10007)
    for i in range(4000)
]


def sentences(n, words=12, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(n)]


def halves(n):
    first = np.arange(n) < n // 2
    return first, ~first


def test_longer_harmful_texts_are_named_with_their_auroc():
    harmful = np.arange(100) % 2 == 0
    texts = ["a" * (60 + 20 * h + i % 31) for i, h in enumerate(harmful)]
    warning = length_leak(texts, harmful)
    assert warning.name == "length"
    assert "longer" in warning.message
    assert warning.figures["auroc"] == pytest.approx(
        roc_auc_score(harmful, [len(text) for text in texts])
    )


def test_lengths_without_relation_to_the_label_raise_no_warning():
    rng = np.random.default_rng(0)
    harmful = np.arange(200) % 2 == 0
    assert length_leak(["a" * n for n in rng.integers(10, 99, 200)], harmful) is None


def test_a_few_texts_are_no_evidence_of_a_length_leak():
    harmful = np.array([True, True, False, False])
    texts = ["aaaa", "aa", "aaa", "a"]  # AUROC 0.75, on four texts
    assert length_leak(texts, harmful) is None


@pytest.mark.parametrize(
    ("estimate", "low", "warns"), [(0.9, 0.8, True), (0.62, 0.45, False), (0.55, 0.52, False)]
)
def test_a_bag_of_words_warns_when_it_is_surely_good(estimate, low, warns):
    auroc = Interval(estimate, low, 0.99, "bootstrap", 50)
    assert (words_leak(auroc) is not None) == warns


def test_sources_with_one_label_are_listed():
    harmful = np.array([True, True, False, False, True, False])
    warning = source_leak(harmful, np.array([0, 0, 1, 1, 2, 2]), ["advbench", "alpaca", "mixed"])
    assert "advbench (all harmful), alpaca (all harmless)" in warning.message
    assert warning.figures["share_of_examples"] == pytest.approx(4 / 6)
    assert warning.figures["accuracy_of_source"] == pytest.approx(5 / 6)


def test_sources_with_both_labels_raise_no_warning():
    harmful = np.array([True, False, True, False])
    assert source_leak(harmful, np.array([0, 0, 1, 1])) is None
    assert source_leak(harmful, None) is None


def test_the_same_text_on_both_sides_is_counted():
    texts = sentences(20)
    texts[12], texts[15] = texts[2].upper() + "!!", texts[3]
    (warning,) = duplicate_leaks(texts, np.ones(20, dtype=bool), *halves(20))
    assert warning.name == "duplicates"
    assert warning.figures == {"texts": 2.0, "share": 0.2}


def test_a_nearly_equal_text_is_counted_apart():
    texts = sentences(20)
    texts[12] = texts[2][:-1] + "x"
    (warning,) = duplicate_leaks(texts, np.ones(20, dtype=bool), *halves(20))
    assert warning.name == "near_duplicates"
    assert warning.figures["texts"] == 1.0


def test_twins_on_one_side_are_no_leak():
    texts = sentences(20)
    texts[1] = texts[2]
    assert duplicate_leaks(texts, np.ones(20, dtype=bool), *halves(20)) == []


@pytest.mark.parametrize("change", [0, 1, 3, 8, 20])
def test_near_follows_the_overlap_of_stretches_of_five(change):
    one = sentences(1)[0]
    other = "q" * change + one[change:]

    def stretches(text):
        plain = normalise(text)
        return {plain[i : i + 5] for i in range(len(plain) - 4)}

    overlap = len(stretches(one) & stretches(other)) / len(stretches(one) | stretches(other))
    found = duplicate_leaks([one, other], np.ones(2, dtype=bool), *halves(2))
    assert bool(found) == (overlap >= 0.9)


def test_one_text_with_two_labels_is_named():
    texts = ["same text here"] * 2 + sentences(2)
    harmful = np.array([True, False, True, False])
    first = np.array([True, True, False, False])
    (warning,) = duplicate_leaks(texts, harmful, first, ~first)
    assert warning.name == "conflicting_labels"


@pytest.mark.parametrize("named", [True, False])
def test_one_question_about_different_images_is_no_duplicate_and_no_conflict(named):
    texts = ["What is meant by this picture?"] * 40
    harmful = np.arange(40) % 2 == 0
    images = [f"image {i}" for i in range(40)]
    found = find_leaks(texts, harmful, parts=halves(40), images=images if named else None)
    names = [] if named else ["duplicates", "conflicting_labels"]
    assert [warning.name for warning in found] == names


def test_texts_are_twins_with_the_same_image_alone():
    texts = ["What is meant by this picture? Answer in one word."] * 12
    texts[9] = texts[9][:-2] + "x"
    images = [*"abcdef", "a", "b", "x", "d", "e", None]
    labels = np.ones(12, dtype=bool)
    labels[7] = False  # that of image b
    found = duplicate_leaks(texts, labels, *halves(12), images)
    assert {warning.name: warning.figures["texts"] for warning in found} == {
        "duplicates": 3.0,  # a, b, e
        "near_duplicates": 1.0,  # d
        "conflicting_labels": 1.0,  # b
    }
    assert "3 of the 6 texts with their images of the report side" in found[0].message
    assert "1 texts with their images are labelled harmful in one place" in found[2].message


def test_nearly_equal_texts_with_different_images_are_none():
    texts = sentences(2)
    texts[1] = texts[0][:-1] + "x"
    both = np.ones(2, dtype=bool)
    assert duplicate_leaks(texts, both, *halves(2), ["a", "b"]) == []
    # b stands on the first side as well, with another text
    texts, images = [*sentences(2), texts[1]], ["a", "b", "b"]
    first = np.array([True, True, False])
    assert duplicate_leaks(texts, np.ones(3, dtype=bool), first, ~first, images) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello,  World!", "hello world"),
        ("ＡＢＣ　１２３", "abc 123"),
        ("東京へ行く。", "東京へ行く"),
        ("안녕하세요?", "안녕하세요"),
        ("ПРИВЕТ", "привет"),
    ],
)
def test_case_width_spaces_and_punctuation_do_not_make_a_text_new(one, other):
    assert normalise(one) == normalise(other)


def test_vowel_signs_belong_to_the_text():
    assert normalise("कि") != normalise("का")


def test_clean_data_raise_no_warning():
    rng = np.random.default_rng(0)
    texts = sentences(200)
    harmful = rng.random(200) < 0.5
    assert find_leaks(texts, harmful, None, rng.integers(0, 2, 200), halves(200)) == []


def test_all_shortcuts_are_named_at_once():
    texts = ["x" * (5 + i % 7) for i in range(40)] + ["y" * (50 + i % 7) for i in range(40)]
    harmful = np.arange(80) >= 40
    even = np.arange(80) % 2 == 0
    found = find_leaks(
        texts,
        harmful,
        None,
        harmful.astype(int),
        (even, ~even),
        words_auroc=Interval(1.0, 0.9, 1.0, "Newcombe", 80),
    )
    assert [warning.name for warning in found] == ["source", "duplicates", "length", "words"]


def test_five_thousand_texts_are_compared_in_seconds():
    texts = sentences(5000, words=30)
    assert duplicate_leaks(texts, np.ones(5000, dtype=bool), *halves(5000)) == []
