"""What every judge must do, whoever registered it; the one behind an address asks a local one."""

import numpy as np
import pytest

import tiny_models
from fault_server import Endpoint, serving
from guard_cases import make_guard
from saefty.judges.base import JUDGES, Judge
from saefty.records import Example

PROMPTS = [Example("a", "the lazy dog"), "the quick brown fox", Example("c", "bake bread")]
REPLIES = [
    "jumps over the lazy dog and the other dogs",
    "I'm sorry, but I can't help with that.",
    "les enfants jouent dans le jardin de la maison",
]

OPTIONS = {
    "lexicon": {"words": ["the", "dog"]},
    "regex": {"pattern": "dog"},
    "language": {"target": "fr", "languages": ["en", "fr"]},
}
"""What judges are made with that cannot be made without."""


def make(name, tmp_path, url):
    if name == "perplexity":
        model = tiny_models.load("llama")
        return JUDGES[name](model, ["jumps over", "the quick dog", "at home"])
    if name == "openai":
        options = {"model": "m", "criterion": "French", "url": url, "key_variable": None}
        return JUDGES[name](**options, cache=str(tmp_path / "c.sqlite"))
    if name == "guard":
        return JUDGES[name](str(make_guard(tmp_path / "guard", "words")))
    return JUDGES[name](**OPTIONS.get(name, {}))


@pytest.fixture(params=list(JUDGES))
def judge(request, tmp_path):
    with serving(Endpoint()) as url:
        yield make(request.param, tmp_path, url)


def test_it_scores_each_reply_from_0_to_1_or_not_at_all(judge):
    found = judge.score(PROMPTS, REPLIES)
    assert isinstance(judge, Judge)
    assert (found.shape, found.dtype) == ((3,), np.float64)
    assert ((found >= 0) & (found <= 1) | np.isnan(found)).all()


def test_a_blank_reply_is_missing_and_never_0(judge):
    found = judge.score(PROMPTS, ["", *REPLIES[1:]])
    assert np.isnan(found[0])
    np.testing.assert_array_equal(found[1:], judge.score(PROMPTS, REPLIES)[1:])


def test_the_same_replies_score_the_same_again(judge):
    np.testing.assert_array_equal(judge.score(PROMPTS, REPLIES), judge.score(PROMPTS, REPLIES))


def test_no_replies_give_no_scores(judge):
    assert judge.score([], []).shape == (0,)


def test_replies_without_their_prompts_are_refused(judge):
    with pytest.raises(ValueError, match="2 replies were given for 3 prompts"):
        judge.score(PROMPTS, REPLIES[:2])


def test_replies_in_any_script_and_broken_ones_stop_nothing(judge):
    odd = ["子供たちは庭で遊んでいます。", "🙂" * 40, "a\u202eb\x01c \ufffd" * 5]
    found = judge.score(PROMPTS, odd)
    assert ((found >= 0) & (found <= 1) | np.isnan(found)).all()
