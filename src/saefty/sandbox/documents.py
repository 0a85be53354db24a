"""A document of the sandbox: its words, who says them, and everything that is true of it."""

from dataclasses import dataclass

from saefty.records import Example, Message
from saefty.sandbox.lexicon import Word


@dataclass(frozen=True)
class Token:
    """One word of a document, with its characters [start, end) in the document's text."""

    word: str
    start: int
    end: int
    language: str
    topic: str
    role: str
    pos: str
    is_number: bool


@dataclass(frozen=True)
class Turn:
    """The words one side says; `role` is system, user, assistant, or text for stories."""

    role: str
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """The words with a space between them."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Document:
    """One document and what is true of it; what does not apply to its kind is None or empty."""

    id: str
    kind: str
    language: str
    topic: str
    turns: tuple[Turn, ...]
    verb_class: int | None = None
    object_class: int | None = None
    pair: str | None = None
    harmful: bool | None = None
    borderline: bool = False
    refused: bool | None = None
    persona: str = ""
    claim_wrong: bool | None = None
    sycophantic: bool | None = None

    @property
    def text(self) -> str:
        """All turns with a space between them: the document without a chat template."""
        return " ".join(turn.text for turn in self.turns)

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Every word with its place in `text`."""
        tokens: list[Token] = []
        start = 0
        for turn in self.turns:
            for w in turn.words:
                end = start + len(w.text)
                tokens.append(
                    Token(w.text, start, end, w.language, w.topic, turn.role, w.pos, w.is_number)
                )
                start = end + 1
        return tuple(tokens)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns of a conversation; none for stories and captions."""
        spoken = [turn for turn in self.turns if turn.role != "text"]
        return tuple(Message(turn.role, turn.text) for turn in spoken)

    def example(self, *, response: bool = True) -> Example:
        """Return the record that the stages read; label True is harmful, group the word pair.

        Args:
            response: Whether the answer goes with it, or only what it answers.
        """
        said = {turn.role: turn.text for turn in self.turns}
        messages = tuple(m for m in self.messages if response or m.role != "assistant")
        return Example(
            id=self.id,
            prompt=said.get("user", said.get("text", "")),
            response=said.get("assistant") if response else None,
            messages=messages if "system" in said else None,
            label=self.harmful,
            group=self.pair,
            source="sandbox",
            raw=self.kind in ("story", "caption"),
        )
