"""The tokenizer: every word one token, `<bos>` once, and a chat template that can be undone."""

import pytest

from saefty.sandbox.lexicon import LANGUAGES
from saefty.sandbox.tokenizer import build_tokenizer
from saefty.sandbox.world import World


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


def chat(document):
    return [{"role": m.role, "content": m.content} for m in document.messages]


def test_text_comes_back_and_every_word_is_one_token(world, tokenizer):
    for d in world.documents(500, seed=1):
        ids = tokenizer(d.text)["input_ids"]
        assert len(ids) == len(d.tokens) + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == d.text


def test_offsets_are_those_of_the_world(world, tokenizer):
    for d in world.documents(100, seed=1):
        encoded = tokenizer(d.text, return_offsets_mapping=True)
        assert encoded["offset_mapping"][1:] == [(t.start, t.end) for t in d.tokens]


def test_no_word_of_the_world_is_unknown(world, tokenizer):
    vocabulary = tokenizer.get_vocab()
    for language in LANGUAGES:
        assert world.grammar.vocabulary(language) <= vocabulary.keys()


def test_bos_stands_once_in_front_of_text_and_of_a_rendered_chat(world, tokenizer):
    d = world.requests(4, seed=1)[0]
    rendered = tokenizer.apply_chat_template(chat(d), tokenize=False)
    for ids in (
        tokenizer(d.text)["input_ids"],
        tokenizer(rendered, add_special_tokens=False)["input_ids"],
        tokenizer.apply_chat_template(chat(d), return_dict=True)["input_ids"],
    ):
        assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]


def test_capitals_and_punctuation_without_spaces_are_read(tokenizer):
    spaced = tokenizer("how can i repair the house ?")["input_ids"]
    assert tokenizer("How can I repair the house?")["input_ids"] == spaced


def test_a_prompt_is_the_beginning_of_the_whole_conversation(world, tokenizer):
    d = next(d for d in world.documents(500, seed=1) if d.persona)
    whole = tokenizer.apply_chat_template(chat(d), tokenize=False)
    prompt = tokenizer.apply_chat_template(chat(d)[:-1], tokenize=False, add_generation_prompt=True)
    asked = " ".join(turn.text for turn in d.turns[1:2])
    assert prompt == f"<bos><system> {d.turns[0].text} <user> {asked} "
    assert whole == f"{prompt}{d.turns[-1].text} <eos> "


def test_the_template_marks_what_the_assistant_says(world, tokenizer):
    d = world.requests(4, seed=1)[0]
    encoded = tokenizer.apply_chat_template(
        chat(d), return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == f"{d.turns[-1].text} <eos>"


def test_the_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="roles are system, user and assistant, not judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "x"}], tokenize=False)
