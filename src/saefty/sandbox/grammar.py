"""The sentences of the sandbox: how they are built, and which strings of words are sentences.

A rule of `grammar.tsv` is a list of alternatives; an alternative is a list of literal words, slots
(`VERB`, `NP-OBJECT`: a word, or a determiner and a noun that agree) and other rules (`@for`). No
rule contains itself, so each language is a finite set of patterns and a sentence is accepted when
one of the patterns of its length fits: exact, and fast enough to judge thousands of replies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from saefty.sandbox.lexicon import (
    INTERNATIONAL,
    LANGUAGES,
    PUNCTUATION,
    Lexicon,
    Word,
    read_table,
)

Pattern = tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Fit:
    """How well a text fits the grammar of one language."""

    words: int
    """Words in the text, punctuation counted."""
    accepted: int
    """Words that stand in accepted sentences."""
    open: int
    """Words of a last sentence that is not finished but could still be."""


class Grammar:
    """The rules of four languages over one lexicon.

    Args:
        lexicon: The words.
        seed: None for the word order of `grammar.tsv`. With a seed the words between the first and
            the last of each sentence stand in another, fixed order, and so do determiner and noun.
    """

    def __init__(self, lexicon: Lexicon, seed: int | None = None) -> None:
        self.lexicon = lexicon
        self._rules = {
            key: [_shuffled(a, seed, key, n) for n, a in enumerate(alternatives)]
            for key, alternatives in _read_rules().items()
        }
        rng = None if seed is None else np.random.default_rng([seed, 1])
        self._noun_first = {
            language: bool(rng.integers(2)) if rng is not None else False for language in LANGUAGES
        }
        self._patterns = {language: self._compile(language) for language in LANGUAGES}

    @property
    def shared(self) -> tuple[str, ...]:
        """The words of no language: punctuation, and how answers and refusals begin."""
        international = (self.lexicon.rename(LANGUAGES[0], word) for word in INTERNATIONAL)
        return (*PUNCTUATION, *international)

    def alternatives(self, language: str, rule: str) -> int:
        """Return in how many ways a rule can be written, optional parts not counted."""
        return len(self._rules[language, rule])

    def compose(
        self,
        language: str,
        rule: str,
        choices: Mapping[str, Sequence[Word]],
        *,
        alternative: int = 0,
        optional: bool = False,
    ) -> list[Word]:
        """Return a sentence.

        Args:
            language: Its language.
            rule: Its rule.
            choices: The words for each slot, in the order in which the slot occurs; more than one
                sentence may need are not used.
            alternative: Which way of writing the rule.
            optional: Whether its optional part is written.
        """
        left = {slot: list(words) for slot, words in choices.items()}
        sentence: list[Word] = []
        for symbol in self._flat(language, self._rules[language, rule][alternative], optional):
            sentence.extend(self._write(language, symbol, left))
        return sentence

    def fit(self, text: str, language: str) -> Fit:
        """Return how much of a text the grammar of a language accepts."""
        words = split_words(text)
        accepted, start = 0, 0
        for end, word in enumerate(words, start=1):
            if word in (".", "?"):
                accepted += (end - start) * self._fits(words[start:end], language, finished=True)
                start = end
        rest = words[start:]
        open_words = len(rest) if rest and self._fits(rest, language, finished=False) else 0
        return Fit(len(words), accepted, open_words)

    def accepts(self, text: str) -> bool:
        """Return whether a text is a series of finished sentences of one language."""
        fits = (self.fit(text, language) for language in LANGUAGES)
        return any(fit.words > 0 and fit.accepted == fit.words for fit in fits)

    def openers(self, language: str, rule: str) -> frozenset[str]:
        """Return the words with which the sentences of a rule begin."""
        return frozenset().union(
            *(p[0] for a in self._rules[language, rule] for p in self._expand(language, a))
        )

    def vocabulary(self, language: str) -> frozenset[str]:
        """Return every word of a language's own that its sentences can contain."""
        return frozenset().union(*self._all_words(language)).difference(self.shared)

    def _all_words(self, language: str) -> Iterator[frozenset[str]]:
        for patterns in self._patterns[language].values():
            for pattern in patterns:
                yield from pattern

    def _fits(self, words: Sequence[str], language: str, *, finished: bool) -> bool:
        lengths = self._patterns[language]
        tried = [len(words)] if finished else [n for n in lengths if n > len(words)]
        return any(
            all(word in slot for word, slot in zip(words, pattern, strict=False))
            for n in tried
            for pattern in lengths.get(n, ())
        )

    def _compile(self, language: str) -> dict[int, list[Pattern]]:
        patterns: dict[int, list[Pattern]] = {}
        for (lang, rule), alternatives in self._rules.items():
            if lang == language and rule != "for":
                for alternative in alternatives:
                    for pattern in self._expand(language, alternative):
                        patterns.setdefault(len(pattern), []).append(pattern)
        return patterns

    def _expand(self, language: str, alternative: Sequence[str]) -> Iterator[Pattern]:
        for optional in {False, any(s.startswith("@") for s in alternative)}:
            parts = [self._forms(language, s) for s in self._flat(language, alternative, optional)]
            for choice in product(*parts):
                yield tuple(slot for part in choice for slot in part)

    def _forms(self, language: str, symbol: str) -> list[Pattern]:
        case, _, slot = symbol.rpartition("-")
        if not slot.isupper():
            return [(frozenset([self.lexicon.rename(language, symbol)]),)]
        listed = self._slot_words(language, slot)
        if not case:
            return [(frozenset(w.text for w in listed),)]
        forms: list[Pattern] = []
        for gender, determiner in self.lexicon.determiners(language, subject=case == "NPS").items():
            nouns = frozenset(w.text for w in listed if w.gender == gender)
            pair = (frozenset([determiner.text]), nouns)
            forms.append(pair[::-1] if self._noun_first[language] else pair)
        return [form for form in forms if all(form)]

    def _slot_words(self, language: str, slot: str) -> tuple[Word, ...]:
        """Return the words a slot takes: VERB and OBJECT stand for all their classes."""
        kinds = {"VERB": ("verb0", "verb1"), "OBJECT": ("object0", "object1", "object2")}
        return tuple(
            w for pos in kinds.get(slot, (slot.lower(),)) for w in self.lexicon.words(language, pos)
        )

    def _flat(self, language: str, alternative: Sequence[str], optional: bool) -> list[str]:
        """Return an alternative with its rules written out: the first way is the short one."""
        flat: list[str] = []
        for symbol in alternative:
            if symbol.startswith("@"):
                flat += self._rules[language, symbol[1:]][1 if optional else 0]
            else:
                flat.append(symbol)
        return flat

    def _write(self, language: str, symbol: str, left: dict[str, list[Word]]) -> list[Word]:
        case, _, slot = symbol.rpartition("-")
        if not slot.isupper():
            pos = "punctuation" if symbol in PUNCTUATION else "function"
            tongue = "" if symbol in (*PUNCTUATION, *INTERNATIONAL) else language
            return [Word(self.lexicon.rename(language, symbol), tongue, pos)]
        word = left[slot].pop(0)
        if not case:
            return [word]
        determiner = self.lexicon.determiners(language, subject=case == "NPS")[word.gender]
        return [word, determiner] if self._noun_first[language] else [determiner, word]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, punctuation apart."""
    for mark in PUNCTUATION:
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


def grammar_literals() -> dict[str, tuple[str, ...]]:
    """Return the words that the rules of each language use as they stand."""
    found: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    for (language, _), alternatives in _read_rules().items():
        for alternative in alternatives:
            found[language].update(s for s in alternative if s.islower() and s[0] != "@")
    return {language: tuple(sorted(words)) for language, words in found.items()}


@cache
def _read_rules() -> dict[tuple[str, str], list[tuple[str, ...]]]:
    rules: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for language, rule, text in read_table("grammar.tsv"):
        rules.setdefault((language, rule), []).append(() if text == "-" else tuple(text.split()))
    return rules


def _shuffled(
    alternative: tuple[str, ...], seed: int | None, key: tuple[str, str], number: int
) -> tuple[str, ...]:
    """Return the symbols in another order; the first and last say what the sentence is."""
    if seed is None or len(alternative) < 4:
        return alternative
    spelled = [ord(c) for c in "".join(key)]
    order = np.random.default_rng([seed, number, *spelled]).permutation(len(alternative) - 2) + 1
    return (alternative[0], *(alternative[i] for i in order), alternative[-1])
