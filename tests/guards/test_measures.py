"""What a guard is made of, and what its card says."""

import numpy as np
import pytest

import guard_cases
from guard_cases import spec_of
from saefty.guards.files import save_guard
from saefty.guards.report import measure
from saefty.guards.scoring import Verdicts
from saefty.guards.spec import plain_text, reading_of
from saefty.linear import Linear
from saefty.metrics.intervals import Bootstrap
from saefty.records import Example, Message


def test_parts_of_different_width_are_not_saved_together(tmp_path, saved):
    linear = Linear(np.arange(2), np.zeros(2), np.ones(2), np.ones(2), 0.0, 7)
    with pytest.raises(ValueError, match="reads 7 columns, but there are 32 of dense"):
        save_guard(tmp_path / "guard", spec_of("dense"), linear, guard_cases.facts())
    with pytest.raises(ValueError, match="a guard of latents takes an SAE"):
        save_guard(tmp_path / "guard", spec_of("latents"), linear, guard_cases.facts())
    assert not (tmp_path / "guard").exists()


def test_words_are_counted_in_what_was_written():
    talk = (Message("system", "be kind"), Message("user", "hi"), Message("assistant", "hello"))
    assert plain_text(Example("1", "hi", response="hello")) == "hi\nhello"
    assert plain_text(Example("1", "", messages=talk)) == "be kind\nhi\nhello"
    assert plain_text(Example("1", "", messages=talk, response="hello")) == "be kind\nhi\nhello"
    assert plain_text(Example("1", "", messages=talk[:2], response="hi")) == "be kind\nhi\nhi"


def test_bare_texts_are_read_as_most_training_texts_were():
    raw = [Example(str(i), "text", raw=i < 6) for i in range(10)]
    assert reading_of(raw) == {"raw": True, "with_response": False}
    answered = [Example(str(i), "text", response="so" if i < 4 else None) for i in range(6)]
    assert reading_of(answered) == {"raw": False, "with_response": True}


def test_measures_are_by_hand_on_the_labelled_texts_alone():
    labels = [True, True, False, False, None, True]
    examples = [Example(str(i), "text", label=label) for i, label in enumerate(labels)]
    odds = np.array([3.0, -1.0, 1.0, -2.0, 5.0, np.nan])
    found = measure(examples, Verdicts(odds, ("ok",) * 5 + ("too_long",), {}, np.zeros(6)), 0.0)
    assert (found["texts"], found["scored"], found["flagged"]) == (6, 5, 3)
    assert found["not_scored"] == {"too_long": 1}
    assert (found["labelled"], found["harmful"]) == (4, 2)
    assert found["auroc"]["estimate"] == 0.75
    assert found["recall"]["estimate"] == 0.5
    assert found["false_positive_rate"]["estimate"] == 0.5
    wilson = Bootstrap(2).mean(np.array([1.0, 0.0]))
    assert found["recall"]["low"] == pytest.approx(wilson.low)


def test_labels_of_one_kind_give_no_auroc():
    examples = [Example(str(i), "text", label=True) for i in range(3)]
    found = measure(
        examples, Verdicts(np.array([1.0, 2.0, -1.0]), ("ok",) * 3, {}, np.zeros(3)), 0.0
    )
    assert found["auroc"] is None
    assert found["recall"]["estimate"] == pytest.approx(2 / 3)
    assert found["false_positive_rate"] is None


def test_intervals_drawn_in_blocks_are_those_of_one_bootstrap(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.random(600) < 0.4
    odds = rng.normal(size=600) + labels
    examples = [
        Example(str(i), "text", label=bool(one), group=f"g{i // 2}") for i, one in enumerate(labels)
    ]
    verdicts = Verdicts(odds, ("ok",) * 600, {}, np.zeros(600))
    whole = measure(examples, verdicts, 0.5)
    held = []

    class Watched(Bootstrap):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            held.append(self.weights.size)

    monkeypatch.setattr("saefty.guards.report.Bootstrap", Watched)
    monkeypatch.setattr("saefty.guards.report.BLOCK_VALUES", 600 * 30)
    blocks = measure(examples, verdicts, 0.5)
    assert max(held) == 600 * 30
    assert len(held) == 3 * 34  # three measures of 1000 draws, 30 at a time
    for name in ("auroc", "recall", "false_positive_rate"):
        assert blocks[name]["estimate"] == whole[name]["estimate"]
        assert blocks[name]["method"] == whole[name]["method"]
        width = whole[name]["high"] - whole[name]["low"]
        for end in ("low", "high"):
            assert blocks[name][end] == pytest.approx(whole[name][end], abs=0.1 * width)


def test_blocks_keep_the_exact_interval_of_a_ranking_without_an_error(monkeypatch):
    labels = [i % 2 == 0 for i in range(20)]
    examples = [Example(str(i), "text", label=one) for i, one in enumerate(labels)]
    verdicts = Verdicts(np.where(labels, 1.0, -1.0), ("ok",) * 20, {}, np.zeros(20))
    whole = measure(examples, verdicts, 0.0)
    monkeypatch.setattr("saefty.guards.report.BLOCK_VALUES", 20)
    assert measure(examples, verdicts, 0.0) == whole
    assert "Newcombe" in whole["auroc"]["method"]
