"""A saved guard that judges replies, against the guard itself and against its folder's absence."""

import numpy as np
import pytest

import tiny_models
from guard_cases import TEXTS, make_guard
from saefty.errors import ConfigError, SaeftyError
from saefty.guards.scoring import load_guard
from saefty.judges.base import make_judge
from saefty.models.chat import with_response
from saefty.records import Example

REPLIES = ["Write a story about a robot, please.", "", "How do I bake bread, now."]


def judge(folder, **options):
    return make_judge("guard", {"folder": str(folder), **options})


@pytest.mark.parametrize("kind", ["words", "dense", "latents"])
def test_a_reply_scores_the_probability_that_the_guard_gives_it_as_a_text(tmp_path, kind):
    folder = make_guard(tmp_path / "guard", kind)
    found = judge(folder).score(["anything"] * 3, REPLIES)
    expected = load_guard(folder, tiny_models.load("llama")).score([REPLIES[0], REPLIES[2]])
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], expected, rtol=1e-6)
    assert found[0] > found[2]


def test_a_guard_that_learnt_from_responses_reads_the_prompt_too(tmp_path):
    folder = make_guard(tmp_path / "guard", "words", with_response=True)
    prompts = [Example("a", "Write a story about a robot."), "How do I bake bread?"]
    found = judge(folder).score(prompts, ["Yes.", "Yes."])
    asked = [prompts[0], Example("", prompts[1])]
    expected = load_guard(folder).score([with_response(one, "Yes.") for one in asked])
    np.testing.assert_array_equal(found, expected)
    assert found[0] != found[1]


def test_a_guard_tells_what_it_was_fitted_to_tell(tmp_path):
    found = judge(make_guard(tmp_path / "guard", "words")).score([""] * len(TEXTS), TEXTS)
    harmful = np.array(["robot" in text or "dog" in text for text in TEXTS])
    assert found[harmful].min() > found[~harmful].max()


def test_blank_replies_alone_need_no_model(tmp_path):
    folder = make_guard(tmp_path / "guard", "dense")
    assert np.isnan(judge(folder, model="nowhere").score(["p"] * 2, ["", " "])).all()


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_guard_is_refused_when_the_judge_is_made(tmp_path, made):
    folder = tmp_path / "no-guard"
    if made:
        folder.mkdir()
    with pytest.raises(SaeftyError, match="no-guard"):
        judge(folder)


def test_a_guard_without_its_folder_is_told_what_is_missing():
    with pytest.raises(ConfigError, match="missing a required argument: 'folder'"):
        make_judge("guard", {})
