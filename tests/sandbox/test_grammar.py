"""The acceptor takes what the world writes and nothing that is out of order."""

import numpy as np
import pytest

from saefty.sandbox.lexicon import LANGUAGES
from saefty.sandbox.world import World


@pytest.mark.parametrize("seeds", [{}, {"lexicon_seed": 3, "grammar_seed": 4}])
def test_every_document_is_accepted(seeds):
    world = World(seed=0, **seeds)
    refused = [d.text for d in world.documents(1000, seed=1) if not world.grammar.accepts(d.text)]
    assert refused == []


def test_shuffled_words_are_rejected():
    world, rng = World(seed=0), np.random.default_rng(0)
    texts = [d.text.split() for d in world.documents(300, seed=1)]
    accepted = [world.grammar.accepts(" ".join(rng.permutation(words))) for words in texts]
    assert np.mean(accepted) < 0.02


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the the the .",
        "how can i repair the house",  # not finished
        "how can i repair house ?",
        "wie kann ich reparieren das haus ?",
        "wie kann ich den haus reparieren ?",  # wrong gender
        "how can i reparieren das haus ?",  # two languages
        "how can i repair the house ? stop , je ne peux aider ici .",
    ],
)
def test_what_is_no_sentence_is_rejected(text):
    assert not World(seed=0).grammar.accepts(text)


def test_subject_and_object_take_their_own_determiner():
    grammar = World(seed=0).grammar
    assert grammar.accepts("der hund war berühmt .")
    assert not grammar.accepts("den hund war berühmt .")
    assert grammar.accepts("darf ich den brunnen reparieren ?")
    assert not grammar.accepts("darf ich der brunnen reparieren ?")


def test_fit_counts_words_of_accepted_and_of_open_sentences():
    fit = World(seed=0).grammar.fit("farewell . stop the . ok , first take", "en")
    assert (fit.words, fit.accepted, fit.open) == (9, 2, 4)


def test_refusals_begin_with_one_word_in_all_languages():
    grammar = World(seed=0).grammar
    assert {frozenset(grammar.openers(language, "refusal")) for language in LANGUAGES} == {
        frozenset({"stop"})
    }
