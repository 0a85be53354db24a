"""Rows that begin alike are read once, and get what each gets when it is read by itself."""

import pytest
import torch

import tiny_models
from saefty.interventions.steer import steer
from saefty.models import shared
from saefty.models.chat import with_response
from saefty.records import Example, Site

D = tiny_models.D_MODEL
PROMPT = Example("p", "How do I bake bread at home?")
REPLIES = ["the robot", "learns to paint one dog", "the quick brown fox jumps over water"]


@pytest.fixture(scope="module", params=tiny_models.CAUSAL_FAMILIES)
def model(request):
    return tiny_models.load(request.param)


def vectors(n=3):
    return 3.0 * torch.randn(n, D, generator=torch.Generator().manual_seed(4))


def lengths_read(model, work):
    """Return what `work` returns, and the rows and tokens of each pass through the first block."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (args[0] if args else kwargs["hidden_states"]).shape[:2]
        ),
        with_kwargs=True,
    )
    try:
        return work(), seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("part", "temperature"), [("resid_pre", 0.0), ("resid_post", 1.0)])
def test_rows_of_one_prompt_are_replied_to_as_each_alone(model, part, temperature):
    keys = {"max_new_tokens": 6, "temperature": temperature, "seed": 2}
    steps, site = vectors(), Site(1, part)
    alone = []
    for step in steps:
        with model.intervene(site, steer(step, 1.0)):
            alone += model.generate([PROMPT], **keys)
    with model.intervene(site, steer(steps, [1.0] * 3)):
        together, seen = lengths_read(model, lambda: model.generate([PROMPT] * 3, **keys))
    assert together == alone
    assert len(set(together)) > 1, "the vectors differ in what they do"
    assert model.shares_prompts
    given = len(model.tokenize([PROMPT])[0].ids)
    assert seen[0] == (1, given), "the prompt is read once"
    assert set(seen[1:]) == {(3, 1)}


def test_without_an_intervention_and_with_several_the_replies_are_those_of_each_alone(model):
    keys = {"max_new_tokens": 6, "seed": 2, "temperature": 1.0}
    assert model.generate([PROMPT] * 3, **keys) == model.generate([PROMPT], **keys) * 3
    first = vectors(1)[0]
    edits = [(Site(2), steer(first, 1.0)), (Site(0), steer(vectors(), [1.0, 0.0, -1.0]))]
    with model.intervene(*edits[0]), model.intervene(*edits[1]):
        together = model.generate([PROMPT] * 3, **keys)
    alone = []
    for step, alpha in zip(vectors(), [1.0, 0.0, -1.0], strict=True):
        with model.intervene(*edits[0]), model.intervene(Site(0), steer(step, alpha)):
            alone += model.generate([PROMPT], **keys)
    assert together == alone


def test_a_part_within_a_block_is_read_row_by_row(model):
    steps = vectors()
    with model.intervene(Site(1, "mlp_out"), steer(steps, [1.0] * 3)):
        together, seen = lengths_read(model, lambda: model.generate([PROMPT] * 3, max_new_tokens=4))
    assert seen[0][0] == 3
    for reply, step in zip(together, steps, strict=True):
        with model.intervene(Site(1, "mlp_out"), steer(step, 1.0)):
            assert model.generate([PROMPT], max_new_tokens=4) == [reply]


def test_what_stands_behind_a_shared_prompt_is_captured_as_in_whole_passes(model):
    """Long enough for the sliding windows of the families that have one."""
    prompt = Example("long", "the dog and the fox paint the house again and again, then bake bread")
    items = model.tokenize([with_response(prompt, reply) for reply in REPLIES])
    batch = model.collate(items)
    rows, sites = batch.response & batch.mask & ~batch.special, [Site(0), Site(2, "mlp_out")]
    whole = model.capture(batch, sites, rows)
    assert model.causal and model.shares_prompts  # tried once a model
    found, seen = lengths_read(model, lambda: model.capture_behind(batch, sites, rows))
    for site in sites:
        torch.testing.assert_close(found[site], whole[site], rtol=1e-4, atol=1e-5)
    assert [read[0] for read in seen] == [1, 3]
    assert sum(read[1] for read in seen) == batch.ids.shape[1]


def test_an_intervention_sees_every_row_at_every_token_once(model):
    seen = []

    def look(x, positions):
        assert x.shape[:2] == positions.mask.shape
        seen.append((x.shape[:2], positions.is_prefill))
        return x

    with model.intervene(Site(1), look):
        model.generate([PROMPT] * 3, max_new_tokens=3)
    given = len(model.tokenize([PROMPT])[0].ids)
    assert seen[0] == ((3, given), True)
    assert all(one == ((3, 1), False) for one in seen[1:])


def test_a_family_that_cannot_share_reads_all_rows(monkeypatch):
    model = tiny_models.load("gpt2")
    steps = vectors()
    with model.intervene(Site(1), steer(steps, [1.0] * 3)):
        shared_replies = model.generate([PROMPT] * 3, max_new_tokens=5)

    def refuse(*given):
        raise ValueError("a cache of another kind")

    monkeypatch.delitem(model.__dict__, "shares_prompts")
    monkeypatch.setattr(shared, "_make_room", refuse)
    with model.intervene(Site(1), steer(steps, [1.0] * 3)):
        whole, seen = lengths_read(model, lambda: model.generate([PROMPT] * 3, max_new_tokens=5))
    assert not model.shares_prompts
    assert seen[0][0] == 3
    assert whole == shared_replies


def test_a_family_whose_blocks_count_their_rows_is_found_out():
    model = tiny_models.load("qwen3")
    assert model.shares_prompts
    del model.__dict__["shares_prompts"]
    handle = model.blocks[0].mlp.register_forward_hook(lambda _, __, x: x * len(x))
    try:
        assert not model.shares_prompts
    finally:
        handle.remove()
        del model.__dict__["shares_prompts"]
