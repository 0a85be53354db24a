"""Effects of vectors where they are known, and in real forward passes of a tiny model."""

import numpy as np
import pytest
import torch

import tiny_models
from linear_model import PROMPTS, LinearModel, linear_sae
from saefty.records import Example, Site
from saefty.sae_ts.rollouts import measure, plan_rollouts
from saefty.saes.base import SaeConfig

SITE = Site(1)
D = tiny_models.D_MODEL
STARTS = [
    Example("a", "the lazy dog", raw=True),
    Example("b", "How do I bake bread at home?"),
    Example("c", "Write a short story about a robot", raw=True),
]


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="module")
def sae():
    made = SaeConfig(arch="topk", d_in=D, d_sae=48, k=6).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    made.site = SITE
    return made


def vectors(n, scale=4.0):
    return scale * torch.randn(n, D, generator=torch.Generator().manual_seed(2))


def by_hand(model, sae, vector, rollouts):
    """Mean latents under one vector: the block's output patched by a hook of our own, no cache."""
    network, block = model.model, model.blocks[SITE.layer]
    total, count = np.zeros(sae.d_sae), 0
    for row in rollouts.rows:
        item = model.tokenize([row])[0]
        given = len(item.ids)
        steers = torch.from_numpy(~item.special)

        def patch(module, args, output, steers=steers):
            h = output[0] if isinstance(output, tuple) else output
            n = h.shape[1]
            acts = torch.cat([steers, torch.ones(n - len(steers), dtype=torch.bool)])
            h = h + acts[None, :, None] * vector
            return (h, *output[1:]) if isinstance(output, tuple) else h

        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            handle = block.register_forward_hook(patch)
            for _ in range(rollouts.max_new_tokens):
                chosen = network(input_ids=ids).logits[:, -1].argmax(dim=-1, keepdim=True)
                ids = torch.cat([ids, chosen], dim=1)
            handle.remove()
            text = model.tokenizer.decode(ids[0, given:], skip_special_tokens=True)
            read = model.tokenize([Example("r", row.prompt, text, raw=row.raw)])[0]
            states = network(
                input_ids=torch.from_numpy(read.ids.astype(np.int64))[None],
                output_hidden_states=True,
            ).hidden_states[SITE.layer + 1][0]
            own = [t for t, role in enumerate(read.roles) if role == 3 and not read.special[t]]
            z = sae.encode(states[own]).double().numpy()
        total += z.sum(axis=0)
        count += len(own)
    return total / count, count


def test_a_batch_of_vectors_has_each_one_s_own_effect_as_patched_by_hand(model, sae):
    rollouts = plan_rollouts(STARTS, 3, max_new_tokens=4, temperature=0.0)
    steps = vectors(3)
    found = measure(model, sae, SITE, steps, rollouts)
    for n, step in enumerate(steps):
        means, count = by_hand(model, sae, step, rollouts)
        assert found.tokens[n] == count
        np.testing.assert_allclose(found.means[n], means, atol=1e-4)
    assert np.abs(found.means[0] - found.means[1]).max() > 0.01, "the vectors differ in effect"


def test_a_vector_of_zeros_does_nothing_at_all(model, sae):
    rollouts = plan_rollouts(STARTS, 6, max_new_tokens=5, seed=3)
    plain = measure(model, sae, SITE, None, rollouts)
    found = measure(model, sae, SITE, torch.zeros(2, D), rollouts)
    for row in found.means:
        np.testing.assert_allclose(row, plain.means[0], atol=1e-6)


def test_rollouts_take_prompts_in_turn_and_draw_apart(model):
    rollouts = plan_rollouts(STARTS, 7, max_new_tokens=4)
    assert [row.prompt for row in rollouts.rows[:4]] == [
        STARTS[0].prompt, STARTS[1].prompt, STARTS[2].prompt, STARTS[0].prompt
    ]  # fmt: skip
    assert len({row.id for row in rollouts.rows}) == 7
    with pytest.raises(ValueError, match="at least one prompt"):
        plan_rollouts([], 2, max_new_tokens=4)


def test_the_effects_of_a_linear_world_are_exact():
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(6, 6, generator=generator)
    weights = torch.randn(6, 10, generator=generator)
    model, sae = LinearModel(turn), linear_sae(weights)
    rollouts = plan_rollouts(PROMPTS, 4, max_new_tokens=3)
    steps = torch.randn(5, 6, generator=generator)
    plain = measure(model, sae, Site(0), None, rollouts)
    found = measure(model, sae, Site(0), steps, rollouts)
    expected = (steps @ turn @ weights).double().numpy()
    np.testing.assert_allclose(found.means - plain.means, expected, atol=1e-4)
    assert (found.tokens == 4 * 3).all()
