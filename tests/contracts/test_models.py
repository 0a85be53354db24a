"""What every model family must do: read the true activations, edit them, and leave no trace.

The truth comes from plain hooks set here on modules named here, and from the block's arithmetic
done by hand, not from the package's own way of finding places.
"""

import pytest
import torch

import tiny_models
from saefty.errors import MismatchError
from saefty.models.base import Positions
from saefty.models.selfcheck import LISTED_FAMILIES
from saefty.records import PARTS, Example, Site

EXAMPLES = [
    Example("short", "How do I bake bread?"),
    Example("long", "Write a short story about a small robot.", "the robot learns to paint"),
    Example("other", "Привет, мир! 東京は日本 안녕하세요", raw=True),
]
LAYERS = range(tiny_models.N_LAYERS)

# By family: the blocks, then in a block: attention, norm before the MLP, MLP, and post-norms.
PLAIN = ("model.layers", "self_attn", "post_attention_layernorm", "mlp", None, None)
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH = ("model.layers", "self_attn", "pre_feedforward_layernorm", "mlp", *POST)
NAMES = {
    **dict.fromkeys(("llama", "mistral", "gemma", "qwen2", "qwen3", "qwen3_moe", "phi3"), PLAIN),
    **dict.fromkeys(("gemma2", "gemma3_text"), SANDWICH),
    "olmo2": ("model.layers", "self_attn", None, "mlp", *POST),
    "gpt2": ("transformer.h", "attn", "ln_2", "mlp", None, None),
    "opt": ("model.decoder.layers", "self_attn", "final_layer_norm", "fc1 and fc2", None, None),
    # Attention and MLP both read the norm of the block's input.
    "phi": ("model.layers", "self_attn", "input_layernorm", "mlp", None, None),
    "gpt_neox": ("gpt_neox.layers", "attention", "post_attention_layernorm", "mlp", None, None),
    "gptj": ("transformer.h", "attn", "ln_1", "mlp", None, None),
}
BETWEEN = ("post_attn_resid", "post_attn_ln")


def parts_of(family):
    return [part for part in PARTS if part not in BETWEEN or family not in tiny_models.PARALLEL]


def every(*wanted):
    """Run a test for each family with each of the parts that it has."""
    pairs = [(f, p) for f in tiny_models.CAUSAL_FAMILIES for p in parts_of(f) if p in wanted]
    return pytest.mark.parametrize(("family", "part"), pairs)


@pytest.fixture(params=tiny_models.CAUSAL_FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_models.load(family)


@pytest.fixture
def batch(model):
    return model.collate(model.tokenize(EXAMPLES))


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def call(block, name, x):
    """Return what a child of a block computes; a name that is None leaves `x` as it is."""
    if name is None:
        return x
    if name == "fc1 and fc2":
        return block.fc2(block.activation_fn(block.fc1(x)))
    return first(getattr(block, name)(x))


@torch.no_grad()
def by_hand(model, family, batch, layer):
    """Compute all parts of a block from its true input and what its attention module returned."""
    blocks, attn, norm, mlp, post_attn, post_mlp = NAMES[family]
    block = model.model.get_submodule(f"{blocks}.{layer}")
    seen = {}
    handles = [
        block.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
        block.register_forward_hook(lambda m, args, out: seen.update(y=first(out))),
        getattr(block, attn).register_forward_hook(lambda m, a, out: seen.update(attn=first(out))),
    ]
    model.model(
        input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=batch.position_ids
    )
    for handle in handles:
        handle.remove()
    attn_out = call(block, post_attn, seen["attn"])
    between = seen["x"] + attn_out
    read = call(block, norm, seen["x"] if family in tiny_models.PARALLEL else between)
    mlp_out = call(block, post_mlp, call(block, mlp, read))
    torch.testing.assert_close(between + mlp_out, seen["y"])  # the arithmetic is the block's
    return {
        "resid_pre": seen["x"],
        "attn_out": attn_out,
        "post_attn_resid": between,
        "post_attn_ln": read,
        "mlp_out": mlp_out,
        "resid_post": seen["y"],
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_every_part_is_what_the_block_computes(model, family, batch, layer):
    truth = by_hand(model, family, batch, layer)
    parts = parts_of(family)
    captured = model.capture(batch, [Site(layer, part) for part in parts])
    for part in parts:
        torch.testing.assert_close(captured[Site(layer, part)], truth[part], msg=part)


def test_the_block_output_is_captured_bit_for_bit(model, family, batch):
    captured = model.capture(batch, [Site(layer) for layer in LAYERS])
    for layer in LAYERS:
        assert torch.equal(
            captured[Site(layer)], by_hand(model, family, batch, layer)["resid_post"]
        )


def test_one_forward_over_many_sites_equals_one_for_each(model, batch):
    sites = [Site(2, "mlp_out"), Site(0), Site(1, "attn_out"), Site(2, "resid_pre")]
    together = model.capture(batch, sites)
    assert list(together) == sites
    for site in sites:
        assert torch.equal(together[site], model.capture(batch, [site])[site])


def test_blocks_but_the_last_equal_hidden_states(family, batch):
    """transformers' own tuple agrees except for its last entry, which is after the final norm."""
    fresh = tiny_models.load_model(str(tiny_models.folder_of(family)))
    captured = fresh.capture(batch, [Site(layer) for layer in LAYERS])
    with torch.no_grad():
        states = fresh.model(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            position_ids=batch.position_ids,
            output_hidden_states=True,
        ).hidden_states
    for layer in LAYERS[:-1]:
        torch.testing.assert_close(captured[Site(layer)], states[layer + 1])
    last = tiny_models.N_LAYERS - 1
    assert (captured[Site(last)] - states[last + 1])[batch.mask].abs().max() > 0.1


def test_the_output_of_a_block_is_the_input_of_the_next(model, batch):
    found = model.capture(batch, [Site(0), Site(1, "resid_pre")])
    assert torch.equal(found[Site(0)], found[Site(1, "resid_pre")])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_read_alone(model, family, side):
    items = model.tokenize(EXAMPLES)
    together = model.collate(items, side=side)
    sites = [Site(layer, part) for layer in LAYERS for part in parts_of(family)]
    captured = model.capture(together, sites)
    for row, item in enumerate(items):
        alone = model.capture(model.collate([item]), sites)
        for site in sites:
            padded = captured[site][row][together.mask[row]]
            torch.testing.assert_close(padded, alone[site][0], atol=1e-5, rtol=1e-5, msg=str(site))


def test_only_the_wanted_rows_are_kept_in_order(model, batch):
    wanted = batch.mask & ~batch.special
    site = Site(1)
    rows = model.capture(batch, [site], rows=wanted)[site]
    assert torch.equal(rows, model.capture(batch, [site])[site][wanted])


def test_capture_leaves_the_model_as_it_was(model, batch):
    before, hooks = model.logits(batch), n_hooks(model)
    model.capture(batch, [Site(0)])
    assert n_hooks(model) == hooks
    assert torch.equal(model.logits(batch), before)


def test_capture_stops_before_what_it_does_not_need(model, family, batch):
    ran = []
    blocks = model.model.get_submodule(NAMES[family][0])
    handles = [
        blocks[1].register_forward_hook(lambda *a: ran.append("block 1")),
        blocks[2].register_forward_pre_hook(lambda *a: ran.append("block 2")),
        model.model.lm_head.register_forward_pre_hook(lambda *a: ran.append("lm_head")),
    ]
    model.capture(batch, [Site(1)])
    assert ran == ["block 1"]
    model.capture(batch, [Site(2)])
    assert "lm_head" not in ran
    for handle in handles:
        handle.remove()


@every(*PARTS)
def test_an_identity_edit_leaves_the_logits_bit_equal(model, batch, part):
    before = model.logits(batch)
    with model.intervene(Site(1, part), lambda x, positions: x):
        assert torch.equal(model.logits(batch), before)


@every(*PARTS)
def test_writing_back_what_was_captured_changes_nothing(model, batch, part):
    before = model.logits(batch)
    site = Site(1, part)
    captured = model.capture(batch, [site])[site]
    with model.intervene(site, lambda x, positions: captured):
        torch.testing.assert_close(model.logits(batch), before, atol=1e-5, rtol=1e-5)


@every(*PARTS)
def test_writing_back_the_neighbour_changes_the_logits(model, batch, part):
    before = model.logits(batch)[batch.mask]
    captured = model.capture(batch, [Site(0, part)])[Site(0, part)]
    with model.intervene(Site(1, part), lambda x, positions: captured):
        assert (model.logits(batch)[batch.mask] - before).abs().max() > 1e-2


@every(*PARTS)
def test_an_edit_is_seen_at_its_site_and_only_behind_it(model, family, batch, part):
    """Adding 1 at a site adds 1 there, and leaves what the model computed before it."""
    site = Site(1, part)
    order = ["resid_pre", "attn_out", "post_attn_resid", "post_attn_ln", "mlp_out", "resid_post"]
    order = [name for name in order if name in parts_of(family)]
    if NAMES[family][2] is None and part == "post_attn_ln":
        order.remove("post_attn_resid")  # the MLP reads the residual itself: one tensor, two names
    sites = [Site(0), *(Site(1, name) for name in order)]
    before = model.capture(batch, sites)
    with model.intervene(site, lambda x, positions: x + 1):
        after = model.capture(batch, sites)
    torch.testing.assert_close(after[site], before[site] + 1)
    earlier = [Site(0), *(Site(1, name) for name in order[: order.index(part)])]
    for other in earlier:
        assert torch.equal(after[other], before[other]), other
    if part in {"resid_pre", "attn_out", "post_attn_resid", "mlp_out"}:
        assert (after[Site(1)] - before[Site(1)]).abs().max() > 0.5


@every("post_attn_resid")
def test_an_edit_between_attention_and_mlp_reaches_both_readers(model, family, batch, part):
    """The block's output is edited residual + MLP(norm(edited residual)), worked out by hand."""
    _, _, norm, mlp, _, post_mlp = NAMES[family]
    block = model.model.get_submodule(f"{NAMES[family][0]}.1")
    site = Site(1, part)
    shift = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    edited = model.capture(batch, [site])[site] + shift
    with torch.no_grad():
        expected = edited + call(block, post_mlp, call(block, mlp, call(block, norm, edited)))
    with model.intervene(site, lambda x, positions: x + shift):
        found = model.capture(batch, [Site(1)])[Site(1)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_nested_edits_apply_from_the_outside_in(model, batch):
    site = Site(1)
    before = model.capture(batch, [site])[site]
    with (
        model.intervene(site, lambda x, positions: x + 1),
        model.intervene(site, lambda x, positions: x * 2),
    ):
        after = model.capture(batch, [site])[site]
    torch.testing.assert_close(after, (before + 1) * 2)


@every("post_attn_resid", "mlp_out")
def test_an_outer_edit_of_the_output_comes_behind_an_inner_one(model, batch, part):
    """What the model computes first is edited first, in whatever order the contexts nest."""
    between, after = Site(1, part), Site(1)
    with model.intervene(between, lambda x, positions: x + 1):
        inner = model.capture(batch, [after])[after]
    with (
        model.intervene(after, lambda x, positions: x * 2),
        model.intervene(between, lambda x, positions: x + 1),
    ):
        torch.testing.assert_close(model.capture(batch, [after])[after], inner * 2)


def test_an_edit_in_place_does_not_reach_back(model, batch):
    """A block's input is the last block's output: writing into it must not change that one."""
    before = model.capture(batch, [Site(0)])[Site(0)]

    def write_into(x, positions):
        x += 1
        return x

    with model.intervene(Site(1, "resid_pre"), write_into):
        after = model.capture(batch, [Site(0), Site(1, "resid_pre")])
    assert torch.equal(after[Site(0)], before)
    torch.testing.assert_close(after[Site(1, "resid_pre")], before + 1)


def test_hooks_come_off_after_an_exception(model, batch):
    before, hooks = model.logits(batch), n_hooks(model)

    def fail(x, positions):
        raise RuntimeError("the edit failed")

    with pytest.raises(RuntimeError, match="the edit failed"), model.intervene(Site(1), fail):
        model.capture(batch, [Site(2)])
    assert n_hooks(model) == hooks
    assert torch.equal(model.logits(batch), before)


def test_an_edit_that_changes_the_shape_is_refused(model, batch):
    with (
        pytest.raises(ValueError, match="must keep the shape"),
        model.intervene(Site(1), lambda x, positions: x[:, :1]),
    ):
        model.logits(batch)


def greedy_without_cache(model, example, n):
    """Reply by reading the whole text anew for each token."""
    ids = model.tokenize([example])[0].ids.tolist()
    start, stops = len(ids), model._stop_ids()
    while len(ids) < start + n:
        given = torch.tensor([ids])
        with torch.no_grad():
            token = int(model.model(input_ids=given, use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[start:]


def strong(x, positions):
    """Return an edit that depends on the values and moves the replies."""
    return x + 0.5 * x.roll(1, dims=-1) * positions.mask[..., None]


@every("resid_post", "post_attn_resid", "mlp_out")
def test_generation_with_a_cache_equals_generation_without_under_an_edit(model, part):
    prompts = [Example(e.id, e.prompt, raw=e.raw) for e in EXAMPLES]
    plain = model.generate(prompts, max_new_tokens=10)
    with model.intervene(Site(1, part), strong):
        cached = model.generate(prompts, max_new_tokens=10)
        uncached = [
            model.text.decode_reply(
                model.tokenize([example])[0], greedy_without_cache(model, example, 10)
            )
            for example in prompts
        ]
    assert cached == uncached
    assert cached != plain


def test_greedy_generation_equals_that_of_transformers(model):
    prompts = [Example(e.id, e.prompt, raw=e.raw) for e in EXAMPLES]
    for example, reply in zip(prompts, model.generate(prompts, max_new_tokens=12), strict=True):
        item = model.tokenize([example])[0]
        ids = torch.tensor([item.ids.tolist()])
        theirs = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=model.tokenizer.eos_token_id,
        )[0, ids.shape[1] :].tolist()
        stop = model.tokenizer.eos_token_id
        theirs = theirs[: theirs.index(stop)] if stop in theirs else theirs
        assert reply == model.text.decode_reply(item, theirs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_does_not_depend_on_the_batch(model, temperature):
    prompts = [Example(str(i), "the dog " * (i + 1), raw=True) for i in range(5)]
    options = {"max_new_tokens": 10, "seed": 3, "temperature": temperature}
    together = model.generate(prompts, **options)
    alone = [model.generate([prompt], **options)[0] for prompt in prompts]
    assert together == alone
    assert model.generate(prompts[::-1], **options, batch_size=2) == together[::-1]


def test_sampled_replies_follow_the_seed(model):
    prompts = [Example(str(i), "the dog", raw=True) for i in range(4)]
    draw = lambda seed: model.generate(prompts, max_new_tokens=8, seed=seed, temperature=1.0)  # noqa: E731
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len(set(draw(0))) > 1, "examples with different ids draw from different streams"


def test_an_edit_sees_each_token_of_a_generation_once(model):
    seen: list[Positions] = []

    def watch(x, positions):
        assert x.shape[:2] == positions.mask.shape
        seen.append(positions)
        return x

    prompts = [Example("a", "the dog", raw=True), Example("b", "the lazy dog jumps", raw=True)]
    lengths = [len(item.ids) for item in model.tokenize(prompts)]
    with model.intervene(Site(1), watch):
        model.generate(prompts, max_new_tokens=4)
    assert [p.is_prefill for p in seen] == [True, False, False, False][: len(seen)]
    order = sorted(range(2), key=lambda i: -lengths[i])
    for row, i in enumerate(order):
        index = torch.cat([p.index[row][p.mask[row]] for p in seen])
        assert index.tolist() == list(range(len(index)))
        assert seen[0].mask[row].sum() == lengths[i]
        assert not seen[0].response[row].any()


def test_an_edit_holds_under_the_generate_of_transformers(model):
    """A forward pass that was started elsewhere is given its positions too."""
    item = model.tokenize([Example("a", "the lazy dog", raw=True)])[0]
    ids = torch.tensor([[0, 0, *item.ids.tolist()]])
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    seen = []

    def watch(x, positions):
        seen.append(positions)
        return strong(x, positions)

    with model.intervene(Site(1), watch):
        theirs = model.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=model.tokenizer.eos_token_id,
        )
        ours = model.generate([item.example], max_new_tokens=5)
    assert seen[0].mask.tolist() == mask.bool().tolist()
    assert seen[0].index[0, 2:].tolist() == list(range(len(item.ids)))
    assert [p.is_prefill for p in seen[:3]] == [True, False, False]
    assert seen[1].index.tolist() == [[len(item.ids)]]
    assert model.text.decode_reply(item, theirs[0, ids.shape[1] :].tolist()) == ours[0]


def test_loss_is_the_cross_entropy_of_each_token(model, batch):
    logits = model.logits(batch).double()
    loss = model.loss(batch)
    for row in range(len(batch.items)):
        for t in range(batch.ids.shape[1] - 1):
            if batch.mask[row, t + 1]:
                p = logits[row, t].softmax(-1)[batch.ids[row, t + 1]]
                assert loss[row, t].item() == pytest.approx(-p.log().item(), abs=1e-5)
            else:
                assert loss[row, t].isnan()


def test_loss_is_the_same_padded_left(model):
    items = model.tokenize(EXAMPLES)
    right, left = (model.loss(model.collate(items, side=side)) for side in ("right", "left"))
    for a, b in zip(right, left, strict=True):
        torch.testing.assert_close(a[~a.isnan()], b[~b.isnan()], atol=1e-5, rtol=1e-5)


def test_bfloat16_is_kept_and_finite(family):
    model = tiny_models.load(family, torch.bfloat16)
    batch = model.collate(model.tokenize(EXAMPLES))
    assert model.dtype == torch.bfloat16
    captured = model.capture(
        batch, [Site(layer, part) for layer in LAYERS for part in parts_of(family)]
    )
    for site, x in captured.items():
        assert x.dtype == torch.bfloat16, site
        assert x[batch.mask].isfinite().all(), site
    assert model.loss(batch).dtype == torch.float32
    with model.intervene(Site(1), lambda x, positions: x.float() + 1):
        assert model.logits(batch).dtype == torch.bfloat16


@pytest.mark.parametrize("part", BETWEEN)
@pytest.mark.parametrize("family", tiny_models.PARALLEL)
def test_parallel_families_refuse_what_lies_between_and_say_what_there_is(model, batch, part):
    offer = "attn_out or resid_post"
    with pytest.raises(MismatchError, match=f"{part} does not exist in .* models") as error:
        model.capture(batch, [Site(1, part)])
    assert offer in str(error.value)
    with (
        pytest.raises(MismatchError, match="run in parallel"),
        model.intervene(Site(1, part), lambda x, positions: x),
    ):
        pass


def test_every_listed_family_is_tested_here():
    assert {*tiny_models.CAUSAL_FAMILIES, "bert"} == LISTED_FAMILIES
