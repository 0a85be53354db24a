"""The language of a reply, told by the package lingua among a few languages that are named.

The fewer languages, the surer and the smaller: ten take 180 MB of memory, all 75 take 1.3 GB. The
score is lingua's confidence that the whole reply is in the wanted language. It is no share: a reply
that is half French scores near 1 or near 0, by which half is the easier to tell.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from saefty.errors import MissingExtraError
from saefty.judges.base import JUDGES, check_pairs
from saefty.records import Example
from saefty.words import is_unspaced, split_words

if TYPE_CHECKING:
    from lingua import LanguageDetector

LANGUAGES = ("en", "fr", "de", "es", "it", "pt", "ru", "ja", "ko", "zh")
SHORTEST = 12
"""Letters of a reply that can be told; a character of a script without spaces counts as three."""
UNSPACED_WEIGHT = 3
DIGITS = 9  # lingua adds up in any order, so the last digits differ from call to call


@JUDGES.register("language")
class LanguageJudge:
    """Score how surely a reply is in one language, from 0 to 1.

    A reply with fewer than 12 letters (4 of Chinese, Japanese, Korean, Thai, …) is NaN: `ok` is a
    word of many languages.

    Args:
        target: The wanted language, as ISO 639-1 has it: `fr`.
        languages: The languages it is told from; the wanted one is among them in any case.

    Raises:
        MissingExtraError: If lingua is not installed.
        ValueError: If a language is not known, or there is none to tell it from.

    Example:
        >>> LanguageJudge("fr").score([""], ["Bonjour, je voudrais du pain."]).round(1)
        array([1.])
    """

    def __init__(self, target: str, languages: Iterable[str] = LANGUAGES) -> None:
        self.target = target.strip().lower()
        named = {language.strip().lower() for language in languages} | {self.target}
        if len(named) < 2:
            raise ValueError(f"name at least one language that {self.target} is told from")
        self._detector = _detector(tuple(sorted(named)))

    def score(
        self, prompts: Sequence[Example | str], replies: Sequence[str]
    ) -> Float[np.ndarray, "items"]:
        """Return the confidence for each reply; the prompts do not matter."""
        check_pairs(prompts, replies)
        return np.array([self._score_one(reply) for reply in replies], dtype=np.float64)

    def _score_one(self, reply: str) -> float:
        letters = sum(
            UNSPACED_WEIGHT if is_unspaced(letter) else 1
            for word in split_words(reply)
            for letter in word
            if letter.isalpha()
        )
        if letters < SHORTEST:
            return float("nan")
        found = {
            one.language.iso_code_639_1.name.lower(): one.value
            for one in self._detector.compute_language_confidence_values(reply)
        }
        # No language at all: letters of a script that none of them is written in.
        return round(found[self.target], DIGITS) if any(found.values()) else 0.0


@lru_cache(maxsize=4)
def _detector(languages: tuple[str, ...]) -> "LanguageDetector":
    """Return what tells languages apart; its statistics are loaded once a program."""
    try:
        from lingua import IsoCode639_1, Language, LanguageDetectorBuilder
    except ImportError:
        raise MissingExtraError(
            "the judge language needs the package lingua-language-detector.",
            then="Run pip install 'saefty[langid]', or choose another judge, such as lexicon.",
        ) from None
    known = sorted(language.iso_code_639_1.name.lower() for language in Language.all())
    unknown = [language for language in languages if language not in known]
    if unknown:
        raise ValueError(
            f"there is no language {', '.join(unknown)}; the known are {', '.join(known)}"
        )
    codes = [getattr(IsoCode639_1, language.upper()) for language in languages]
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()
