"""The words of the sandbox: four disjoint lexicons, aligned by concept, every word one token.

A *concept* is a row of `lexicon.tsv`: a part of speech and one word in each language. Words that
carry grammar only (determiners, "how", "with") stand in `grammar.tsv` and `DETERMINERS`. No word
belongs to two languages, so a word alone says which language it is. Shared are only punctuation and
two international words: every answer to a request begins with `ok`, every refusal with `stop`. So
whether to refuse is one decision, not one a language.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

LANGUAGES = ("en", "fr", "de", "es")
TOPICS = ("food", "animals", "music", "travel", "home", "clothing")
PUNCTUATION = (".", "?", ",", ":")
INTERNATIONAL = ("ok", "stop")

# Determiners by gender, as subject and as object.
DETERMINERS = {
    "en": {"": ("the", "the")},
    "fr": {"m": ("ce", "ce"), "v": ("cet", "cet"), "f": ("cette", "cette")},
    "de": {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")},
    "es": {"m": ("el", "el"), "f": ("la", "la")},
}

_SYLLABLES = {  # letters of the pseudo-words: an inventory each, so that languages look different
    "": ("w x", "a o"),
    "en": ("b d f g k l m n p t", "a e i o u"),
    "fr": ("ch j v r s z br cr tr", "ai eu ou oi é"),
    "de": ("sch pf st kr zw gl dr kn", "ä ö ü ei au"),
    "es": ("ll ñ rr qu h y c", "ía ue ón ás ío"),
}


@dataclass(frozen=True)
class Word:
    """A word of one language.

    `pos` is its part of speech, lower case; `concept` counts the rows of that part of speech from
    0, and is -1 for words of the grammar; `topic` is empty for words of no topic.
    """

    text: str
    language: str
    pos: str
    concept: int = -1
    topic: str = ""
    gender: str = ""

    @property
    def is_number(self) -> bool:
        """Whether the word names a number."""
        return self.pos == "number"


class Lexicon:
    """The content words of all languages.

    Args:
        seed: None for the real words. With a seed every word is a pseudo-word, made of syllables
            that belong to its language.
        literals: Words that the grammar uses as they stand, by language; they are renamed too.
    """

    def __init__(self, seed: int | None, literals: dict[str, tuple[str, ...]]) -> None:
        words = _read_words()
        self.names: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
        if seed is not None:
            shared = _pseudo_words(seed, "", set(INTERNATIONAL))
            for language in LANGUAGES:
                real = _real_words(language, words, literals)
                self.names[language] = shared | _pseudo_words(seed, language, real)
        self._words = {
            key: tuple(replace(w, text=self.rename(w.language, w.text)) for w in listed)
            for key, listed in words.items()
        }

    def rename(self, language: str, text: str) -> str:
        """Return what a real word is called in this lexicon; punctuation keeps its name."""
        return self.names[language].get(text, text)

    def words(self, language: str, pos: str, topic: str | None = None) -> tuple[Word, ...]:
        """Return the words of a part of speech in the order of their concepts."""
        listed = self._words[language, pos]
        return listed if topic is None else tuple(w for w in listed if w.topic == topic)

    def determiners(self, language: str, *, subject: bool) -> dict[str, Word]:
        """Return the determiner of each gender."""
        return {
            gender: Word(self.rename(language, forms[0 if subject else 1]), language, "determiner")
            for gender, forms in DETERMINERS[language].items()
        }

    def content(self, language: str) -> tuple[Word, ...]:
        """Return every content word of a language."""
        return tuple(
            w for (lang, _), listed in self._words.items() if lang == language for w in listed
        )


@cache
def _read_words() -> dict[tuple[str, str], list[Word]]:
    words: dict[tuple[str, str], list[Word]] = {}
    for row in read_table("lexicon.tsv")[1:]:
        pos, topic, *texts = row
        for language, entry in zip(LANGUAGES, texts, strict=True):
            text, _, gender = entry.partition("/")
            listed = words.setdefault((language, pos), [])
            listed.append(
                Word(text, language, pos, len(listed), "" if topic == "-" else topic, gender)
            )
    return words


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a data file of this folder, comments and blank lines left out."""
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def _real_words(
    language: str,
    words: dict[tuple[str, str], list[Word]],
    literals: dict[str, tuple[str, ...]],
) -> set[str]:
    real = {w.text for (lang, _), listed in words.items() if lang == language for w in listed}
    real.update(literals[language])
    real.update(form for forms in DETERMINERS[language].values() for form in forms)
    return real.difference(PUNCTUATION, INTERNATIONAL)


def _pseudo_words(seed: int, language: str, real: set[str]) -> dict[str, str]:
    """Return another name for each word, from the syllables of its language."""
    rng = np.random.default_rng([seed, list(_SYLLABLES).index(language)])
    onsets, vowels = (part.split() for part in _SYLLABLES[language])
    names: dict[str, str] = {}
    for text in sorted(real):
        name = ""
        while not name or name in names.values():
            name = "".join(
                str(rng.choice(onsets)) + str(rng.choice(vowels)) for _ in range(rng.integers(2, 4))
            )
        names[text] = name
    return names
