"""The world: what it writes is determined, labelled by XOR, and free of the pairs it holds out."""

import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from saefty.sandbox.lexicon import LANGUAGES
from saefty.sandbox.world import World


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


@pytest.fixture(scope="module")
def documents(world):
    return world.documents(3000, seed=1)


def test_the_same_seeds_give_the_same_documents_in_another_process(world):
    code = (
        "from saefty.sandbox.world import World\n"
        "print([d.text for d in World(seed=0).documents(20, seed=1)], end='')"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert there.stdout.decode() == str([d.text for d in world.documents(20, seed=1)])


def test_another_seed_gives_other_documents(world):
    assert world.documents(20, seed=1) != world.documents(20, seed=2)


def test_writing_leaves_the_global_generator_alone(world):
    before = np.random.get_state()[1].copy()
    world.documents(50, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("seeds", [{}, {"lexicon_seed": 3, "grammar_seed": 4}])
def test_no_word_belongs_to_two_languages(seeds):
    grammar = World(seed=0, **seeds).grammar
    for one, other in combinations(LANGUAGES, 2):
        assert not grammar.vocabulary(one) & grammar.vocabulary(other)


def test_no_word_of_a_blind_world_is_a_real_one(world):
    blind = World(seed=0, lexicon_seed=3)
    for language in LANGUAGES:
        assert not world.grammar.vocabulary(language) & blind.grammar.vocabulary(language)


def test_harm_is_exclusive_or_of_the_classes(documents):
    labelled = [d for d in documents if d.harmful is not None]
    assert len(labelled) > 500
    for d in labelled:
        assert d.harmful == (d.verb_class != d.object_class)
        assert d.refused == d.harmful


def test_a_grammar_seed_may_pair_the_classes_the_other_way():
    pairings = {World(seed=0, grammar_seed=s).harmful(0, 0) for s in range(8)}
    assert pairings == {True, False}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_word_of_balanced_requests_is_harmful_as_often_as_not(world, split):
    harmful, harmless = Counter(), Counter()
    for d in world.requests(256, seed=5, split=split):
        (harmful if d.harmful else harmless).update(d.turns[0].text.split())
    assert harmful == harmless


def test_balanced_requests_differ_from_each_other(world):
    requests = world.requests(512, seed=5, split="held_out")
    assert len({d.turns[0].text for d in requests}) == 512


def test_a_balanced_number_that_is_no_multiple_of_four_is_refused(world):
    with pytest.raises(ValueError, match="come in fours, but 10"):
        world.requests(10, seed=5)


def test_held_out_pairs_stand_in_no_training_document(world, documents):
    held_out = {d.pair for d in world.requests(640, seed=5, split="held_out")}
    assert len(held_out) == 160  # a quarter of 20 verbs x 32 objects
    assert not held_out & {d.pair for d in documents}
    assert not held_out & {d.pair for d in world.requests(1000, seed=5, split="train")}


def test_another_world_holds_out_other_pairs(world):
    def pairs(seed):
        return {d.pair for d in World(seed=seed).requests(640, seed=5, split="held_out")}

    assert pairs(0) != pairs(1)


def test_borderline_requests_are_refused_half_the_time_and_have_no_label(world):
    requests = world.borderline_requests(400, seed=5)
    assert {d.harmful for d in requests} == {None}
    assert 0.42 < np.mean([d.refused for d in requests]) < 0.58


def test_sycophancy_agrees_with_a_claim_that_is_wrong(documents):
    claims = [d for d in documents if d.kind == "claim"]
    given_in = [d for d in claims if d.sycophantic]
    assert given_in and all(d.claim_wrong for d in given_in)
    agreeing = {"right", "exact", "richtig", "cierto"}
    for d in claims:
        agrees = d.turns[1].words[0].text in agreeing
        assert agrees == (not d.claim_wrong or d.sycophantic)


def test_character_offsets_give_back_each_word(documents):
    for d in documents[:500]:
        assert [d.text[t.start : t.end] for t in d.tokens] == [t.word for t in d.tokens]


def test_words_know_language_number_and_role(documents):
    d = next(d for d in documents if d.kind == "request" and d.language == "de" and not d.refused)
    assert {t.language for t in d.tokens} == {"de", ""}
    assert {t.role for t in d.tokens if not d.persona} <= {"user", "assistant"}
    numbers = {t.word for d in documents for t in d.tokens if t.is_number and t.language == "de"}
    assert numbers == {"zwei", "drei", "vier", "fünf", "sieben", "acht", "neun", "zehn"}


def test_a_request_becomes_an_example_with_label_and_pair(world):
    d = world.requests(4, seed=5, split="held_out")[1]
    with_answer, alone = d.example(), d.example(response=False)
    assert (alone.prompt, alone.response, alone.label) == (d.turns[0].text, None, d.harmful)
    assert (with_answer.response, with_answer.group) == (d.turns[1].text, d.pair)


def test_a_persona_travels_as_a_system_message(documents):
    d = next(d for d in documents if d.persona)
    assert [m.role for m in d.example().messages] == ["system", "user", "assistant"]
    assert [m.role for m in d.example(response=False).messages] == ["system", "user"]
