"""Text to tokens: chat template, exactly one BOS, and what each token is, by character offsets.

The text of an example is tokenised once, as a whole: tokenising prompt and response apart gives
other tokens at the border. What a token is (user, response, ...) follows from the characters it
covers, so it holds for byte-level tokens, for several tokens within one character, and for
templates that add words of their own. A token that covers characters on both sides of the border
belongs to the response.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import jinja2
import numpy as np
from jaxtyping import Bool, Int

from saefty.errors import InputError
from saefty.models.base import Status, TokenizedExample
from saefty.records import ROLES, Example, Message

SPACE_MARKS = ("Ġ", "▁", " ")
"""How a token's own spelling begins when it holds the space before its word."""

_SENTINEL = "\ue000{}\ue001"  # private-use characters, which no template treats specially


@dataclass(frozen=True)
class Rendered:
    """An example's text, and which of its characters were written by whom."""

    text: str
    parts: tuple[tuple[int, int, str], ...]
    """(start, end, role) of every content, in order; what lies between is the template's."""
    templated: bool


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


class TextEncoder:
    """Tokenise examples with one tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers.
        name: The model's name, for messages.
        max_length: The longest sequence the model takes, in tokens.

    Raises:
        InputError: If the tokenizer is a slow one, which cannot give character offsets.
    """

    def __init__(self, tokenizer: Any, name: str, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {name} ({type(tokenizer).__name__}) gives no character offsets.",
                then="Save it as a fast tokenizer (a folder with tokenizer.json).",
            )
        self.tokenizer = tokenizer
        self.name = name
        self.max_length = max_length
        self.bos = tokenizer.bos_token_id
        self.special_ids = find_special_ids(tokenizer)
        self._scaffold = lru_cache(maxsize=256)(self._render_sentinels)

    def __call__(
        self, examples: Sequence[Example], truncate: Literal["never", "left", "right"] = "never"
    ) -> list[TokenizedExample]:
        """Return each example as tokens, in order.

        Raises:
            InputError: If the chat template refuses a conversation.
        """
        rendered = [self.render(example) for example in examples]
        encoded: list[Any] = [None] * len(examples)
        for templated in (True, False):
            chosen = [i for i, text in enumerate(rendered) if text.templated is templated]
            if chosen:
                batch = self.tokenizer(
                    [rendered[i].text for i in chosen],
                    add_special_tokens=not templated,
                    return_offsets_mapping=True,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    truncation=False,
                    verbose=False,
                )
                for row, i in enumerate(chosen):
                    encoded[i] = (batch["input_ids"][row], batch["offset_mapping"][row])
        return [
            self._assemble(example, text, ids, offsets, truncate)
            for example, text, (ids, offsets) in zip(examples, rendered, encoded, strict=True)
        ]

    def decode_reply(self, item: TokenizedExample, ids: Sequence[int]) -> str:
        """Return the text of tokens that were generated behind a prompt, special ones left out.

        The reply is decoded as a whole. Without a template it is what continues the prompt's text,
        so that prompt + reply is the text again, a space between them included.
        """
        if not (self.tokenizer.chat_template and not item.example.raw):
            before, both = self._decode(item.ids.tolist()), self._decode([*item.ids.tolist(), *ids])
            if both.startswith(before):
                return both[len(before) :]
        return self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render(self, example: Example) -> Rendered:
        """Return the text to tokenise.

        Raises:
            InputError: If the chat template refuses the conversation, or there is none for it.
        """
        turns = conversation(example)
        if not example.raw and self.tokenizer.chat_template:
            return self._render_chat(example, turns)
        if len(turns) > 2 or turns[0].role != "user" or turns[-1].role not in {"user", "assistant"}:
            raise InputError(
                f"example {example.id} is a conversation of {len(turns)} turns, but the tokenizer "
                f"of {self.name} has no chat template{' in use (raw)' if example.raw else ''}.",
                then="Use a chat model, or give prompt and response instead of messages.",
            )
        parts, text = [], ""
        for turn, role in zip(turns, ("user", "response"), strict=False):
            parts.append((len(text), len(text) + len(turn.content), role))
            text += turn.content
        return Rendered(text, tuple(parts), templated=False)

    def _render_chat(self, example: Example, turns: tuple[Message, ...]) -> Rendered:
        text = self._apply(turns, example.id)
        roles = [_role_of(turn, last=turn is turns[-1]) for turn in turns]
        scaffold = self._scaffold(tuple(turn.role for turn in turns))
        found = _between(text, scaffold, turns) or _one_by_one(text, scaffold, turns)
        if found is None:
            raise InputError(
                f"the chat template of {self.name} rewrites example {example.id}, so that what was "
                "written cannot be told from what the template adds.",
                then="Remove the template's own markup (such as <think>) from the texts, or pass "
                "the finished text as raw.",
            )
        parts = tuple((start, end, role) for (start, end), role in zip(found, roles, strict=True))
        return Rendered(text, parts, templated=True)

    def _apply(self, turns: Sequence[Message], example_id: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                tokenize=False,
                add_generation_prompt=turns[-1].role != "assistant",
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise InputError(
                f"the chat template of {self.name} refuses example {example_id} (turns: "
                f"{', '.join(turn.role for turn in turns)}): {error}",
                then="Change the conversation's turns, or pass the finished text as raw.",
            ) from error

    def _render_sentinels(self, roles: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return what the template puts before, between and after contents of these roles."""
        marks = [_SENTINEL.format(i) for i in range(len(roles))]
        turns = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
        rest, pieces = self._apply(turns, "with marks for contents"), []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            pieces.append(before)
        return (*pieces, rest)

    def _assemble(
        self,
        example: Example,
        rendered: Rendered,
        id_list: list[int],
        offset_list: list[tuple[int, int]],
        truncate: str,
    ) -> TokenizedExample:
        ids = np.array(id_list, dtype=np.int32)
        offsets = np.array(offset_list, dtype=np.int32).reshape(-1, 2)
        ids, offsets = self._with_one_bos(ids, offsets, add=not rendered.templated)
        special = np.isin(ids, self.special_ids)
        offsets = self._untrimmed(ids, offsets, special)
        roles = _roles(rendered, offsets, special)
        response_start, straddles = self._response(rendered, offsets)
        kept, too_long = self._kept(ids, truncate)
        if response_start is not None:
            behind = np.flatnonzero(kept >= response_start)
            response_start = int(behind[0]) if len(behind) else None
        roles, special = roles[kept], special[kept]
        status: Status = "ok"
        if too_long:
            status = "too_long"
        elif special.all() or (
            example.response is not None and not (roles == ROLES.index("response")).any()
        ):
            status = "empty"
        return TokenizedExample(
            example=example,
            text=rendered.text,
            ids=ids[kept],
            offsets=offsets[kept],
            roles=roles,
            special=special,
            response_start=response_start,
            straddles=straddles,
            truncated=len(kept) < len(ids),
            status=status,
        )

    def _with_one_bos(
        self, ids: Int[np.ndarray, "before"], offsets: Int[np.ndarray, "before 2"], add: bool
    ) -> tuple[Int[np.ndarray, "after"], Int[np.ndarray, "after 2"]]:
        """Return the tokens led by one BOS where the tokenizer has one.

        Text is given one if the tokenizer did not add it (GPT-2's never does). A template decides
        for itself whether to write one. Where text spells out a BOS behind one that was added, the
        added one goes.
        """
        if self.bos is None:
            return ids, offsets
        leading = int(np.argmin(np.append(ids == self.bos, False)))
        if leading > 1:
            ids, offsets = ids[leading - 1 :], offsets[leading - 1 :]
        elif leading == 0 and add:
            ids = np.concatenate([np.array([self.bos], dtype=np.int32), ids])
            offsets = np.concatenate([np.zeros((1, 2), dtype=np.int32), offsets])
        assert len(ids) < 2 or (ids[:2] != self.bos).any()
        return ids, offsets

    def _response(
        self, rendered: Rendered, offsets: Int[np.ndarray, "tokens 2"]
    ) -> tuple[int | None, bool]:
        """Return the response's first token, and whether it holds the prompt's last characters."""
        border = next(
            (start for start, end, r in rendered.parts if r == "response" and end > start),
            None,
        )
        if border is None:
            return None, False
        behind = np.flatnonzero(offsets[:, 1] > border)
        if not len(behind):
            return None, False
        first = int(behind[0])
        return first, bool(offsets[first, 0] < border)

    def _untrimmed(
        self,
        ids: Int[np.ndarray, "tokens"],
        offsets: Int[np.ndarray, "tokens 2"],
        special: Bool[np.ndarray, "tokens"],
    ) -> Int[np.ndarray, "tokens 2"]:
        """Return the offsets with the space that a token holds counted as its own.

        Byte-level tokenizers may trim offsets: " word" has the span of "word", and a lone space an
        empty one. A token's spelling tells whether the space before it is part of it.
        """
        starts, ends = offsets.T.copy()
        inside = ~special & self._holds_space[ids]
        ends[inside & (ends == 0)] = 1  # a lone space that begins the text is reported as (0, 0)
        covered = np.maximum.accumulate(np.append(0, ends)[:-1])
        gap = inside & (starts > covered)
        starts[gap] = covered[gap]
        return np.stack([starts, ends], axis=1)

    @cached_property
    def _holds_space(self) -> Bool[np.ndarray, "vocab"]:
        spellings = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        return np.array([(token or "").startswith(SPACE_MARKS) for token in spellings])

    def _kept(
        self, ids: Int[np.ndarray, "tokens"], truncate: str
    ) -> tuple[Int[np.ndarray, "kept"], bool]:
        n, everything = len(ids), np.arange(len(ids))
        if n <= self.max_length or truncate == "never":
            return everything, n > self.max_length
        if truncate == "right":
            return everything[: self.max_length], False
        head = int(ids[0] == self.bos)  # a leading BOS stays
        return np.concatenate([everything[:head], everything[n - self.max_length + head :]]), False


def find_special_ids(tokenizer: Any) -> Int[np.ndarray, "ids"]:
    """Return the ids of special tokens: the named ones and those the tokenizer marks as special.

    The token for unknown words is not among them: it stands for something that was written.
    """
    ids = set(tokenizer.all_special_ids)
    ids |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if tokenizer.unk_token_id not in named:
        ids.discard(tokenizer.unk_token_id)
    return np.array(sorted(ids), dtype=np.int64)


def _role_of(turn: Message, *, last: bool) -> str:
    if turn.role == "assistant" and last:
        return "response"
    return turn.role if turn.role in {"system", "assistant"} else "user"


def _between(
    text: str, scaffold: tuple[str, ...] | None, turns: Sequence[Message]
) -> list[tuple[int, int]] | None:
    """Return where the contents lie if `text` is exactly the scaffold filled with them.

    Templates may strip a content's spaces, and nothing else.
    """
    if scaffold is None or not text.startswith(scaffold[0]):
        return None
    found, at = [], len(scaffold[0])
    for turn, after in zip(turns, scaffold[1:], strict=True):
        for content in (turn.content, turn.content.strip()):
            if text.startswith(content + after, at):
                found.append((at, at + len(content)))
                at += len(content) + len(after)
                break
        else:
            return None
    return found if at == len(text) else None


def _one_by_one(
    text: str, scaffold: tuple[str, ...] | None, turns: Sequence[Message]
) -> list[tuple[int, int]] | None:
    """Return where the contents lie, searching each from the end of the one before.

    For templates whose own words depend on a content. Not for contents that those words hold.
    """
    found, at = [], 0
    for turn in turns:
        content = turn.content.strip()
        start = text.find(content, at)
        if start < 0 or not content or any(content in piece for piece in scaffold or ()):
            return None
        at = start + len(content)
        found.append((start, at))
    return found


def _roles(
    rendered: Rendered,
    offsets: Int[np.ndarray, "tokens 2"],
    special: Bool[np.ndarray, "tokens"],
) -> Int[np.ndarray, "tokens"]:
    roles = np.full(len(offsets), ROLES.index("special"), dtype=np.int8)
    for start, end, role in rendered.parts:
        inside = (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        roles[inside] = ROLES.index(role)
    roles[special] = ROLES.index("special")
    return roles
