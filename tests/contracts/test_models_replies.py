"""What every model family must do when it replies: the same with a cache and in any batch."""

import pytest
import torch

from family_truth import EXAMPLES, every, strong
from saefty.models.base import Positions
from saefty.records import Example, Site


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_the_same_with_the_cache_switched_off(model, temperature):
    prompts = [Example(e.id, e.prompt, raw=e.raw) for e in EXAMPLES]
    keys = {"max_new_tokens": 10, "temperature": temperature, "seed": 3}
    plain = model.generate(prompts, **keys)
    with model.intervene(Site(1), strong):
        cached = model.generate(prompts, **keys)
        assert cached == model.generate(prompts, **keys, cache=False)
    assert cached != plain


@pytest.mark.parametrize("cache", [True, False])
def test_an_edit_is_told_whose_row_is_whose_and_what_the_model_wrote(model, cache):
    """Places of rows, as examples are sorted by length, and which tokens are generated."""
    prompts = [Example(e.id, e.prompt, raw=e.raw) for e in EXAMPLES]
    lengths = [len(item.ids) for item in model.tokenize(prompts)]
    seen = []

    def look(x, positions):
        seen.append((positions.examples.tolist(), positions.mask, positions.written))
        return x

    with model.intervene(Site(1), look):
        model.generate(prompts, max_new_tokens=3, cache=cache)
    assert {tuple(rows) for rows, _, _ in seen} == {
        tuple(sorted(range(len(prompts)), key=lambda n: -lengths[n]))
    }
    rows, mask, written = seen[0]
    assert [int(row.sum()) for row in mask] == [lengths[n] for n in rows]
    assert not written.any()
    for step, (_, mask, written) in enumerate(seen[1:], start=1):
        assert written.sum(dim=1).tolist() == [1 if cache else step] * len(prompts)
        assert mask.shape == written.shape


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
