"""The length of training vectors: the loss rises by what was asked, measured in another way."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny_models
from linear_model import LinearModel
from saefty.errors import ConfigError, InputError, NumericError
from saefty.records import Example, Site
from saefty.sae_ts.scale import find_scale, residual_norm

SITE = Site(1)
TEXTS = [
    Example("a", "The quick brown fox jumps over the lazy dog", raw=True),
    Example("b", "Mix flour, water, salt and yeast.", raw=True),
]


def units(n=3):
    drawn = torch.randn(n, tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm(dim=1, keepdim=True)


def loss_by_hand(model, vector):
    """Mean loss over both texts, special tokens not steered, by a hook of our own."""
    total, count = 0.0, 0
    for item in model.tokenize(TEXTS):
        acts = torch.from_numpy(~item.special)[None, :, None]

        def patch(module, args, output, acts=acts):
            h = output[0] if isinstance(output, tuple) else output
            return (
                (h + acts * vector, *output[1:]) if isinstance(output, tuple) else h + acts * vector
            )

        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        handle = model.blocks[SITE.layer].register_forward_hook(patch)
        with torch.no_grad():
            logits = model.model(input_ids=ids).logits[0]
        handle.remove()
        losses = cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum")
        total, count = total + float(losses), count + ids.shape[1] - 1
    return total, count


def test_the_loss_rises_by_what_was_asked():
    model = tiny_models.load("llama")
    search = find_scale(model, SITE, units(), TEXTS, rise=0.05)
    assert search.rise == pytest.approx(0.05, rel=0.021)
    pairs = [loss_by_hand(model, search.scale * unit) for unit in units()]
    steered = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    total, count = loss_by_hand(model, torch.zeros(tiny_models.D_MODEL))
    assert search.clean == pytest.approx(total / count, abs=1e-4)
    assert steered - total / count == pytest.approx(search.rise, abs=1e-4)


def test_the_length_is_exact_where_the_rise_is_known():
    """The stand-in's loss is 1 + |x|^2 / 2, so a rise of 2 takes a length of 2."""
    model = LinearModel(torch.eye(4))
    texts = [Example("a", "stub", "w0")]
    search = find_scale(model, Site(0), torch.eye(4), texts, rise=2.0)
    assert search.scale == pytest.approx(2.0, rel=0.02)
    assert search.clean == 1.0


def test_the_residual_norm_leaves_special_tokens_out():
    model = tiny_models.load("llama")
    norms = []
    for item in model.tokenize(TEXTS):
        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        norms += states.double().norm(dim=1)[torch.from_numpy(~item.special)].tolist()
    assert residual_norm(model, SITE, TEXTS) == pytest.approx(np.mean(norms), rel=1e-5)


def test_a_level_out_of_reach_is_told_with_what_was_reached():
    model = tiny_models.load("llama")
    with pytest.raises(ConfigError, match=r"nats at most.*1e\+06 was asked for"):
        find_scale(model, SITE, units(1), TEXTS, rise=1e6)
    with pytest.raises(ConfigError, match="rise by 0"):
        find_scale(model, SITE, units(1), TEXTS, rise=0.0)


def test_a_loss_that_is_not_a_number_is_told_with_the_length_and_not_left_out(monkeypatch):
    model = LinearModel(torch.eye(4))
    texts = [Example("a", "stub", "w0"), Example("b", "stub", "w0")]

    def loss(batch, old=model.loss):
        found = old(batch)
        if found.max() > 1.5:
            found[0] = float("nan")
        return found

    monkeypatch.setattr(model, "loss", loss)
    with pytest.raises(NumericError, match=r"NaN or infinite at alpha = \d"):
        find_scale(model, Site(0), torch.eye(4), texts, rise=2.0)


def test_a_loss_that_jumps_over_the_level_is_told(monkeypatch, caplog):
    model = LinearModel(torch.eye(4))
    monkeypatch.setattr(model, "loss", lambda batch, old=model.loss: 1 + 9.0 * (old(batch) > 3))
    search = find_scale(model, Site(0), torch.eye(4), [Example("a", "stub", "w0")], rise=2.0)
    assert "after 30 lengths the loss rises by" in caplog.text
    assert len(search.tried) == 30


def test_texts_without_two_tokens_are_refused():
    model = LinearModel(torch.eye(4))
    with pytest.raises(InputError, match="none of the 1 texts has two tokens"):
        find_scale(model, Site(0), torch.eye(4), [Example("a", "stub")], rise=1.0)
