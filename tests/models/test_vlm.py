"""Vision-language models: every family reads images as transformers does, alone and padded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_vlms
from saefty.images import load_image
from saefty.models.base import MODEL_FAMILIES
from saefty.models.hooks import first_tensor
from saefty.models.selfcheck import LISTED_FAMILIES, check_patch_back
from saefty.records import PARTS, ROLES, Example, Site

PROMPT, REPLY = "What is shown here?", "a red box"
# transformers makes labels for PaliGemma in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
every_family = pytest.mark.parametrize("family", tiny_vlms.FAMILIES)


def with_image(number=0, response=None, prompt=PROMPT, **fields):
    picture = tiny_vlms.example_images()[number]
    return Example(f"image {number}", prompt, response, image=picture, **fields)


MIXED = [
    with_image(0, REPLY),
    Example("text", "the quick brown fox jumps over the lazy dog and the other dogs"),
    with_image(2, prompt="How do I bake bread?"),
    with_image(1, "yes", "Write a story", raw=True),
]


def sites_of(model, parts=PARTS):
    across = [i for i, block in enumerate(model.blocks) if hasattr(block, "cross_attn")]
    return [
        Site(layer, part)
        for layer in range(model.n_layers)
        for part in parts
        if not (layer in across and part in {"attn_out", "mlp_out"})
    ]


def processors_own(model, number=0):
    """Return what transformers' processor makes of a prompt with an image."""
    image = load_image(tiny_vlms.example_images()[number])
    processor = model.processor
    if processor.chat_template is None:  # PaliGemma takes texts
        return processor(text=f"<image>{PROMPT}", images=[[image]], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)


def plainly(model, **inputs):
    """Return the logits that transformers gives for what its processor made."""
    with torch.no_grad():
        taken = {name: value for name, value in inputs.items() if name not in {"labels"}}
        return model.model(**taken).logits


def test_every_tested_family_is_listed_and_loaded_by_its_file():
    assert set(tiny_vlms.FAMILIES) <= LISTED_FAMILIES
    for family in tiny_vlms.FAMILIES:
        model = tiny_vlms.load(family)
        assert type(model) is MODEL_FAMILIES["mllama" if family == "mllama" else "vlm"]
        assert model.info.family == family
        assert (model.n_layers, model.d_model) == (3, 32)


@every_family
@pytest.mark.parametrize("number", [0, 2])
def test_ids_and_pixels_are_the_processors_own(family, number):
    model = tiny_vlms.load(family)
    truth = processors_own(model, number)
    [item] = model.tokenize([with_image(number)])
    assert item.status == "ok"
    assert item.ids.tolist() == truth["input_ids"][0].tolist()
    inputs = model.collate([item]).inputs
    for name in {"pixel_values", "image_grid_thw", "image_sizes", "cross_attention_mask"}:
        assert (name in inputs) == (name in truth), name
        if name in truth:
            assert torch.equal(inputs[name], truth[name]), name


@every_family
def test_logits_are_those_of_transformers_for_what_its_processor_made(family):
    model = tiny_vlms.load(family)
    for number in (0, 2):
        batch = model.collate(model.tokenize([with_image(number)]))
        truth = plainly(model, **processors_own(model, number))
        torch.testing.assert_close(model.logits(batch), truth, atol=2e-6, rtol=1e-5)


@every_family
def test_a_text_alone_is_read_as_transformers_reads_it(family):
    model = tiny_vlms.load(family)
    batch = model.collate(model.tokenize([MIXED[1]]))
    assert batch.inputs == {}
    assert not batch.image.any()
    types = {"token_type_ids": torch.zeros_like(batch.ids)} if family == "paligemma" else {}
    truth = plainly(model, input_ids=batch.ids, **types)
    torch.testing.assert_close(model.logits(batch), truth, atol=2e-6, rtol=1e-5)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_images_and_texts_is_each_alone(family, side):
    model = tiny_vlms.load(family)
    parts = PARTS if side == "right" else ("resid_pre", "resid_post")
    items, sites = model.tokenize(MIXED), sites_of(model, parts)
    batch = model.collate(items, side=side)
    together = model.capture(batch, sites)
    logits, loss = model.logits(batch), model.loss(batch)
    for row, item in enumerate(items):
        one, real = model.collate([item]), batch.mask[row]
        alone = model.capture(one, sites)
        for site in sites:
            torch.testing.assert_close(
                together[site][row][real], alone[site][0], atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(logits[row][real], model.logits(one)[0], atol=1e-5, rtol=1e-5)
        pairs = real[1:] & real[:-1]
        torch.testing.assert_close(loss[row][pairs], model.loss(one)[0], atol=1e-5, rtol=1e-5)
        assert loss[row][~pairs].isnan().all()


@every_family
def test_capture_is_what_a_hook_set_by_hand_sees_and_writing_it_back_changes_nothing(family):
    model = tiny_vlms.load(family)
    batch, seen = model.collate(model.tokenize(MIXED)), {}
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: first_tensor(out)}))
        for i, block in enumerate(model.blocks)
    ]
    before = model.logits(batch)
    for handle in handles:
        handle.remove()
    captured = model.capture(batch, [Site(i) for i in range(3)], batch.mask)
    assert all(torch.equal(captured[Site(i)], seen[i][batch.mask]) for i in range(3))
    sites = [site for site in sites_of(model) if site.layer == 1]
    for site in (*sites, Site(0), Site(2)):
        with model.intervene(site, lambda x, positions: x):
            assert torch.equal(model.logits(batch), before), site
    check_patch_back(model, batch, sites)


@every_family
def test_another_image_changes_the_text_behind_it_and_not_a_text_beside_it(family):
    model = tiny_vlms.load(family)
    sites = [Site(2)]
    states = [
        model.capture(model.collate(model.tokenize([with_image(number, REPLY), MIXED[1]])), sites)
        for number in (0, 1)
    ]
    one, other = (found[sites[0]] for found in states)
    [item] = model.tokenize([with_image(0, REPLY)])
    behind = np.flatnonzero(item.roles == ROLES.index("response"))
    change = (one - other)[0, behind].norm(dim=-1) / one[0, behind].norm(dim=-1)
    assert change.min() > 0.02
    assert torch.equal(one[1], other[1])


@every_family
def test_replies_are_the_same_with_and_without_a_cache_and_those_of_transformers(family):
    model = tiny_vlms.load(family)
    prompts = [with_image(0), MIXED[1], with_image(2)]
    cached = model.generate(prompts, max_new_tokens=8)
    assert cached == model.generate(prompts, max_new_tokens=8, cache=False)
    for number, reply in ((0, cached[0]), (2, cached[2])):
        inputs = processors_own(model, number)
        inputs.pop("labels", None)
        with torch.no_grad():
            ids = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        [item] = model.tokenize([with_image(number)])
        new = ids[0, len(item.ids) :].tolist()
        stop = model.tokenizer.eos_token_id
        new = new[: new.index(stop)] if stop in new else new
        assert reply == model.text.decode_reply(item, new)


@every_family
def test_an_edit_holds_in_replies_with_and_without_a_cache_and_in_transformers_own(family):
    model, seen = tiny_vlms.load(family), []

    def edit(x, positions):
        seen.append((positions.is_prefill, int(positions.written.sum())))
        return x + 0.5 * x.roll(1, dims=-1) * positions.mask[..., None]

    with model.intervene(Site(1), edit):
        cached = model.generate([with_image(0)], max_new_tokens=6)
        assert seen[:2] == [(True, 0), (False, 1)]
        assert cached == model.generate([with_image(0)], max_new_tokens=6, cache=False)
        inputs = processors_own(model)
        inputs.pop("labels", None)
        seen.clear()
        with torch.no_grad():
            ids = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert seen[:2] == [(True, 0), (False, 1)]
    [item] = model.tokenize([with_image(0)])
    new = ids[0, len(item.ids) :].tolist()
    stop = model.tokenizer.eos_token_id
    new = new[: new.index(stop)] if stop in new else new
    assert cached == [model.text.decode_reply(item, new)]
    assert cached != model.generate([with_image(0)], max_new_tokens=6)


@every_family
def test_spans_say_what_each_token_is_by_the_text_with_the_marker(family):
    model = tiny_vlms.load(family)
    [item] = model.tokenize([with_image(2, REPLY)])
    marker = model.images.marker
    assert item.text.count(marker) == 1
    at = item.text.index(marker)
    image = item.roles == ROLES.index("image")
    assert (item.ids[image] == model.images.token_id).all()
    assert (item.ids == model.images.token_id).sum() == image.sum() > 0
    assert item.offsets[image].tolist() == [[at, at + len(marker)]] * int(image.sum())
    assert item.special[image].all()
    for role, words in (("user", PROMPT), ("response", REPLY)):
        spans = item.offsets[item.roles == ROLES.index(role)]
        assert "".join(item.text[start:end] for start, end in spans) == words
    first = int(np.flatnonzero(item.roles == ROLES.index("response"))[0])
    assert (item.response_start, item.straddles) == (first, False)
    batch = model.collate([item])
    assert batch.image[0].tolist() == image.tolist()
    assert batch.response[0].nonzero()[0] == first
    stretches = [span.role for span in item.spans if span.role != "special"]
    assert stretches[-2:] == ["user", "response"]
    assert set(stretches[:-2]) == {"image"}


@every_family
def test_a_marker_that_is_written_is_not_doubled(family):
    model = tiny_vlms.load(family)
    marker = model.images.marker
    written = with_image(0, prompt=f"Look: {marker} here", raw=True)
    spread, given, none = model.tokenize([with_image(0, raw=True), written, MIXED[1]])
    for item in (spread, given):
        assert item.text.count(marker) == 1
        assert item.status == "ok"
    same = (given.ids == model.images.token_id).sum()
    assert same == (spread.ids == model.images.token_id).sum()
    words = given.offsets[given.roles == ROLES.index("user")]
    assert "".join(given.text[start:end] for start, end in words) == "Look:  here"
    if model.tokenizer.chat_template:
        [chat] = model.tokenize([replace(written, raw=False)])
        assert (chat.status, chat.text.count(marker)) == ("ok", 1)
    assert marker not in none.text
