"""An example as one text: the chat template applied, and which characters were written by whom.

Where contents lie in a rendered chat is found by rendering marks in their place once for each
sequence of roles: what stands around the marks is the template's. It holds for templates that trim
contents, that move the system turn (Mistral's stands in the last user turn), and that add words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jinja2

from saefty.errors import InputError
from saefty.records import Example, Message

_MARK = "\ue000{}\ue001"  # private-use characters, which no template treats specially

_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24')"
    " | replace('%A', 'Friday') | replace('%a', 'Fri') | replace('%H', '00')"
    " | replace('%M', '00') | replace('%S', '00') }}{% endmacro %}"
)
"""Stands in front of a template that writes today's date: the same texts must give the same tokens
on any day. The date is the one that Llama 3's template writes where it cannot know the day."""


@dataclass(frozen=True)
class Rendered:
    """An example's text, and which of its characters were written by whom."""

    text: str
    parts: tuple[tuple[int, int, str], ...]
    """(start, end, role) of every content, in order; what lies between is the template's."""
    templated: bool


@dataclass(frozen=True)
class _Scaffold:
    """What a template writes around the contents of a sequence of roles."""

    order: tuple[int, ...]
    """Indices of the turns, in the order in which their contents stand in the text."""
    pieces: tuple[str, ...]
    """What stands before, between and after the contents."""


def conversation(example: Example) -> tuple[Message, ...]:
    """Return an example's turns: its messages, or its prompt; then its response."""
    turns = example.messages or (Message("user", example.prompt),)
    if example.response is None or turns[-1] == Message("assistant", example.response):
        return turns
    return (*turns, Message("assistant", example.response))


def with_response(example: Example, response: str | None) -> Example:
    """Return an example with another response, or with none, to be replied to."""
    turns = example.messages
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return replace(example, response=response, messages=turns or None)


class ChatRenderer:
    """Turn examples into text with one tokenizer's chat template.

    Args:
        tokenizer: A tokenizer of transformers.
        name: The model's name, for messages.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._scaffold = lru_cache(maxsize=256)(self._render_marks)

    def __call__(self, example: Example) -> Rendered:
        """Return the text to tokenise.

        Raises:
            InputError: If the chat template refuses the conversation, or there is none for it.
        """
        turns = conversation(example)
        if self._templated(example):
            return self._render_chat(example, turns)
        if len(turns) > 2 or turns[0].role != "user" or turns[-1].role not in {"user", "assistant"}:
            raise InputError(
                f"example {example.id} is a conversation of {len(turns)} turns "
                f"({', '.join(turn.role for turn in turns)}), but the tokenizer of {self.name} has "
                f"no chat template{' in use (raw)' if example.raw else ''}.",
                then="Use a chat model, or give prompt and response instead of messages.",
            )
        return self._render_plain(example, turns)

    def _templated(self, example: Example) -> bool:
        return not example.raw and bool(self.tokenizer.chat_template)

    def _render_plain(self, example: Example, turns: tuple[Message, ...]) -> Rendered:
        parts, text = [], ""
        for turn, role in zip(turns, ("user", "response"), strict=False):
            parts.append((len(text), len(text) + len(turn.content), role))
            text += turn.content
        return Rendered(text, tuple(parts), templated=False)

    def _image_turn(self, example: Example, turns: tuple[Message, ...]) -> int | None:
        """Return the turn before whose text the template writes an image; None if none does."""
        return None

    def _content(self, turn: Message, with_image: bool) -> Any:
        """Return a turn's content as the template takes it."""
        return turn.content

    def _render_chat(self, example: Example, turns: tuple[Message, ...]) -> Rendered:
        image = self._image_turn(example, turns)
        text = self._apply(turns, example.id, image)
        scaffold = self._scaffold(tuple(turn.role for turn in turns), image)
        order = scaffold.order if scaffold else range(len(turns))
        contents = [turns[i].content for i in order]
        roles = [_role_of(turns[i], last=i == len(turns) - 1) for i in order]
        pieces = scaffold.pieces if scaffold else None
        found = _between(text, pieces, contents) or _one_by_one(text, pieces, contents)
        if found is None:
            raise InputError(
                f"the chat template of {self.name} rewrites example {example.id}, so that what was "
                "written cannot be told from what the template adds.",
                then="Remove the template's own markup (such as <think>) from the texts, or pass "
                "the finished text as raw.",
            )
        parts = tuple((start, end, role) for (start, end), role in zip(found, roles, strict=True))
        return Rendered(text, parts, templated=True)

    def _apply(self, turns: Sequence[Message], example_id: str, image: int | None) -> str:
        template = self.tokenizer.chat_template
        if isinstance(template, str) and "strftime_now" in template:
            template = _FIXED_DATE + template
        else:
            template = None  # the tokenizer's own, chosen by transformers where there are several
        try:
            return self.tokenizer.apply_chat_template(
                [
                    {"role": turn.role, "content": self._content(turn, i == image)}
                    for i, turn in enumerate(turns)
                ],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=turns[-1].role != "assistant",
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise InputError(
                f"the chat template of {self.name} refuses example {example_id} (turns: "
                f"{', '.join(turn.role for turn in turns)}): {error}",
                then="Change the conversation's turns, or pass the finished text as raw.",
            ) from error

    def _render_marks(self, roles: tuple[str, ...], image: int | None) -> _Scaffold | None:
        """Return what the template puts around contents of these roles; None if it drops one."""
        marks = [_MARK.format(i) for i in range(len(roles))]
        turns = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
        rest, pieces = self._apply(turns, "with marks for contents", image), []
        if any(mark not in rest for mark in marks):
            return None
        order = sorted(range(len(roles)), key=lambda i: rest.index(marks[i]))
        for i in order:
            before, _, rest = rest.partition(marks[i])
            pieces.append(before)
        return _Scaffold(tuple(order), (*pieces, rest))


def _role_of(turn: Message, *, last: bool) -> str:
    if turn.role == "assistant" and last:
        return "response"
    return turn.role if turn.role in {"system", "assistant"} else "user"


def _between(
    text: str, pieces: tuple[str, ...] | None, contents: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Return where the contents lie if `text` is exactly the pieces with them between.

    Templates may strip a content's spaces, and nothing else.
    """
    if pieces is None or not text.startswith(pieces[0]):
        return None
    found, at = [], len(pieces[0])
    for whole, after in zip(contents, pieces[1:], strict=True):
        for content in (whole, whole.strip()):
            if text.startswith(content + after, at):
                found.append((at, at + len(content)))
                at += len(content) + len(after)
                break
        else:
            return None
    return found if at == len(text) else None


def _one_by_one(
    text: str, pieces: tuple[str, ...] | None, contents: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Return where the contents lie, searching each from the end of the one before.

    For templates whose own words depend on a content. Not for contents that those words hold.
    """
    found, at = [], 0
    for whole in contents:
        content = whole.strip()
        start = text.find(content, at)
        if start < 0 or not content or any(content in piece for piece in pieces or ()):
            return None
        at = start + len(content)
        found.append((start, at))
    return found
