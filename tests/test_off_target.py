"""What else a vector does: KL by hand, latents by SciPy's paired test, attributes by all signs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, ttest_1samp, ttest_rel

import tiny_models
from saefty.errors import InputError, NumericError
from saefty.interventions.steer import steer
from saefty.off_target import attribute_shifts, harmless_cost, latent_map, reply_latents
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig

SITE = Site(1)
D = tiny_models.D_MODEL
TEXTS = [
    Example("a", "The quick brown fox jumps over the lazy dog", raw=True),
    Example("b", "Mix flour, water, salt and yeast.", raw=True),
    Example("c", "x", raw=True),
]


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


def vector():
    return 2.0 * torch.randn(D, generator=torch.Generator().manual_seed(0))


def test_divergence_and_perplexity_are_those_of_patched_passes(model):
    step = vector()
    divergence, nll, tokens = [], np.zeros(2), 0
    for item in model.tokenize(TEXTS):
        acts = torch.from_numpy(~item.special)[None, :, None]

        def patch(module, args, output, acts=acts):
            h = output[0] if isinstance(output, tuple) else output
            h = h + acts * step
            return (h, *output[1:]) if isinstance(output, tuple) else h

        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            p = model.model(input_ids=ids).logits[0].double().log_softmax(-1)
            handle = model.blocks[SITE.layer].register_forward_hook(patch)
            q = model.model(input_ids=ids).logits[0].double().log_softmax(-1)
            handle.remove()
        own = torch.from_numpy(~item.special)
        divergence.append(float((p.exp() * (p - q)).sum(-1)[own].mean()))
        for n, one in enumerate((p, q)):
            nll[n] -= float(one[:-1].gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    found = harmless_cost(model, SITE, steer(step, 1.0), TEXTS, boots=200, seed=0)
    assert found.kl.estimate == pytest.approx(np.mean(divergence), rel=1e-4)
    assert found.plain == pytest.approx(np.exp(nll[0] / tokens), rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(nll[1] / tokens), rel=1e-4)
    assert found.kl.estimate > 0.01


def test_no_steering_costs_nothing(model):
    found = harmless_cost(model, SITE, None, TEXTS, boots=200, seed=0)
    assert (found.kl.estimate, found.kl.low, found.kl.high) == (0.0, 0.0, 0.0)
    assert found.perplexity == found.plain
    zero = harmless_cost(model, SITE, steer(vector(), 0.0), TEXTS, boots=200, seed=0)
    assert zero.kl.estimate == 0.0
    assert np.isfinite(zero.kl.high)


@pytest.mark.parametrize("where", ["decode", "response"])
def test_what_acts_on_replies_alone_is_measured_on_text_taken_for_a_reply(model, where):
    edit = steer(vector(), 1.0, where=where)
    found = harmless_cost(model, SITE, edit, TEXTS, as_reply=True, boots=200, seed=0)
    everywhere = harmless_cost(model, SITE, steer(vector(), 1.0), TEXTS, boots=200, seed=0)
    assert found.kl.estimate > 0.01
    assert found.as_reply
    assert replace(found, as_reply=False) == everywhere


def test_text_that_breaks_is_told_and_not_left_out(model):
    def breaking(x, positions):
        x = x.clone()
        if x.shape[1] > 12:
            x[0] = float("nan")
        return x

    with pytest.raises(NumericError, match=r"under caa at alpha 9 the logits on harmless text"):
        harmless_cost(model, SITE, breaking, TEXTS, name="caa at alpha 9", boots=200, seed=0)


def test_texts_of_one_group_are_drawn_together(model):
    texts = [Example(f"t{n}", TEXTS[n % 2].prompt, group=str(n % 2), raw=True) for n in range(6)]
    found = harmless_cost(model, SITE, steer(vector(), 1.0), texts, boots=200, seed=0)
    assert (found.kl.clusters, found.texts) == (2, 6)


def test_a_large_vocabulary_is_read_in_smaller_batches(model, monkeypatch):
    whole = harmless_cost(model, SITE, steer(vector(), 1.0), TEXTS, boots=200, seed=0)
    monkeypatch.setattr("saefty.off_target.LOGITS_AT_ONCE", 10 * model.info.vocab_size)
    passes = []
    monkeypatch.setattr(model, "logits", lambda b, old=model.logits: passes.append(b) or old(b))
    parts = harmless_cost(model, SITE, steer(vector(), 1.0), TEXTS, boots=200, seed=0)
    assert parts.kl.estimate == pytest.approx(whole.kl.estimate, rel=1e-4)
    assert len(passes) >= 4


def test_texts_without_two_tokens_are_refused(model):
    with pytest.raises(InputError, match="harmless texts"):
        harmless_cost(model, SITE, steer(vector(), 1.0), [], boots=200, seed=0)


def moved_latents():
    rng = np.random.default_rng(0)
    before = rng.random((40, 12)) * (rng.random(12) < 0.8)
    after = before + 0.05 * rng.normal(size=(40, 12)) * (before.sum(axis=0) > 0)
    after[:, 2] += 1.0
    after[:, 5] -= 0.2
    return before, after, np.linspace(1, 2, 12)


def test_the_map_of_latents_is_that_of_paired_tests():
    before, after, lengths = moved_latents()
    found = latent_map(before, after, lengths, targets={2: 1.0}, shown=12)
    fired = np.flatnonzero((before != 0).any(axis=0) | (after != 0).any(axis=0))
    q = false_discovery_control(ttest_rel(after[:, fired], before[:, fired]).pvalue)
    strength = np.abs((after - before).mean(axis=0)) * lengths
    shifts = {one.latent: one for one in found.shifts}
    for place, latent in enumerate(fired):
        assert shifts[latent].q == pytest.approx(q[place], rel=1e-9)
        assert shifts[latent].share == pytest.approx(strength[latent] / strength.sum())
        assert shifts[latent].after == pytest.approx(after[:, latent].mean())
    assert found.fired == len(fired)
    assert found.moved == (q <= 0.05).sum()
    assert found.on_target == pytest.approx(strength[2] / strength.sum())
    assert found.shifts[0].latent == 2
    assert found.shifts[0].target


def test_replies_without_words_are_left_out_of_the_map():
    before, after, lengths = moved_latents()
    gap = before.copy()
    gap[3] = np.nan
    found = latent_map(gap, after, lengths, targets={}, shown=3)
    keep = np.arange(40) != 3
    assert found.shifts[0].after == pytest.approx(after[keep][:, 2].mean())
    assert found.on_target == 0.0


def test_only_what_moved_as_wanted_is_on_target():
    before, after, lengths = moved_latents()
    strength = np.abs((after - before).mean(axis=0)) * lengths
    found = latent_map(before, after, lengths, targets={2: -1.0, 5: -0.5})
    assert found.on_target == pytest.approx(strength[5] / strength.sum())
    assert found.against_target == pytest.approx(strength[2] / strength.sum())


def test_prompts_of_one_cluster_are_one_observation_of_a_latent():
    before, after, lengths = moved_latents()
    clusters = np.repeat(np.arange(10), 4)
    found = latent_map(before, after, lengths, {}, clusters, shown=12)
    means = (after - before).reshape(10, 4, 12).mean(axis=1)
    fired = np.flatnonzero((before != 0).any(axis=0) | (after != 0).any(axis=0))
    q = false_discovery_control(ttest_1samp(means[:, fired], 0.0).pvalue)
    shifts = {one.latent: one for one in found.shifts}
    np.testing.assert_allclose([shifts[k].q for k in fired], q, rtol=1e-9)
    assert found.clusters == 10


def test_latents_that_a_cluster_shares_do_not_move_by_chance():
    """Eight clusters of eight: what differs is the cluster, and steering does nothing."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(8), 8)
    moved = 0
    for _ in range(20):
        before = 5 + rng.normal(size=(64, 200))
        shared = rng.normal(size=(8, 200))[clusters]
        after = before + shared + 0.1 * rng.normal(size=(64, 200))
        moved += latent_map(before, after, np.ones(200), {}, clusters).moved
    assert moved <= 0.01 * 20 * 200


def test_no_change_at_all_is_no_movement():
    before, _, lengths = moved_latents()
    found = latent_map(before, before, lengths, targets={1: 1.0})
    assert (found.moved, found.on_target) == (0, 0.0)


def test_a_change_of_an_attribute_is_tested_by_its_signs():
    before = {"topic": np.array([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])}
    after = {"caa": {"topic": np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])}}
    change = after["caa"]["topic"] - before["topic"]
    sums = [abs((np.array(signs) * change).sum()) for signs in product([1, -1], repeat=8)]
    exact = np.mean(np.array(sums) >= change.sum() - 1e-12)
    found = attribute_shifts(before, after, None, boots=500, permutations=20_000, seed=0)
    one = found["caa"][0]
    assert one.change.estimate == pytest.approx(change.mean())
    assert one.before == pytest.approx(0.25)
    assert one.p_holm == pytest.approx(exact, abs=0.01)


def test_more_attributes_cost_more_doubt():
    rng = np.random.default_rng(0)
    before = {name: rng.random(20) for name in "ab"}
    after = {"caa": {"a": before["a"] + 0.5, "b": rng.random(20)}}
    both = attribute_shifts(before, after, None, boots=200, permutations=500, seed=0)["caa"]
    alone = attribute_shifts(
        before, {"caa": {"a": after["caa"]["a"]}}, None, boots=200, permutations=500, seed=0
    )["caa"]
    assert both[0].p_holm == pytest.approx(2 * alone[0].p_holm)


def test_a_reply_s_latents_are_those_of_its_own_tokens(model):
    sae = SaeConfig(arch="topk", d_in=D, d_sae=48, k=6).build()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(
                0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            )
    prompts = [Example("a", "How do I bake bread?"), Example("b", "Hello?")]
    replies = ["Mix flour and water.", ""]
    found = reply_latents(model, sae, SITE, prompts, replies)
    assert np.isnan(found[1]).all()
    item = model.tokenize([Example("a", prompts[0].prompt, replies[0])])[0]
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    with torch.no_grad():
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
    own = np.flatnonzero((item.roles == 3) & ~item.special)
    expected = sae.encode(states[own]).detach().double().numpy().mean(axis=0)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
