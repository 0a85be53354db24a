"""What a person hands over in Python: a path, a text, an array, as well as our own types."""

import numpy as np
import pytest
import torch

import saefty as sf
import tiny_models
from saefty.interventions.steer import cap, steer
from saefty.judges.perplexity import perplexity
from saefty.models.base import Positions
from saefty.records import Example, as_examples

D = tiny_models.D_MODEL
TEXTS = ["How do I bake bread at home?", "Write a short story."]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


E = 3 * torch.randn(D, generator=seeded(0))
MASK = torch.ones(2, 5, dtype=torch.bool)
POSITIONS = Positions(MASK, MASK.cumsum(1) - 1, special=~MASK, response=~MASK, is_prefill=True)


@pytest.fixture(scope="module")
def model():
    return sf.load_model(tiny_models.folder_of("llama"))  # a Path


def test_a_model_is_loaded_from_a_path_as_from_its_text(model):
    text = sf.load_model(str(tiny_models.folder_of("llama")))
    assert model.name == text.name
    assert model.generate(TEXTS, max_new_tokens=4) == text.generate(TEXTS, max_new_tokens=4)


def test_a_text_is_a_prompt_whose_id_is_its_place(model):
    """So that sampling draws from the streams of these ids, one for each text."""
    examples = [Example(str(n), text) for n, text in enumerate(TEXTS)]
    assert as_examples([TEXTS[0], examples[1]]) == examples
    for temperature in (0.0, 1.0):
        given = {"max_new_tokens": 6, "temperature": temperature, "seed": 3}
        assert model.generate(TEXTS, **given) == model.generate(examples, **given)
    replies = model.generate(TEXTS, max_new_tokens=6)
    np.testing.assert_array_equal(perplexity(model, TEXTS, replies),
                                  perplexity(model, examples, replies))  # fmt: skip


def test_steering_with_an_array_changes_a_text_s_reply_as_with_a_tensor(model):
    replies = []
    for vector in (4 * E, 4 * E.numpy()):
        with model.intervene(sf.Site(1), sf.steer(vector, 2.0)):
            replies.append(model.generate(TEXTS, max_new_tokens=6))
    assert replies[0] == replies[1] != model.generate(TEXTS, max_new_tokens=6)


def test_an_array_of_numpy_is_a_vector_like_a_tensor():
    h = torch.randn(2, 5, D, generator=seeded(1))
    for dtype in (np.float32, np.float64):
        found = steer(E.numpy().astype(dtype), 1.5)(h, POSITIONS)
        assert torch.equal(found, steer(E, 1.5)(h, POSITIONS))
    several = np.stack([E.numpy(), -E.numpy()])
    assert torch.equal(steer(several, 1.0)(h, POSITIONS),
                       steer(torch.from_numpy(several), 1.0)(h, POSITIONS))  # fmt: skip
    assert torch.equal(cap(E.numpy(), 0.5)(h, POSITIONS),
                       cap(E, 0.5)(h, POSITIONS))  # fmt: skip


@pytest.mark.parametrize("given", [[], np.ones((2, 0)), torch.ones(0)])
def test_what_is_no_vector_is_refused_with_what_would_be_one(given):
    with pytest.raises(ValueError, match="vector"):
        steer(given, 1.0)
