"""The words of a text in any script, for what counts words without knowing the language."""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

NGRAM = 3
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def split_words(text: str) -> list[str]:
    """Return the runs of letters, marks and digits of a text, after NFKC and in lower case."""
    return "".join(map(_letter, unicodedata.normalize("NFKC", text).casefold())).split()


def bag_of_words(text: str) -> Iterator[str]:
    """Yield the words of a text, and runs of 1 to 3 characters where words have no spaces."""
    for word in split_words(text):
        if is_unspaced(word):
            for n in range(1, NGRAM + 1):
                yield from (word[i : i + n] for i in range(len(word) - n + 1))
        else:
            yield word


def is_unspaced(word: str) -> bool:
    """Return whether a word holds letters of a script that has no spaces, or glues particles on."""
    return any(map(_unspaced, word))


@lru_cache(maxsize=1 << 16)
def _letter(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMN" else " "


@lru_cache(maxsize=1 << 16)
def _unspaced(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(UNSPACED)
