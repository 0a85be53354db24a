"""The sentence follows from the numbers: who wins, what controls do as well, what is not known."""

import dataclasses
import re

import numpy as np
import pytest

from saefty.baselines import Labelled
from saefty.detection.comparison import compare
from saefty.detection.generalisation import LeftOut, SourceAverage
from saefty.detection.inputs import Candidate
from saefty.detection.result import Detection
from saefty.detection.sentence import honest_sentence, not_told_apart
from saefty.metrics.intervals import Interval
from saefty.metrics.leaks import LeakWarning
from saefty.metrics.splits import split_clusters
from saefty.probes import ProbeTask, standardise

N, WIDTH = 200, 8


def found(latents=0.0, dense=0.0, random=0.0, words=0.0, few=0.0, **fields):
    """Compare detectors whose input tells harm by so much."""
    harmful = np.arange(N) % 2 == 0
    train, test = split_clusters(harmful, shares=(0.5, 0.5))
    task = ProbeTask(harmful, train, test, boots=100)
    gains = {
        "SAE latents": latents, "dense activations": dense, "random SAE": random,
        "bag of words": words, "5 latents": few,
    }  # fmt: skip
    candidates = []
    for i, (family, gain) in enumerate(gains.items()):
        if gain is None:
            continue
        x = np.random.default_rng(i).normal(size=(N, WIDTH))
        x[:, :3] += gain * harmful[:, None]
        k = 5 if family == "5 latents" else None
        candidates.append(Candidate(family, x, standardise, 1, "max", k))
    comparison = compare(candidates, task, "all", permutations=400)
    data = Labelled(np.arange(N), ("",) * N, harmful, None, None, N)
    given = {
        "data": data, "ids": [], "categories": [], "sources": ["a"], "task": task,
        "comparisons": (comparison,), "left_out": None, "rest": (), "rest_left_out": (),
        "leaks": (), "d_sae": {1: WIDTH},
    }  # fmt: skip
    return Detection(**{**given, **fields})


def with_upper_end(given, high):
    """Let the latents be at most so much better than the random SAE."""
    changed = []
    for pair in given.all.pairs:
        if {pair.first, pair.second} == {"SAE latents", "random SAE"}:
            difference = Interval(0.0, -high, high, "by hand", 40)
            pair = dataclasses.replace(pair, difference=difference)
        changed.append(pair)
    comparison = dataclasses.replace(given.all, pairs=tuple(changed))
    return dataclasses.replace(given, comparisons=(comparison,))


@pytest.fixture(scope="module")
def latents_win():
    return found(latents=1.2)


def test_latents_that_are_better_beat_the_dense_probe(latents_win):
    text = honest_sentence(latents_win)
    assert text.startswith("**SAE latents beat the dense probe**")
    assert "Clearly worse: a random SAE" in text
    assert "says nothing" not in text
    pair = latents_win.all.pair("SAE latents", "dense activations")
    assert f"difference {pair.difference.estimate:+.3f}" in text


def test_what_is_worse_beyond_luck_is_not_among_those_not_told_apart(latents_win):
    assert latents_win.all.main[0].family == "SAE latents"
    assert not_told_apart(latents_win.all) == []


def test_a_dense_probe_that_is_better_is_said_to_be():
    assert honest_sentence(found(dense=1.2)).startswith("**The dense probe beats the SAE latents**")


def test_a_random_sae_that_does_as_well_takes_the_meaning_from_the_comparison():
    given = found(latents=1.0, dense=1.0, random=1.0)
    text = honest_sentence(with_upper_end(given, 0.015))
    assert text.startswith("**SAE latents and the dense probe are not told apart**")
    assert "a random SAE of the same width and L0 is not told apart from them" in text
    assert "says nothing about what the SAE has learnt" in text
    # A wide interval does not say that it is as good.
    text = honest_sentence(with_upper_end(given, 0.1))
    assert "says nothing" not in text
    assert "does not show that the SAE has learnt it" in text


def test_without_groups_it_does_not_speak_of_them(latents_win):
    text = honest_sentence(latents_win)
    assert "on held-out examples; variants of a prompt may be on both sides" in text
    grouped = dataclasses.replace(latents_win.data, clusters=np.arange(N) // 2)
    text = honest_sentence(dataclasses.replace(latents_win, data=grouped))
    assert "on held-out prompt groups" in text
    assert "both sides" not in text


def test_it_has_five_sentences_at_most_and_the_first_is_bold(latents_win):
    some = Interval(0.8, 0.7, 0.9, "bootstrap", 40)
    loss = Interval(-0.07, -0.2, 0.05, "bootstrap", 40)
    averages = tuple(
        SourceAverage(name, 1, some, some, loss) for name in ("SAE latents", "dense activations")
    )
    text = honest_sentence(
        dataclasses.replace(
            latents_win,
            comparisons=(latents_win.all, latents_win.all),
            sources=["a", "b"],
            left_out=LeftOut((), averages, ()),
            leaks=(LeakWarning("near_duplicates", "much alike"),),
        )
    )
    assert text.startswith("**")
    assert len([part for part in re.split(r"\.(?: |$)", text) if part]) == 5
    assert "mean of 1" not in text


def test_words_that_do_even_better_are_said_to():
    text = honest_sentence(found(latents=0.3, dense=0.3, words=2.0))
    assert "the words do even better" in text


def test_few_latents_that_lag_behind_do_not_suffice(latents_win):
    assert "5 latents do not suffice" in honest_sentence(latents_win)
    assert "5 latents of 8 suffice to be not told apart" in honest_sentence(
        found(latents=1.0, few=1.0)
    )


def test_without_activations_it_says_that_the_dense_probe_is_missing():
    text = honest_sentence(found(latents=1.0, dense=None, random=None))
    assert "not compared with a dense probe" in text


def test_one_source_leaves_open_what_another_one_costs(latents_win):
    given = dataclasses.replace(latents_win, left_out=LeftOut())
    assert "All examples come from one source" in honest_sentence(given)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((0.1, 0.05, 0.2), "instead of 0.900 (lower by 0.100 [0.050, 0.200])"),
        ((0.02, -0.05, 0.1), "(lower by 0.020 [−0.050, 0.100], which may be luck)"),
        ((-0.1, -0.2, -0.05), "(higher by 0.100 [0.050, 0.200])"),
        ((-0.07, -0.2, 0.05), "(higher by 0.070 [−0.050, 0.200], which may be luck)"),
    ],
)
def test_the_loss_on_sources_left_out_is_as_sure_as_its_interval(latents_win, ends, words):
    loss = Interval(*ends, "bootstrap", 40)
    area, within = (Interval(x, x - 0.05, x + 0.05, "bootstrap", 40) for x in (0.8, 0.9))
    average = SourceAverage("SAE latents", 2, area, within, loss)
    given = dataclasses.replace(
        latents_win, sources=["a", "b"], left_out=LeftOut((), (average,), ())
    )
    assert words in honest_sentence(given)


def test_a_loss_without_an_interval_is_not_said_to_be_one(latents_win):
    nan = float("nan")
    some, loss = Interval(0.8, 0.7, 0.9, "", 4), Interval(0.0, nan, nan, "too few clusters", 1)
    average = SourceAverage("SAE latents", 1, some, some, loss)
    text = honest_sentence(
        dataclasses.replace(latents_win, sources=["a", "b"], left_out=LeftOut((), (average,), ()))
    )
    assert "what SAE latents lose cannot be said: there are too few prompt groups" in text
    assert "nan" not in text
    assert "instead of" not in text


def test_shortcuts_are_named(latents_win):
    leak = LeakWarning("near_duplicates", "much alike")
    text = honest_sentence(dataclasses.replace(latents_win, leaks=(leak,)))
    assert "can be told by shortcuts** (near duplicates)" in text
