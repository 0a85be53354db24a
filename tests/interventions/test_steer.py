"""Adding vectors, against float64 NumPy and a forward pass patched by hand with plain hooks."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty.errors import ConfigError, MismatchError, NumericError
from saefty.interventions.base import in_order, intervening
from saefty.interventions.steer import cap, project_out, steer
from saefty.interventions.vectors import SteeringVector
from saefty.models.base import Positions
from saefty.records import Example, Site

SITE, WIDTH = Site(1), tiny_models.D_MODEL
PROMPTS = [
    Example("a", "How do I bake bread at home?"),
    Example("b", "the lazy dog", raw=True),
    Example("c", "Write a short story about a small robot"),
]
PLACES = ["both", "prefill", "decode", "response", "last", (2, 3, 9)]


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


E = 3 * rows(WIDTH, seed=0)
MANY = rows(24, WIDTH, seed=5)
"""So many directions that a reply without them is another one."""
OFTEN = [
    *("llama", "gemma2"),
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in tiny_models.FAMILIES
        if family not in {"llama", "gemma2"}
    ),
]


def all_tokens(batch, seq, **changes):
    mask = torch.ones(batch, seq, dtype=torch.bool)
    fields = {"special": ~mask, "response": ~mask, "is_prefill": True}
    return Positions(mask, mask.cumsum(1) - 1, **{**fields, **changes})


def by_hand(h, alpha, e, method):
    """The two formulas, in float64 NumPy."""
    h, e = np.asarray(h, dtype=np.float64), np.asarray(e, dtype=np.float64)
    moved = h + alpha * e
    if method == 1:
        return moved
    norm = np.sqrt((h**2).sum(-1, keepdims=True))
    return norm * moved / np.sqrt((moved**2).sum(-1, keepdims=True))


@pytest.mark.parametrize("method", [1, 2])
@pytest.mark.parametrize("alpha", [-7.5, 0.3, 40.0])
def test_both_methods_are_their_formula(method, alpha):
    h = rows(2, 5, WIDTH)
    found = steer(E, alpha, method=method)(h, all_tokens(2, 5))
    np.testing.assert_allclose(found, by_hand(h, alpha, E, method), rtol=1e-5, atol=1e-5)


def test_method_2_keeps_the_norm_and_turns_the_direction():
    h = rows(1, 6, WIDTH)
    found = steer(E, 2.0, method=2)(h, all_tokens(1, 6))
    torch.testing.assert_close(found.norm(dim=-1), h.norm(dim=-1))
    nearer = torch.cosine_similarity(found, E, dim=-1) > torch.cosine_similarity(h, E, dim=-1)
    assert nearer.all()


@pytest.mark.parametrize("method", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_alpha_of_0_changes_no_bit(method, dtype):
    h = rows(2, 5, WIDTH).to(dtype)
    h[0, 0, 0] = -0.0
    for alpha in (0.0, [0.0, 3.0]):
        found = steer(E, alpha, method=method)(h, all_tokens(2, 5))
        assert torch.equal(found[0].view(torch.uint8), h[0].view(torch.uint8))


def test_each_example_has_its_own_vector_and_alpha():
    h, vectors, alphas = rows(3, 4, WIDTH), rows(3, WIDTH, seed=2), [1.0, -2.0, 5.0]
    order = torch.tensor([2, 0, 1])  # as `generate` sorts examples by length
    found = steer(vectors, alphas, method=2)(h, all_tokens(3, 4, rows=order))
    for row, example in enumerate(order.tolist()):
        expected = by_hand(h[row], alphas[example], vectors[example], 2)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


def test_one_vector_goes_with_many_alphas_and_many_vectors_with_one_alpha():
    h = rows(2, 4, WIDTH)
    two = torch.stack([E, -E])
    one = steer(E, [2.0, -2.0])(h, all_tokens(2, 4))
    assert torch.equal(one, steer(two, 2.0)(h, all_tokens(2, 4)))


def test_more_examples_than_alphas_are_refused():
    with pytest.raises(ValueError, match="2 vectors or alphas were given.* at least 3 examples"):
        steer(E, [1.0, 2.0])(rows(3, 4, WIDTH), all_tokens(3, 4))


UNITS = {"residual": 11.0, "latent": 0.5}


@pytest.mark.parametrize(("unit", "length"), [("activation", None), *UNITS.items()])
def test_an_alpha_of_1_is_as_long_as_its_unit_says(unit, length):
    vector = SteeringVector(E, SITE, "test", UNITS)
    h = rows(1, 3, WIDTH)
    step = steer(vector, 1.0, unit=unit)(h, all_tokens(1, 3)) - h
    expected = E if length is None else E / np.linalg.norm(E) * length
    torch.testing.assert_close(step, expected.expand(1, 3, -1), rtol=1e-4, atol=1e-5)


def test_a_unit_that_was_not_measured_is_refused_with_those_that_were():
    vector = SteeringVector(E, SITE, "decoder", {"latent": 2.0})
    with pytest.raises(ConfigError, match="decoder vector says nothing of the mean norm") as error:
        steer(vector, 1.0, unit="residual")
    assert "activation, latent" in error.value.then


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": 3}, "method is 1"),
        ({"alpha": float("nan")}, "alpha is a finite number"),
        ({"alpha": []}, "alpha is a finite number"),
        ({"where": (-1,)}, "counted from 0"),
        ({"where": ()}, "counted from 0"),
        ({"alpha": float("inf")}, "alpha is a finite number"),
        ({"vector": torch.stack([E, E]), "alpha": [1.0, 2.0, 3.0]}, "3 alphas .* for 2 vectors"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, words):
    given = {"vector": E, "alpha": 1.0, **changes}
    with pytest.raises(Exception, match=f"{words}|Type-check error"):
        steer(**given)


def test_a_vector_of_another_width_is_refused_with_both_widths():
    for edit in (steer(E[:7], 1.0), project_out(E[:7]), cap(E[:7], 1.0)):
        with pytest.raises(MismatchError, match="vector is 7 wide, but the activations are 32"):
            edit(rows(1, 3, WIDTH), all_tokens(1, 3))


def test_projecting_out_leaves_nothing_along_any_of_the_directions():
    directions = torch.stack([E, rows(WIDTH, seed=4), 2 * E])  # of rank 2
    h = rows(2, 5, WIDTH)
    found = project_out(directions)(h, all_tokens(2, 5)).double().numpy()
    pair = directions[:2].double().numpy()
    expected = h.double().numpy()
    expected = expected - expected @ np.linalg.pinv(pair) @ pair
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found @ pair.T).max() < 1e-4


def test_a_direction_beside_one_that_is_far_longer_is_taken_out_too():
    directions = torch.stack([1e7 * E, rows(WIDTH, seed=4)])
    found = project_out(directions)(rows(2, 5, WIDTH), all_tokens(2, 5)).double()
    assert (found @ (directions[1] / directions[1].norm()).double()).abs().max() < 1e-5


def test_a_cap_holds_rows_at_the_maximum_and_leaves_those_below():
    h = rows(1, 40, WIDTH)
    e = (E / E.norm()).double().numpy()
    along = h[0].double().numpy() @ e
    found = cap(E, 0.5)(h, all_tokens(1, 40))[0].double().numpy()
    below = along <= 0.5
    assert below.any()
    assert not below.all()
    np.testing.assert_allclose(found @ e, np.minimum(along, 0.5), atol=1e-5)
    assert np.array_equal(found[below], h[0].double().numpy()[below])
    rest = h[0].double().numpy() - np.outer(along, e)
    np.testing.assert_allclose(found - np.outer(found @ e, e), rest, atol=1e-5)


def test_edits_in_order_are_nested_contexts_the_first_one_outermost():
    model = tiny_models.load("llama")
    batch = model.collate(model.tokenize(PROMPTS))
    first, second = project_out(E), steer(E, 2.0, method=2)
    with model.intervene(SITE, in_order(first, second)):
        together = model.capture(batch, [SITE])[SITE]
    with model.intervene(SITE, first), model.intervene(SITE, second):
        nested = model.capture(batch, [SITE])[SITE]
    assert torch.equal(together, nested)
    with model.intervene(SITE, in_order(second, first)):
        assert not torch.allclose(model.capture(batch, [SITE])[SITE], together)


def test_several_layers_are_edited_at_once():
    model = tiny_models.load("llama")
    batch = model.collate(model.tokenize(PROMPTS))
    edits = [(Site(0), steer(E, 1.0)), (Site(2), steer(E, -2.0))]
    with model.intervene(Site(0), edits[0][1]):
        before = model.capture(batch, [Site(0), Site(2)])
    with intervening(model, edits):
        after = model.capture(batch, [Site(0), Site(2)])
    assert torch.equal(after[Site(0)], before[Site(0)])
    acts = batch.mask & ~batch.special
    torch.testing.assert_close(after[Site(2)][acts], before[Site(2)][acts] - 2 * E)


def patched(model, ids, acts, alpha, method):
    """Logits of one text, from a forward pass with a plain hook and the formula written out."""

    def hook(_, __, output):
        h = output if isinstance(output, torch.Tensor) else output[0]
        new = h.clone()
        for place in np.flatnonzero(acts):
            row = h[0, place] + alpha * E
            if method == 2:
                row = row * torch.sqrt((h[0, place] ** 2).sum() / (row**2).sum())
            new[0, place] = row
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = model.blocks[1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()


def acted_on(where, ids, given, special):
    """The places acted on, from the words alone."""
    place = np.arange(len(ids))
    plain = ~np.isin(ids, special)
    told = {
        "both": place >= 0,
        "prefill": place < given,
        "decode": place >= given,
        "response": place >= given,
    }
    if where == "last":
        last = np.flatnonzero(plain & (place < given))[-1]
        return place == last
    return plain & (np.isin(place, where) if isinstance(where, tuple) else told[where])


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("method", [1, 2])
@pytest.mark.parametrize("family", OFTEN)
def test_a_reply_is_that_of_a_forward_pass_patched_by_hand(family, method, where):
    """Token by token without a cache, the hook written out; the reply was made with one."""
    model = tiny_models.load(family)
    item = model.tokenize(PROMPTS[:1])[0]
    special, ids = model.text.special_ids, item.ids.tolist()
    with model.intervene(SITE, steer(E, 1.5, method=method, where=where)):
        reply = model.generate(PROMPTS[:1], max_new_tokens=6)[0]
    for _ in range(6):
        acts = acted_on(where, ids, len(item.ids), special)
        token = int(patched(model, ids, acts, 1.5, method)[-1].argmax())
        if token in model._stop_ids():
            break
        ids.append(token)
    assert reply == model.text.decode_reply(item, ids[len(item.ids) :])


@pytest.mark.parametrize("method", [1, 2])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_steered_logits_are_those_of_a_forward_pass_patched_by_hand(family, method):
    model = tiny_models.load(family)
    batch = model.collate(model.tokenize(PROMPTS))
    with model.intervene(SITE, steer(E, -2.0, method=method)):
        found = model.logits(batch)
    for row, item in enumerate(batch.items):
        acts = acted_on("both", item.ids, len(item.ids), model.text.special_ids)
        expected = patched(model, item.ids.tolist(), acts, -2.0, method)
        torch.testing.assert_close(found[row, : len(item.ids)], expected, atol=2e-4, rtol=1e-4)


def edits():
    """Every intervention of this file, and two of them in order."""
    return {
        "method 1": lambda where: steer(E, 1.5, where=where),
        "method 2": lambda where: steer(E, 1.5, method=2, where=where),
        "project out": lambda where: project_out(MANY, where=where),
        "cap": lambda where: cap(E, -40.0, where=where),
        "in order": lambda where: in_order(project_out(E, where=where), steer(E, 1.0, where=where)),
    }


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("name", list(edits()))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_replies_with_and_without_a_cache_are_the_same(family, name, where):
    model = tiny_models.load(family)
    plain = model.generate(PROMPTS, max_new_tokens=8)
    with model.intervene(SITE, edits()[name](where)):
        with_cache = model.generate(PROMPTS, max_new_tokens=8)
        without = model.generate(PROMPTS, max_new_tokens=8, cache=False)
    assert with_cache == without
    assert with_cache != plain


@pytest.mark.parametrize("where", PLACES, ids=str)
def test_transformers_own_generation_is_steered_alike_with_and_without_a_cache(where):
    model = tiny_models.load("llama")
    ids = torch.tensor([model.tokenize(PROMPTS[:1])[0].ids.tolist()])
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = model.model.generate(ids, **settings).tolist()
    nothing = steer(E, 0.0)
    with model.intervene(Site(0), nothing), model.intervene(SITE, steer(E, 20.0, where=where)):
        cached = model.model.generate(ids, **settings, use_cache=True).tolist()
        for _ in range(2):  # the second time, its first pass does not continue the last one
            found = model.model.generate(ids, **settings, use_cache=False).tolist()
            assert found == cached != plain


@pytest.mark.parametrize("where", ["both", "decode"])
@pytest.mark.parametrize("method", [1, 2])
def test_logits_with_and_without_a_cache_agree(method, where, monkeypatch):
    """The logits from which every token was chosen, both ways."""
    model = tiny_models.load("llama")
    seen = []
    own = model.model.forward

    def listening(*args, **kwargs):
        output = own(*args, **kwargs)
        seen.append(output.logits[:, -1].clone())
        return output

    monkeypatch.setattr(model.model, "forward", listening)
    with model.intervene(SITE, steer(E, 1.0, method=method, where=where)):
        for cache in (True, False):
            model.generate(PROMPTS, max_new_tokens=8, cache=cache)
    half = len(seen) // 2
    for one, other in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [1, 2])
@pytest.mark.parametrize("family", OFTEN)
def test_a_batch_of_many_alphas_gives_each_its_reply_alone(family, method):
    model = tiny_models.load(family)
    alphas, prompts = [-3.0, 0.5, 3.0], PROMPTS[:2]
    batch = [prompt for prompt in prompts for _ in alphas]
    grid = alphas * len(prompts)
    with model.intervene(SITE, steer(E, grid, method=method)):
        together = model.generate(batch, max_new_tokens=6, batch_size=4)
    alone = []
    for prompt, alpha in zip(batch, grid, strict=True):
        with model.intervene(SITE, steer(E, alpha, method=method)):
            alone += model.generate([prompt], max_new_tokens=6)
    assert together == alone
    assert len(set(together)) > len(prompts)


def test_special_tokens_and_padding_keep_their_bits():
    model = tiny_models.load("gemma2")
    batch = model.collate(model.tokenize(PROMPTS))
    before = model.capture(batch, [SITE])[SITE]
    with model.intervene(SITE, steer(E, 5.0)):
        after = model.capture(batch, [SITE])[SITE]
    spared = batch.special | ~batch.mask
    assert batch.special.any()
    assert torch.equal(after[spared], before[spared])
    with model.intervene(SITE, steer(E, 5.0, skip_special=False)):
        after = model.capture(batch, [SITE])[SITE]
    torch.testing.assert_close(after[batch.mask], before[batch.mask] + 5 * E)


def test_a_steer_that_breaks_the_logits_names_alpha_step_and_example():
    model = tiny_models.load("llama")
    alphas = [1.0, 1e38, 2.0]
    with (
        model.intervene(SITE, steer(1e3 * E, alphas, where="decode")),
        pytest.raises(NumericError) as error,
    ):
        model.generate(PROMPTS, max_new_tokens=5)
    told = error.value.message
    assert "1 of 3 replies are NaN or infinite at step 2 of generation" in told
    assert "example b" in told
    assert "method 1 with alpha = 1e+38 at blocks.1.hook_resid_post" in told


def test_a_barred_token_is_no_broken_logit(monkeypatch):
    model = tiny_models.load("llama")
    own = model.model.forward

    def barring(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits[..., :5] = float("-inf")
        return output

    monkeypatch.setattr(model.model, "forward", barring)
    assert len(model.generate(PROMPTS, max_new_tokens=3)) == 3
