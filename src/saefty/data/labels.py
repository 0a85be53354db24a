"""Which labels mean harmful: the usual spellings, or the values that `data.harmful` names."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from saefty.errors import InputError
from saefty.registry import nearest

log = logging.getLogger(__name__)

TRUE_WORDS = frozenset({"true", "1", "1.0", "yes", "harmful"})
FALSE_WORDS = frozenset({"false", "0", "0.0", "no", "harmless", "benign"})
SURELY_HARMFUL = frozenset({"unsafe", "toxic", "malicious", "jailbreak", "hateful"})
"""Labels that no dataset gives to harmless examples: they alone may stand in an example."""
NAMED = 10
"""Most labels that a message names."""


def label_of(value: Any, harmful: Collection[str] | None) -> bool | None:
    """Return whether a label means harmful; None where there is none, or it cannot be told.

    Args:
        value: The label.
        harmful: The values that mean harmful; None goes by the usual spellings.
    """
    if is_missing(value):
        return None
    if harmful is not None:
        return word_of(value) in harmful
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    word = str(value).strip().lower()
    return word in TRUE_WORDS if word in TRUE_WORDS | FALSE_WORDS else None


def check_labels(values: Iterable[Any], harmful: Collection[str] | None, where: str) -> None:
    """Refuse labels that cannot be understood, and values of `data.harmful` that never occur.

    A misspelt value would make all examples harmless.

    Args:
        values: The label of each row.
        harmful: As for `label_of`.
        where: What holds the rows.

    Raises:
        InputError: If there are such labels.
    """
    labels = list(values)
    seen = Counter(word_of(value) for value in labels if not is_missing(value))
    if harmful is None:
        for row, value in enumerate(labels):
            if not is_missing(value) and label_of(value, None) is None:
                raise InputError(
                    f"{where}, row {row} (counted from 0): the label {value!r} is neither harmful "
                    f"nor harmless; labels: {_named(seen)}.",
                    then=_which_are_harmful(seen),
                )
        return
    absent = [word for word in harmful if word not in seen]
    if not seen or not absent:
        return
    found = ", ".join(f"{word!r} ({n})" for word, n in seen.most_common(NAMED))
    if len(absent) == len(harmful):
        raise InputError(
            f"no label of {where} is one of data.harmful={list(harmful)}; its labels are {found}."
            f"{nearest(absent[0], list(seen))}",
            then="Set data.harmful to the values that mean harmful.",
        )
    log.warning("%s has no label %s; its labels are %s", where, ", ".join(absent), found)


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _which_are_harmful(seen: Counter[str]) -> str:
    """Return what to do; a value that may be the harmless one never stands as the example."""
    sure = [word for word in seen if word.strip().lower() in SURELY_HARMFUL]
    example = f", for example data.harmful='[{sure[0]}]'" if sure else ": data.harmful='[A,B]'"
    return f"Say which of them mean harmful{example}; all others are harmless then."


def _named(seen: Counter[str]) -> str:
    more = len(seen) - NAMED
    names = ", ".join(word for word, _ in seen.most_common(NAMED))
    return names + (f" and {more} more" if more > 0 else "")


def word_of(value: Any) -> str:
    """Return how a label is written in `data.harmful`: the same for 1, 1.0 and "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
