"""δ edited while the model runs, against two whole passes and a patch of a third, made by hand."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

import tiny_models
import tiny_vlms
from contrast_truth import blocks_of, by_two_passes, first, hooked
from family_truth import n_hooks
from interventions.test_gate import random_sae
from saefty.errors import ConfigError, MismatchError
from saefty.interventions.gate import subtract
from saefty.models.base import load_model
from saefty.models.contrast import ContrastSection
from saefty.models.live_contrast import LiveContrast
from saefty.records import Example, Site

LATENTS = list(range(0, 64, 2))
IN_SEQUENCE = [family for family in tiny_vlms.FAMILIES if family != "mllama"]
PARTS = ("post_attn_resid", "post_attn_ln", "resid_post")
LAYER = 1  # in the tiny Mllama the one that reads the image
READ = (0, 1, 2)
WAYS = [("knockout", "per_layer"), ("knockout", "joint"), ("zero_attention", "per_layer"),
        ("zero_attention", "joint")]  # fmt: skip


@cache
def loaded(family, attn="sdpa"):
    return load_model(str(tiny_vlms.folder_of(family)), attn=attn)


@cache
def sae():
    return random_sae()


def examples():
    """Return two examples with images of unequal sizes and one without."""
    paths = tiny_vlms.example_images()
    return [
        Example("short", "What is this?", image=paths[1]),
        Example("long", "Describe the picture, please.", image=paths[2]),
        Example("text", "no picture is here"),
    ]


def place(part, method, scope, layer=LAYER, read=READ):
    return LiveContrast(Site(layer, part), ContrastSection(method=method, scope=scope), read)


def read_with(method, scope, family):
    """Return the layers that two passes by hand have to read, for all that is off to be off."""
    if scope == "per_layer" or method == "knockout" or family == "mllama":
        return [LAYER]
    return [layer for layer in READ if layer <= LAYER]


def contribution(delta, strength):
    """Return c Σ z_k(δ) W_k, in float64."""
    z = sae().encode(delta.float()).detach().double()
    return strength * z[..., LATENTS] @ sae().W_dec.detach().double()[LATENTS]


@contextmanager
def added(model, family, layer, part, change):
    """Add something to what lies at a part of a layer, by hooks set here."""
    blocks, (attn, norm, mlp, post_attn, _) = blocks_of(model, family)
    block, change = blocks[layer], change.to(model.dtype)

    def to_output(_, __, output):
        new = first(output) + change
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    def to_input(_, args, kwargs):
        if args:
            return (args[0] + change, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + change}

    with ExitStack() as stack:
        if part in ("post_attn_resid", "resid_pre"):
            reader = getattr(block, norm or mlp) if part == "post_attn_resid" else block
            handle = reader.register_forward_pre_hook(to_input, with_kwargs=True)
            stack.enter_context(hooked(handle))
        if part != "resid_pre":
            outputs = {"post_attn_ln": norm or mlp, "attn_out": post_attn or attn}
            module = getattr(block, outputs[part]) if part in outputs else block
            stack.enter_context(hooked(module.register_forward_hook(to_output)))
        yield


def by_hand(model, family, batch, part, method, scope, strength=1.0):
    """Return the logits of a pass in which latents of δ are taken out of the text's tokens."""
    read = read_with(method, scope, family)
    delta = by_two_passes(model, family, batch, part, read, method, scope)[LAYER]
    acts = (batch.mask & ~batch.special & ~batch.image)[..., None]
    change = torch.where(acts, -contribution(delta, strength), 0.0)
    with added(model, family, LAYER, part, change):
        return model.logits(batch)


def check(model, family, part, method, scope, *, strength=1.0):
    batch = model.collate(model.tokenize(examples()))
    expected = by_hand(model, family, batch, part, method, scope, strength)
    with place(part, method, scope).edited(model, subtract(sae(), LATENTS, strength)):
        found = model.logits(batch)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], atol=5e-5, rtol=1e-3)
    assert not torch.allclose(found[batch.mask], model.logits(batch)[batch.mask], atol=1e-2)


@pytest.mark.parametrize("part", [*PARTS, "attn_out"])
@pytest.mark.parametrize(("method", "scope"), WAYS)
def test_latents_are_taken_out_of_the_delta_of_two_passes_at_each_place(part, method, scope):
    check(loaded("llava"), "llava", part, method, scope)


@pytest.mark.parametrize(("method", "scope"), WAYS)
def test_subtracting_twice_what_they_contribute_takes_out_twice_as_much(method, scope):
    check(loaded("llava"), "llava", "resid_post", method, scope, strength=2.0)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_knockout_is_edited_in_every_family_that_has_it(family, scope):
    check(loaded(family), family, "post_attn_resid", "knockout", scope)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_cross_attention_is_edited_where_the_image_stands_beside_the_sequence(part, scope):
    check(loaded("mllama"), "mllama", part, "cross_attention", scope)


@pytest.mark.parametrize(("method", "scope"), WAYS)
def test_attention_of_another_kind_gives_the_same(method, scope):
    check(loaded("llava", "eager"), "llava", "resid_post", method, scope)


def test_with_all_before_it_off_the_input_of_a_layer_has_a_delta_too():
    check(loaded("llava"), "llava", "resid_pre", "knockout", "joint")


@pytest.mark.parametrize(("method", "scope"), WAYS)
def test_an_edit_that_changes_nothing_keeps_the_replies(method, scope):
    model = loaded("llava")
    plain = model.generate(examples(), max_new_tokens=6)
    with place("resid_post", method, scope).edited(model, lambda delta, positions: delta):
        assert model.generate(examples(), max_new_tokens=6) == plain


def replies(model, one, **settings):
    with one.edited(model, subtract(sae(), LATENTS, 1.0)):
        return model.generate(examples(), max_new_tokens=12, **settings)


@pytest.mark.parametrize(
    ("family", "layer", "method", "scope"),
    [
        *(("llava", LAYER, *way) for way in WAYS),
        ("gemma3", 0, "knockout", "per_layer"),  # a layer with a window, shorter than the reply
        ("gemma3", 0, "knockout", "joint"),
        ("mllama", LAYER, "cross_attention", "per_layer"),
        ("mllama", LAYER, "zero_attention", "joint"),
        *(
            pytest.param(family, LAYER, *way, marks=pytest.mark.slow)
            for family in ("qwen2_5_vl", "gemma3", "paligemma", "idefics3")
            for way in WAYS
        ),
    ],
)
def test_replies_with_a_cache_are_those_without_and_do_not_depend_on_the_batch(
    family, layer, method, scope
):
    model, part = loaded(family), "resid_post" if method != "knockout" else "post_attn_resid"
    one = place(part, method, scope, layer)
    found = replies(model, one)
    assert found != model.generate(examples(), max_new_tokens=12)
    assert replies(model, one, cache=False) == found
    assert replies(model, one, batch_size=1) == found


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_replies_are_those_of_passes_patched_by_hand_token_by_token(scope):
    model = loaded("llava")
    one = examples()[0]
    with place("resid_post", "knockout", scope).edited(model, subtract(sae(), LATENTS, 1.0)):
        (found,) = model.generate([one], max_new_tokens=8)
    batch, ids = model.collate(model.tokenize([one])), []
    while len(ids) < 8:
        logits = by_hand(model, "llava", batch, "resid_post", "knockout", scope)
        scores = logits[0, -1].clone()
        scores[model.images.token_id] = -torch.inf
        ids.append(int(scores.argmax()))
        if ids[-1] in model._stop_ids():
            ids.pop()
            break
        batch = longer(batch, ids[-1], model)
    assert len(ids) > 2
    assert found == model.text.decode_reply(batch.items[0], ids)


def longer(batch, token, model):
    """Return a batch of one example with a token behind it."""

    def behind(x, value):
        return torch.cat([x, torch.tensor([[value]], dtype=x.dtype)], dim=1)

    return replace(
        batch,
        ids=behind(batch.ids, token),
        mask=behind(batch.mask, True),
        position_ids=behind(batch.position_ids, batch.ids.shape[1]),
        special=behind(batch.special, token in model.text.special_ids),
        response=behind(batch.response, True),
        image=behind(batch.image, False),
    )


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_a_prompt_that_several_rows_begin_with_is_edited_as_each_by_itself(scope):
    model = tiny_models.load("llama")
    prompt = Example("p", "How do I bake bread?")
    with place("resid_post", "zero_attention", scope).edited(model, subtract(sae(), LATENTS, 1.0)):
        (alone,) = model.generate([prompt], max_new_tokens=8)
        assert model.generate([prompt] * 3, max_new_tokens=8) == [alone] * 3
    assert model.generate([prompt], max_new_tokens=8) != [alone]


@pytest.mark.parametrize(("method", "scope"), WAYS)
def test_the_check_compares_with_what_an_extraction_reads(method, scope):
    model = loaded("gemma3")
    batch = model.collate(model.tokenize(examples()))
    for part in PARTS:
        place(part, method, scope).check(model, batch)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_the_check_finds_out_a_model_that_computes_otherwise_each_time(scope):
    model, calls = loaded("llava"), []
    batch = model.collate(model.tokenize(examples()))

    def drift(module, args, output):
        calls.append(None)
        return output * (1 + 0.01 * len(calls))

    handle = model.blocks[LAYER].mlp.register_forward_hook(drift)
    with hooked(handle), pytest.raises(MismatchError, match="cannot be known while") as refused:
        place("resid_post", "knockout", scope).check(model, batch)
    assert "intervention.forward=false" in str(refused.value)


@pytest.mark.parametrize(("method", "scope"), WAYS)
def test_who_reads_the_model_meanwhile_sees_the_pass_with_attention_on(method, scope):
    model = loaded("llava")
    batch = model.collate(model.tokenize(examples()))
    sites = [Site(0, "attn_out"), Site(LAYER, "attn_out"), Site(LAYER, "post_attn_resid")]
    plain = model.capture(batch, sites, batch.mask)
    with place("post_attn_resid", method, scope).edited(model, lambda delta, positions: delta):
        found = model.capture(batch, sites, batch.mask)
    for site in sites:
        torch.testing.assert_close(found[site], plain[site], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_other_edits_act_in_both_passes(scope):
    """A shift in front of the layer is in h_on and in h_off alike, and δ is of the shifted."""
    model, seen = loaded("llava"), []
    batch = model.collate(model.tokenize(examples()))
    shift = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))

    def watch(x, positions):
        seen.append(x[batch.mask])
        return x

    one = place("resid_post", "knockout", scope)
    with model.intervene(Site(0, "resid_pre"), lambda x, positions: x + shift):
        expected = one.read(model, batch, batch.mask)
        with one.edited(model, watch):
            model.logits(batch)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)
    with one.edited(model, watch):
        model.logits(batch)
    assert not torch.allclose(seen[1], expected, atol=1e-2)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_nothing_is_left_behind_after_an_exception(scope):
    model = loaded("llava")
    batch = model.collate(model.tokenize(examples()))
    before, hooks = model.logits(batch), n_hooks(model)

    def fail(delta, positions):
        raise RuntimeError("the edit failed")

    failing = place("resid_post", "knockout", scope).edited(model, fail)
    with pytest.raises(RuntimeError, match="the edit failed"), failing:
        model.logits(batch)
    assert n_hooks(model) == hooks
    assert torch.equal(model.logits(batch), before)


@pytest.mark.parametrize(
    ("scope", "attention", "tower"), [("per_layer", [1, 2, 1], 1), ("joint", [2, 2, 1], 2)]
)
def test_it_costs_one_block_more_or_a_second_pass_as_far_as_the_site(scope, attention, tower):
    model = loaded("llava")
    batch = model.collate(model.tokenize(examples()))
    modules = [*(block.self_attn for block in model.blocks), model.model.model.vision_tower]
    counts = dict.fromkeys(modules, 0)

    def count(module, args, kwargs):
        counts[module] += 1

    handles = [m.register_forward_pre_hook(count, with_kwargs=True) for m in modules]
    one = place("post_attn_resid", "knockout", scope)
    with hooked(*handles), one.edited(model, lambda delta, positions: delta):
        model.logits(batch)
    assert list(counts.values()) == [*attention, tower]


def test_replies_of_transformers_own_generate_are_edited_per_layer_and_refused_jointly():
    model = loaded("llava")
    (item,) = model.tokenize(examples()[:1])
    batch = model.collate([item])
    asked = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "do_sample": False,
             "max_new_tokens": 8, **batch.inputs}  # fmt: skip
    edit = subtract(sae(), LATENTS, 1.0)
    with place("resid_post", "knockout", "per_layer").edited(model, edit):
        (ours,) = model.generate(examples()[:1], max_new_tokens=8)
        ids = model.model.generate(**asked)[0, batch.ids.shape[1] :].tolist()
    assert model.text.decode_reply(item, ids) == ours
    with (
        place("resid_post", "knockout", "joint").edited(model, edit),
        pytest.raises(MismatchError, match="saefty's own generate alone"),
    ):
        model.model.generate(**asked)


def test_what_cannot_be_known_is_refused_before_the_model_runs():
    model = loaded("mllama")
    nothing = subtract(sae(), [], 1.0)
    refused = pytest.raises(MismatchError, match="keeps the image beside the sequence")
    with refused, place("resid_post", "knockout", "per_layer").edited(model, nothing):
        pass
    refused = pytest.raises(ConfigError, match="is zero whatever the model computes")
    with refused, place("resid_pre", "knockout", "per_layer").edited(loaded("llava"), nothing):
        pass
    encoder = tiny_models.load("bert")
    refused = pytest.raises(MismatchError, match="which writes no replies")
    with refused, place("resid_post", "zero_attention", "per_layer").edited(encoder, nothing):
        pass
