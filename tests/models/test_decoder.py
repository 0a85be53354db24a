"""Collating, replying and the checks of one model; what all families share is in contracts."""

import logging

import pytest
import torch
from torch import nn

import tiny_models
from saefty.errors import ConfigError, InputError, MismatchError
from saefty.models.decoder import Decoder
from saefty.records import Example, Message, Site


@pytest.fixture
def model():
    return tiny_models.load("llama")


def raw(name, text, response=None):
    return Example(name, text, response, raw=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_two_padded_by_hand(model, side):
    items = model.tokenize([raw("a", "the dog jumps"), raw("b", "the", " dog")])
    short, long = items[1].ids.tolist(), items[0].ids.tolist()
    pad = [model.tokenizer.pad_token_id] * (len(long) - len(short))
    batch = model.collate(items, side=side)
    n, gap = len(short), len(pad)
    assert batch.ids[0].tolist() == long
    real, none = [True] * n, [False] * gap
    positions = list(range(n))
    response = [False] * items[1].response_start
    response += [True] * (n - len(response))
    if side == "left":
        assert batch.ids[1].tolist() == pad + short
        assert batch.mask[1].tolist() == none + real
        assert batch.position_ids[1].tolist() == [0] * gap + positions
        assert batch.response[1].tolist() == none + response
    else:
        assert batch.ids[1].tolist() == short + pad
        assert batch.mask[1].tolist() == real + none
        assert batch.position_ids[1][:n].tolist() == positions
        assert batch.response[1].tolist() == response + none
    assert batch.special[1][batch.mask[1]].tolist() == items[1].special.tolist()
    assert not batch.response[0].any()


def test_what_is_not_ok_cannot_be_collated(model):
    items = model.tokenize([raw("fine", "the dog"), raw("void", "")])
    with pytest.raises(ValueError, match="example void is empty"):
        model.collate(items)
    with pytest.raises(ValueError, match="there are no examples"):
        model.collate([])


def test_no_sites_need_no_forward(model):
    assert model.capture(model.collate(model.tokenize([raw("a", "the dog")])), []) == {}


@pytest.mark.parametrize("layer", [3, -1])
def test_reading_and_editing_refuse_a_layer_out_of_range(model, layer):
    batch = model.collate(model.tokenize([raw("a", "the dog")]))
    with pytest.raises(ConfigError, match=r"layers run 0\.\.2"):
        model.capture(batch, [Site(layer)])
    with (
        pytest.raises(ConfigError, match=r"layers run 0\.\.2"),
        model.intervene(Site(layer), lambda x, positions: x),
    ):
        pass


def test_replies_ignore_the_responses_given(model):
    bare = Example("a", "Hi there")
    given = Example("a", "Hi there", "I cannot help.")
    turns = (Message("user", "Hi there"), Message("assistant", "I cannot help."))
    chat = Example("a", "", messages=turns)
    replies = model.generate([bare, given, chat], max_new_tokens=6)
    assert replies[0] == replies[1] == replies[2]


def test_a_reply_ends_before_the_end_of_text(model):
    prompt = raw("a", "the dog")
    stop = model.tokenizer.eos_token_id

    def always_end(module, args, output):
        output[..., stop] = 1e4
        return output

    handle = model.model.lm_head.register_forward_hook(always_end)
    assert model.generate([prompt], max_new_tokens=5) == [""]
    handle.remove()


def test_rows_that_end_early_do_not_disturb_the_others(model):
    """One of three rows is made to end after its first token; the others' replies stay."""
    prompts = [raw(str(i), "the dog " * (i + 1)) for i in range(3)]
    plain = model.generate(prompts, max_new_tokens=6)
    stop, steps = model.tokenizer.eos_token_id, []

    def end_second_row(module, args, output):
        steps.append(0)
        if len(steps) == 2:
            output[1, :, stop] = 1e4
        return output

    handle = model.model.lm_head.register_forward_hook(end_second_row)
    cut = model.generate(prompts, max_new_tokens=6)
    handle.remove()
    assert (cut[0], cut[2]) == (plain[0], plain[2])
    assert plain[1].startswith(cut[1])
    assert len(cut[1]) < len(plain[1])


def test_a_reply_stops_at_the_end_of_the_context_and_says_so(model, caplog):
    prompt = raw("a", "the dog " * 31)
    n = len(model.tokenize([prompt])[0].ids)
    room = model.max_length - n
    assert 0 < room < 50
    with caplog.at_level(logging.WARNING):
        reply = model.generate([prompt], max_new_tokens=50)[0]
    assert reply == model.generate([prompt], max_new_tokens=room)[0]
    assert "1 replies may be cut by the context" in caplog.text


@pytest.mark.parametrize(("text", "status"), [("", "empty"), ("the dog " * 200, "too_long")])
def test_a_prompt_that_cannot_be_read_is_named(model, text, status):
    with pytest.raises(InputError, match=f"example e5 .* prompt is {status}"):
        model.generate([raw("fine", "the dog"), raw("e5", text)], max_new_tokens=3)


def test_generating_nothing_gives_empty_replies(model):
    assert model.generate([], max_new_tokens=3) == []
    assert model.generate([raw("a", "the dog")], max_new_tokens=0) == [""]


def test_sampled_tokens_follow_the_model_s_probabilities(model):
    """The first sampled token over 2,000 streams against the softmax, by a chi-square bound."""
    prompt = "the dog"
    batch = model.collate(model.tokenize([raw("a", prompt)]))
    p = model.logits(batch)[0, -1].double().softmax(-1)
    examples = [raw(str(i), prompt) for i in range(2000)]
    items = model.tokenize(examples)
    from saefty.models.replies import choose, stream

    logits = model.logits(model.collate(items[:1]))[:, -1].float().repeat(2000, 1)
    drawn = choose(logits, 1.0, [stream(0, e.id) for e in examples])
    counts = torch.bincount(drawn, minlength=len(p)).double()
    often = p * 2000 >= 5
    expected = torch.cat([p[often], p[~often].sum()[None]]) * 2000
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    statistic = float(((seen - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_low_temperature_is_nearly_greedy(model):
    prompts = [raw(str(i), "the dog " * (i + 1)) for i in range(3)]
    cold = model.generate(prompts, max_new_tokens=5, temperature=1e-4)
    assert cold == model.generate(prompts, max_new_tokens=5)


def test_a_family_whose_parts_do_not_add_up_refuses_them(model):
    """A block that scales what its MLP adds (as Granite does) is found out by arithmetic."""

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.self_attn, self.mlp = inner.self_attn, inner.mlp
            self.input_layernorm = inner.input_layernorm
            self.post_attention_layernorm = inner.post_attention_layernorm

        def forward(self, x, **kwargs):
            x = x + self.self_attn(self.input_layernorm(x), **kwargs)[0]
            return x + 0.3 * self.mlp(self.post_attention_layernorm(x))

    import copy

    other = copy.deepcopy(model.model)
    other.model.layers = nn.ModuleList(Scaled(block) for block in other.model.layers)
    decoder = Decoder(other, model.tokenizer, model.info, {})
    batch = decoder.collate(decoder.tokenize([raw("a", "the dog")]))
    assert decoder.capture(batch, [Site(1)])[Site(1)].isfinite().all()
    with pytest.raises(MismatchError, match=r"mlp_out cannot be read.*do not add up"):
        decoder.capture(batch, [Site(1, "mlp_out")])
