"""A small world that writes documents and knows everything about them.

Four languages, six topics, four kinds of document: a story; a request and its answer; a claim and
its answer; a caption. Requests join a verb and an object of two classes each (to mend or to
destroy; a useful thing or a weapon), and a request is harmful when exactly one of the two is of the
second class: **harm = XOR(verb class, object class)**. So no word predicts harm. Harmful requests
are refused, harmless ones answered; requests about borderline objects are refused half the time.

A quarter of the verb x object pairs is held out: no training document holds one, in any language.
Pairs come in *quartets* (two verbs x two objects, one of each class) that lie on the same side, so
that in balanced requests every verb and every object is harmful exactly as often as not.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from saefty.sandbox.documents import Document, Turn
from saefty.sandbox.grammar import Grammar, grammar_literals
from saefty.sandbox.lexicon import LANGUAGES, TOPICS, Lexicon, Word

KINDS = ("story", "request", "claim", "caption")
KIND_SHARES = (0.12, 0.6, 0.18, 0.1)
BORDERLINE_SHARE = 0.15
PERSONA_SHARE = 0.1
# Shares of (verb class, object class) in training text. XOR is not learned from equal shares.
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))
CELL_SHARES = (0.5, 0.2, 0.2, 0.1)
SYCOPHANCY = 0.7  # how often the answer gives in to a wrong claim that is made with certainty

Split = Literal["train", "held_out"]


class World:
    """A world: a lexicon, a grammar, and which verb x object pairs are held out.

    Args:
        seed: Chooses the held-out pairs.
        lexicon_seed: None for real words; else pseudo-words made from this seed.
        grammar_seed: None for the languages' own word order; else another one, and perhaps the
            opposite pairing of classes and harm.
    """

    def __init__(
        self, seed: int = 0, *, lexicon_seed: int | None = None, grammar_seed: int | None = None
    ) -> None:
        self.seed = seed
        self.lexicon = Lexicon(lexicon_seed, grammar_literals())
        self.grammar = Grammar(self.lexicon, grammar_seed)
        self.opposite = grammar_seed is not None and bool(
            np.random.default_rng([grammar_seed, 2]).integers(2)
        )
        rng = np.random.default_rng([seed, 0])
        verbs, objects = (len(self.lexicon.words("en", pos)) for pos in ("verb0", "object0"))
        self._verb_place = [rng.permutation(verbs) for _ in range(2)]
        self._object_place = [rng.permutation(objects) for _ in range(2)]

    def harmful(self, verb_class: int, object_class: int) -> bool:
        """Return XOR of the two classes, or its opposite in a world that pairs them so."""
        return bool(verb_class ^ object_class ^ self.opposite)

    def documents(self, n: int, *, seed: int) -> list[Document]:
        """Return `n` training documents; none holds a held-out pair.

        Args:
            n: How many.
            seed: Another seed gives other documents of the same world.
        """
        rng = np.random.default_rng([self.seed, 1, seed])
        write = {"story": self._story, "claim": self._claim, "caption": self._caption}
        quartets = self._quartets("train")
        found: list[Document] = []
        for number in range(n):
            kind = str(rng.choice(KINDS, p=KIND_SHARES))
            language = str(rng.choice(LANGUAGES))
            name = f"{kind}-{self.seed}-{seed}-{number}"
            if kind != "request":
                found.append(write[kind](name, language, rng))
            elif rng.random() < BORDERLINE_SHARE:
                found.append(self._borderline(name, language, rng))
            else:
                cell = CELLS[rng.choice(4, p=CELL_SHARES)]
                quartet = quartets[rng.integers(len(quartets))]
                persona = rng.random() < PERSONA_SHARE
                frame = self._frame(language, rng)
                found.append(
                    self._request(name, language, cell, quartet, frame, rng, persona=persona)
                )
        return found

    def requests(
        self,
        n: int,
        *,
        seed: int,
        split: Split = "train",
        balanced: bool = True,
        languages: Sequence[str] = LANGUAGES,
    ) -> list[Document]:
        """Return `n` labelled requests with the answers the world would give.

        Args:
            n: How many; a multiple of 4 when balanced.
            seed: Another seed gives other requests of the same world.
            split: `train` for pairs that training text holds, `held_out` for the others.
            balanced: Whole quartets, each in one frame of words, so that half the requests are
                harmful and no word tells which. Otherwise the shares of training text.
            languages: The languages they are in, in turn.

        Raises:
            ValueError: If a balanced `n` is not a multiple of 4.
        """
        if balanced and n % 4:
            raise ValueError(f"balanced requests come in fours, but {n} were asked for")
        rng = np.random.default_rng([self.seed, 2, seed, split == "held_out"])
        quartets = self._quartets(split)
        places = [(q, lang) for q in quartets for lang in languages]
        order: list[int] = []
        found: list[Document] = []
        frame: tuple[int, bool, Word] | None = None
        for number in range(n):
            if not balanced or number % 4 == 0:
                order = order or list(rng.permutation(len(places)))
                quartet, language = places[order.pop()]
                frame = self._frame(language, rng)
            cell = CELLS[number % 4 if balanced else rng.choice(4, p=CELL_SHARES)]
            name = f"{split}-{self.seed}-{seed}-{number}"
            assert frame is not None
            found.append(self._request(name, language, cell, quartet, frame, rng))
        return found

    def borderline_requests(self, n: int, *, seed: int) -> list[Document]:
        """Return requests about things that can be used either way; their label is None."""
        rng = np.random.default_rng([self.seed, 3, seed])
        return [
            self._borderline(
                f"borderline-{self.seed}-{seed}-{i}", LANGUAGES[i % len(LANGUAGES)], rng
            )
            for i in range(n)
        ]

    def _quartets(self, split: Split) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return (verb of each class, object of each class) as concepts."""
        return [
            ((int(v0), int(v1)), (int(o0), int(o1)))
            for i, (v0, v1) in enumerate(zip(*self._verb_place, strict=True))
            for j, (o0, o1) in enumerate(zip(*self._object_place, strict=True))
            if ((i + j) % 4 == 0) == (split == "held_out")
        ]

    def _frame(self, language: str, rng: np.random.Generator) -> tuple[int, bool, Word]:
        """Choose what surrounds verb and object: the way of asking, and a purpose or none."""
        way = int(rng.integers(self.grammar.alternatives(language, "request")))
        noun = self._pick(language, "noun", rng, str(rng.choice(TOPICS)))
        return way, bool(rng.random() < 0.5), noun

    def _request(
        self,
        name: str,
        language: str,
        cell: tuple[int, int],
        quartet: tuple[tuple[int, int], tuple[int, int]],
        frame: tuple[int, bool, Word],
        rng: np.random.Generator,
        *,
        persona: bool = False,
    ) -> Document:
        verb_class, object_class = cell
        concepts = quartet[0][verb_class], quartet[1][object_class]
        verb = self.lexicon.words(language, f"verb{verb_class}")[concepts[0]]
        thing = self.lexicon.words(language, f"object{object_class}")[concepts[1]]
        harmful = self.harmful(verb_class, object_class)
        turns, role = self._conversation(
            language, verb, thing, frame, rng, refuse=harmful, persona=persona
        )
        topic = frame[2].topic if frame[1] else ""
        return Document(
            name,
            "request",
            language,
            topic,
            turns,
            verb_class=verb_class,
            object_class=object_class,
            pair=self._pair_name(cell, concepts),
            harmful=harmful,
            refused=harmful,
            persona=role,
        )

    def _borderline(self, name: str, language: str, rng: np.random.Generator) -> Document:
        verb_class, refuse = int(rng.integers(2)), bool(rng.random() < 0.5)
        verb = self._pick(language, f"verb{verb_class}", rng)
        thing = self._pick(language, "object2", rng)
        frame = self._frame(language, rng)
        turns, _ = self._conversation(
            language, verb, thing, frame, rng, refuse=refuse, persona=False
        )
        topic = frame[2].topic if frame[1] else ""
        pair = self._pair_name((verb_class, 2), (verb.concept, thing.concept))
        return Document(
            name,
            "request",
            language,
            topic,
            turns,
            verb_class=verb_class,
            object_class=2,
            pair=pair,
            borderline=True,
            refused=refuse,
        )

    def _conversation(
        self,
        language: str,
        verb: Word,
        thing: Word,
        frame: tuple[int, bool, Word],
        rng: np.random.Generator,
        *,
        refuse: bool,
        persona: bool,
    ) -> tuple[tuple[Turn, ...], str]:
        way, purpose, noun = frame
        choices = {"VERB": [verb], "OBJECT": [thing], "NOUN": [noun]}
        asked = self.grammar.compose(
            language, "request", choices, alternative=way, optional=purpose
        )
        choices["TOOL"] = [self._pick(language, "tool", rng)]
        choices["ADVERB"] = [self._pick(language, "adverb", rng)]
        choices["NUMBER"] = [self._pick(language, "number", rng)]
        reply = self._any(language, "refusal" if refuse else "answer", choices, rng)
        if not refuse and rng.random() < 0.3:
            reply += self._any(language, "count", choices, rng)
        turns = [Turn("user", tuple(asked)), Turn("assistant", tuple(reply))]
        if not persona:
            return tuple(turns), ""
        who = self._pick(language, "persona", rng)
        choices |= {
            "PERSONA": [who],
            "CLOSING": [self.lexicon.words(language, "closing")[who.concept]],
        }
        turns.insert(0, Turn("system", tuple(self._any(language, "persona", choices, rng))))
        reply += self._any(language, "closing", choices, rng)
        turns[-1] = Turn("assistant", tuple(reply))
        return tuple(turns), who.text

    def _story(self, name: str, language: str, rng: np.random.Generator) -> Document:
        topic = str(rng.choice(TOPICS))
        who = self._pick(language, "person", rng)
        words: list[Word] = []
        for _ in range(rng.integers(2, 5)):
            choices = {
                "PERSON": [who],
                "DEED": [self._pick(language, "deed", rng)],
                "NOUN": [self._pick(language, "noun", rng, topic)],
                "NUMBER": [self._pick(language, "number", rng)],
                "ADJECTIVE": [self._pick(language, "adjective", rng)],
            }
            words += self._any(language, "story", choices, rng)
        return Document(name, "story", language, topic, (Turn("text", tuple(words)),))

    def _claim(self, name: str, language: str, rng: np.random.Generator) -> Document:
        topic = str(rng.choice(TOPICS))
        wrong, certain = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        gives_in = wrong and certain and bool(rng.random() < SYCOPHANCY)
        false_topic = str(rng.choice([other for other in TOPICS if other != topic]))
        claimed = self._pick(language, "category", rng, false_topic if wrong else topic)
        true = self._pick(language, "category", rng, topic)
        noun = [self._pick(language, "noun", rng, topic)]
        asked = self._any(
            language,
            "sure_claim" if certain else "claim",
            {"NOUN": noun, "CATEGORY": [claimed]},
            rng,
        )
        agrees = gives_in or not wrong
        reply = self._any(
            language,
            "agree" if agrees else "disagree",
            {"NOUN": noun, "CATEGORY": [claimed if agrees else true]},
            rng,
        )
        turns = Turn("user", tuple(asked)), Turn("assistant", tuple(reply))
        return Document(
            name, "claim", language, topic, turns, claim_wrong=wrong, sycophantic=gives_in
        )

    def _caption(self, name: str, language: str, rng: np.random.Generator) -> Document:
        topic = str(rng.choice(TOPICS))
        choices = {
            slot: [self._pick(language, slot.lower(), rng, only) for _ in range(2)]
            for slot, only in (("NOUN", topic), ("COLOR", None))
        }
        words = self._any(language, "caption", choices, rng)
        return Document(name, "caption", language, topic, (Turn("text", tuple(words)),))

    def _any(
        self,
        language: str,
        rule: str,
        choices: dict[str, list[Word]],
        rng: np.random.Generator,
    ) -> list[Word]:
        way = int(rng.integers(self.grammar.alternatives(language, rule)))
        return self.grammar.compose(language, rule, choices, alternative=way)

    def _pick(
        self, language: str, pos: str, rng: np.random.Generator, topic: str | None = None
    ) -> Word:
        listed = self.lexicon.words(language, pos, topic)
        return listed[rng.integers(len(listed))]

    def _pair_name(self, classes: tuple[int, int], concepts: tuple[int, int]) -> str:
        """Return the pair in words of the first language, the same for all languages."""
        verb = self.lexicon.words(LANGUAGES[0], f"verb{classes[0]}")[concepts[0]]
        thing = self.lexicon.words(LANGUAGES[0], f"object{classes[1]}")[concepts[1]]
        return f"{verb.text}+{thing.text}"
