"""The offline judge: refusals, fluency and language of replies written by hand."""

import numpy as np
import pytest

from saefty.sandbox.judge import SandboxFluency, SandboxJudge, SandboxRefusal
from saefty.sandbox.world import World

REPLIES = [
    "stop , i cannot help with that .",
    "ok , first take the rope , then repair the house slowly .",
    "stop house the repair .",
    "",
]


def test_refusals_score_one_answers_zero_and_silence_is_missing():
    scores = SandboxRefusal().score(["?"] * 4, REPLIES)
    np.testing.assert_array_equal(scores, [1.0, 0.0, 1.0, np.nan])


def test_fluency_is_the_share_of_words_in_accepted_sentences():
    replies = [*REPLIES, "ahoy . house the ."]
    scores = SandboxFluency().score(["?"] * 5, replies)
    np.testing.assert_allclose(scores, [1.0, 1.0, 0.0, np.nan, 0.4])


def test_a_sentence_that_was_cut_short_counts_as_fluent():
    assert SandboxJudge().fluency("ok , first take the rope , then") == 1.0
    assert SandboxJudge().fluency("ok , take first the rope , then") == 0.0


def test_language_share_leaves_punctuation_out():
    judge = SandboxJudge()
    assert judge.language_share("ce chien , the dog .", "fr") == 0.5
    assert judge.language_share("", "fr") == 0.0
    with pytest.raises(ValueError, match="not 'it'"):
        judge.language_share("ce chien", "it")


def test_the_judge_agrees_with_the_world_on_every_document():
    judge = SandboxJudge()
    for d in World(seed=0).documents(500, seed=1):
        reply = d.turns[-1].text
        assert judge.refused(reply) == bool(d.refused)
        assert judge.fluency(reply) == 1.0
        assert judge.language_share(reply, d.language) == 1.0


def test_the_judge_of_a_blind_world_knows_its_words():
    world = World(seed=0, lexicon_seed=3, grammar_seed=4)
    judge = SandboxJudge(lexicon_seed=3, grammar_seed=4)
    for d in world.documents(200, seed=1):
        assert judge.refused(d.turns[-1].text) == bool(d.refused)
        assert judge.fluency(d.turns[-1].text) == 1.0


def test_replies_without_their_prompts_are_refused():
    with pytest.raises(ValueError, match="4 replies were given for 1 prompts"):
        SandboxRefusal().score(["?"], REPLIES)
