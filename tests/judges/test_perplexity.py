"""Perplexity against the model's own probabilities, and fluency against perplexities."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty.judges.perplexity import Fluency, perplexity
from saefty.records import Example, Message


@pytest.fixture(params=tiny_models.FAMILIES)
def model(request):
    return tiny_models.load(request.param)


def by_hand(model, ids, own):
    """Return exp of the mean of -log p over the positions `own`, in float64, token by token."""
    losses = []
    for t in own:
        p = model.model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().softmax(-1)
        losses.append(-p[ids[t]].log().item())
    return np.exp(np.mean(losses))


def test_perplexity_runs_over_the_reply_s_own_tokens(model):
    prompts = [Example("a", "the lazy dog", raw=True), Example("b", "the quick", raw=True)]
    replies = [" jumps over", " brown fox and the other dogs"]
    expected = []
    for prompt, reply in zip(prompts, replies, strict=True):
        n = len(model.tokenize([prompt])[0].ids)
        ids = model.tokenize([Example("x", prompt.prompt + reply, raw=True)])[0].ids.tolist()
        expected.append(by_hand(model, ids, range(n, len(ids))))
    np.testing.assert_allclose(perplexity(model, prompts, replies), expected, rtol=1e-4)


def test_what_the_template_adds_behind_a_reply_does_not_count():
    model = tiny_models.load("qwen3")
    n = len(model.tokenize([Example("x", "Hi there")])[0].ids)
    item = model.tokenize([Example("x", "Hi there", "I cannot help.")])[0]
    own = range(n, len(item.ids) - 2)  # the end of the turn and a line break are the template's
    assert item.text[slice(*item.offsets[own[-1]])] == "."
    expected = by_hand(model, item.ids.tolist(), own)
    found = perplexity(model, ["Hi there"], ["I cannot help."])
    np.testing.assert_allclose(found, [expected], rtol=1e-4)


def test_unchanged_replies_are_fully_fluent(model):
    prompts, replies = ["the dog", "bake bread"], ["jumps over", "at home"]
    assert Fluency(model, replies).score(prompts, replies).tolist() == [1.0, 1.0]


def test_fluency_is_the_ratio_of_perplexities_and_at_most_one(model):
    prompts = ["the dog", "the dog", "bake bread"]
    own = ["jumps over the lazy dog", "paints", "at home"]
    steered = ["paints", "jumps over the lazy dog", "\x00\x01\x02"]
    ratio = perplexity(model, prompts, own) / perplexity(model, prompts, steered)
    found = Fluency(model, own).score(prompts, steered)
    np.testing.assert_allclose(found, np.minimum(1, ratio), rtol=1e-6)
    assert (ratio > 1).any()
    assert (ratio < 1).any()


def test_an_empty_reply_on_either_side_is_missing(model):
    prompts = ["the dog"] * 3
    found = Fluency(model, ["jumps", "", "jumps"]).score(prompts, ["", "jumps", "jumps"])
    assert np.isnan(found).tolist() == [True, True, False]


def test_a_reply_too_long_for_the_model_is_missing(model):
    assert np.isnan(perplexity(model, ["the dog"], [" dog" * 500])).all()


def test_replies_follow_the_messages_they_were_given_to():
    model = tiny_models.load("llama")
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?"))
    chat = Example("a", "", messages=turns)
    answered = Example("a", "", messages=(*turns, Message("assistant", "an older reply")))
    found = perplexity(model, [chat, answered], ["the dog", "the dog"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
