"""Text to tokens: chat template, exactly one BOS, and what each token is, by character offsets.

The text of an example is tokenised once, as a whole: tokenising prompt and response apart gives
other tokens at the border. What a token is (user, response, ...) follows from the characters it
covers, so it holds for byte-level tokens, for several tokens within one character, and for
templates that add words of their own. A token that covers characters on both sides of the border
belongs to the response.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from saefty.errors import InputError
from saefty.models.base import Status, TokenizedExample
from saefty.models.chat import ChatRenderer, Rendered
from saefty.records import ROLES, Example

SPACE_MARKS = ("Ġ", "▁", " ")
"""How a token's own spelling begins when it holds the space before its word."""


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
        self._is_special = np.zeros(max(len(tokenizer), 1 + max(self.special_ids, default=0)), bool)
        self._is_special[self.special_ids] = True
        self.render = ChatRenderer(tokenizer, name)

    def __call__(
        self, examples: Sequence[Example], truncate: Literal["never", "left", "right"] = "never"
    ) -> list[TokenizedExample]:
        """Return each example as tokens, in order.

        Raises:
            InputError: If the chat template refuses a conversation.
        """
        rendered = [self.render(example) for example in examples]
        return [
            self._assemble(example, text, *encoded, truncate)
            for example, text, encoded in zip(
                examples, rendered, self._encode(rendered), strict=True
            )
        ]

    def _encode(
        self, rendered: Sequence[Rendered]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids and the character offsets of each text."""
        encoded: list[Any] = [None] * len(rendered)
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
        return encoded

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
        special = self._is_special[ids]
        offsets = self._untrimmed(ids, offsets, special)
        roles = _roles(rendered, offsets, special)
        response_start, straddles = self._response(rendered, offsets)
        kept, too_long = self._kept(ids, offsets, special, truncate)
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
        self,
        ids: Int[np.ndarray, "tokens"],
        offsets: Int[np.ndarray, "tokens 2"],
        special: Bool[np.ndarray, "tokens"],
        truncate: str,
    ) -> tuple[Int[np.ndarray, "kept"], bool]:
        """Return which tokens are left, and whether they are still too many.

        What the tokenizer puts around a text stays: special tokens that are not in the text.
        """
        n, everything = len(ids), np.arange(len(ids))
        if n <= self.max_length or truncate == "never":
            return everything, n > self.max_length
        inside = np.flatnonzero(~special | (offsets[:, 0] < offsets[:, 1]))
        head, tail = (int(inside[0]), n - 1 - int(inside[-1])) if len(inside) else (0, 0)
        head = max(head, int(ids[0] == self.bos))
        middle, room = everything[head : n - tail], max(self.max_length - head - tail, 0)
        middle = middle[:room] if truncate == "right" else middle[len(middle) - room :]
        return np.concatenate([everything[:head], middle, everything[n - tail :]]), False


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
