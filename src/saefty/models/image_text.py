"""Text with an image in it to tokens: exactly one marker, and what each of its tokens is.

A marker stands for the image in the text, and the processor puts the image's tokens in its place:
one for each patch, and with some families row ends, corners and blank lines. The text is tokenised
with them in it, as the processor does, and told of without: `TokenizedExample.text` and its offsets
are those of the text with the marker, whose span all of the image's tokens share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from saefty.errors import InputError
from saefty.images import BadImageError, load_image
from saefty.models.base import OF_TEXT, TokenizedExample
from saefty.models.chat import ChatRenderer, Rendered
from saefty.models.processors import ImageReader
from saefty.models.text import TextEncoder
from saefty.records import ROLES, Example, Message

_TRIAL = "\ue000?\ue001"


class ImageChatRenderer(ChatRenderer):
    """Turn examples into text with one marker for each that has an image.

    A marker that is written in the prompt or the messages is left where it is. Otherwise one is put
    before the first user turn's text, by the template where it knows of images.

    Args:
        tokenizer: A tokenizer of transformers.
        name: The model's name, for messages.
        images: What the checkpoint's processor makes of images.
    """

    def __init__(self, tokenizer: Any, name: str, images: ImageReader) -> None:
        super().__init__(tokenizer, name)
        self.images = images
        self._by_role: dict[str, bool] = {}

    def _takes_parts(self, role: str) -> bool:
        """Return whether the template takes a role's contents as lists of images and texts.

        Some take lists from users and texts from the system, and write a list as Python would.
        """
        if role not in self._by_role:
            self._by_role[role] = True  # for this trial
            turns = [Message(role, _TRIAL)]
            if role == "system":
                turns.append(Message("user", "?"))
            elif role != "user":
                turns.insert(0, Message("user", "?"))
            try:
                text = self._apply(turns, "of one image", 0 if role == "user" else None)
            except (InputError, TypeError):  # a template made for texts adds a list to one
                text = ""
            markers = text.count(self.images.marker)
            self._by_role[role] = _TRIAL in text and markers == int(role == "user")
        return self._by_role[role]

    def _image_turn(self, example: Example, turns: tuple[Message, ...]) -> int | None:
        if example.image is None or any(self.images.marker in turn.content for turn in turns):
            return None
        return next((i for i, turn in enumerate(turns) if turn.role == "user"), None)

    def _content(self, turn: Message, with_image: bool) -> Any:
        if not self._takes_parts(turn.role):
            return f"{self.images.marker}\n{turn.content}" if with_image else turn.content
        image = [{"type": "image"}] if with_image else []
        return [*image, {"type": "text", "text": turn.content}]

    def _render_plain(self, example: Example, turns: tuple[Message, ...]) -> Rendered:
        """Return prompt and response one behind the other, laid out as the processor does it.

        A prompt that spells out a BOS is taken as it stands.

        Raises:
            InputError: If what was written is not found in what the processor makes of it.
        """
        prompt, marker, bos = turns[0].content, self.images.marker, self.tokenizer.bos_token
        given = marker in prompt
        marked = prompt if given else marker + prompt
        at = marked.rindex(marker) + len(marker)
        finished = bool(bos) and bos in marked
        laid = marked if finished else self.images.laid_out(marked)
        first = laid.find(marked[:at])
        second = laid.find(marked[at:], first + at)
        if first < 0 or second < 0:
            raise InputError(
                f"the processor of {self.name} rewrites example {example.id}, so that what was "
                "written cannot be told from what it adds.",
                then="Write the finished text, BOS included, and pass it as raw.",
            )
        head = (first if given else first + len(marker), first + at)
        tail = (second, second + len(marked) - at)
        if example.image is None and not given:
            laid = laid[:first] + laid[first + len(marker) :]
            head, tail = (first, first), (tail[0] - len(marker), tail[1] - len(marker))
        parts = [(*span, "user") for span in (head, tail)]
        for turn in turns[1:]:
            parts.append((len(laid), len(laid) + len(turn.content), "response"))
            laid += turn.content
        return Rendered(laid, tuple(parts), templated=bool(bos) and bos in laid)


@dataclass(frozen=True)
class _Draft:
    """An example's text before it is tokenised, with the image's tokens in the marker's place."""

    written: Rendered
    """With the marker."""
    full: Rendered
    """With the image's tokens; the same without an image that can be read."""
    start: int = 0
    """Where the marker begins, in both."""
    added: str = ""
    """What stands in its place in `full`."""
    patches: int = 0
    """Patches that the image is cut into."""
    problem: str | None = None
    """Why the image cannot be read, or does not fit the text."""


class ImageTextEncoder(TextEncoder):
    """Tokenise examples that may have an image.

    Args:
        tokenizer: A fast tokenizer of transformers.
        name: The model's name, for messages.
        max_length: The longest sequence the model takes, in tokens.
        images: What the checkpoint's processor makes of images.

    Raises:
        InputError: If the tokenizer is a slow one, which cannot give character offsets.
    """

    def __init__(self, tokenizer: Any, name: str, max_length: int, images: ImageReader) -> None:
        super().__init__(tokenizer, name, max_length)
        self.images = images
        self.render = ImageChatRenderer(tokenizer, name, images)

    def __call__(
        self, examples: Sequence[Example], truncate: Literal["never", "left", "right"] = "never"
    ) -> list[TokenizedExample]:
        """Return each example as tokens, in order.

        Raises:
            InputError: If the chat template refuses a conversation.
        """
        drafts = [self._draft(example) for example in examples]
        encoded = self._encode([draft.full for draft in drafts])
        return [
            self._finish(example, draft, *found, truncate)
            for example, draft, found in zip(examples, drafts, encoded, strict=True)
        ]

    def _draft(self, example: Example) -> _Draft:
        written = self.render(example)
        count, marker = written.text.count(self.images.marker), self.images.marker
        if example.image is None:
            problem = f"{OF_TEXT}has {count} image markers ({marker}), the example no image"
            return _Draft(written, written, problem=problem if count else None)
        if count != 1:
            problem = f"{OF_TEXT}has {count} image markers ({marker}) for one image"
            return _Draft(written, written, problem=problem)
        try:
            added, patches = self.images.made_of(*load_image(example.image).size)
        except BadImageError as error:
            return _Draft(written, written, problem=error.message)
        except ValueError as error:  # Qwen-VL's of a picture 200 times as long as it is wide, say
            problem = f"{example.image}: the model's processor refuses it ({error})"
            return _Draft(written, written, problem=problem)
        start = written.text.index(marker)
        end, shift = start + len(marker), len(added) - len(marker)
        parts = tuple(
            (a + shift * (a >= end), b + shift * (b >= end), role) for a, b, role in written.parts
        )
        text = written.text[:start] + added + written.text[end:]
        full = Rendered(text, parts, written.templated)
        return _Draft(written, full, start, added, patches)

    def _finish(
        self,
        example: Example,
        draft: _Draft,
        ids: list[int],
        offsets: list[tuple[int, int]],
        truncate: str,
    ) -> TokenizedExample:
        item = self._assemble(example, draft.full, ids, offsets, truncate)
        if draft.problem is None and not draft.added:
            if self.images.token_id in item.ids:
                return replace(item, status="bad_image", reason=f"{OF_TEXT}spells an image's token")
            return item
        if draft.problem is not None:
            return replace(item, status="bad_image", reason=draft.problem)
        within, pieces = self._of_image(item, draft)
        if item.truncated:
            whole = self._assemble(example, draft.full, ids, offsets, "never")
            of_image, _ = self._of_image(whole, draft)
            if within.sum() < of_image.sum():
                reason = (
                    f"{len(whole.ids)} tokens, at most {self.max_length}; cutting the text there "
                    f"would cut the {of_image.sum()} tokens of its image"
                )
                return self._told(whole, draft, of_image, "too_long", reason)
        if pieces != int((item.ids == self.images.token_id).sum()):
            return replace(item, status="bad_image", reason=f"{OF_TEXT}spells an image's token")
        return self._told(item, draft, within, item.status, item.reason)

    def _of_image(
        self, item: TokenizedExample, draft: _Draft
    ) -> tuple[Bool[np.ndarray, "tokens"], int]:
        """Return which tokens lie in the marker's place, and how many are parts of the image."""
        starts, ends = item.offsets.T
        within = (starts >= draft.start) & (ends <= draft.start + len(draft.added))
        within &= ends > starts
        return within, int((within & (item.ids == self.images.token_id)).sum())

    def _told(
        self,
        item: TokenizedExample,
        draft: _Draft,
        within: Bool[np.ndarray, "tokens"],
        status: Any,
        reason: str | None,
    ) -> TokenizedExample:
        """Return an example with the image's tokens marked, in characters of what was written."""
        special = item.special | within
        roles = np.where(within, ROLES.index("special"), item.roles).astype(item.roles.dtype)
        roles[within & (item.ids == self.images.token_id)] = ROLES.index("image")
        if status == "ok" and special.all():
            status = "empty"
        return replace(
            item,
            text=draft.written.text,
            offsets=_with_marker(
                item.offsets, draft.start, len(draft.added), len(self.images.marker)
            ),
            roles=roles,
            special=special,
            status=status,
            reason=reason,
            patches=draft.patches,
        )


def _with_marker(
    offsets: Int[np.ndarray, "tokens 2"], start: int, added: int, marker: int
) -> Int[np.ndarray, "tokens 2"]:
    """Return offsets in the text with the marker, for those in the text with the image's tokens.

    A token within the image's has the marker's span; one that reaches out of them covers it.
    """
    first, last = offsets.T
    shift = marker - added
    first = np.where(first < start + added, np.minimum(first, start), first + shift)
    last = np.where(
        last <= start, last, np.where(last <= start + added, start + marker, last + shift)
    )
    return np.stack([first, last], axis=1).astype(offsets.dtype)
