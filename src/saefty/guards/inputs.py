"""A guard's input, one row a text: counts of words, pooled activations, pooled latents.

The same rows as a probe is fitted on, made text by text instead of from a store.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from saefty.errors import InputError
from saefty.guards.spec import Pooling
from saefty.linear import Linear
from saefty.records import Example
from saefty.words import bag_of_words


def as_examples(texts: Sequence[object], *, raw: bool) -> list[Example]:
    """Return texts as examples; one bare text is not taken for its letters.

    Args:
        texts: Examples, or bare texts.
        raw: How bare texts are read.

    Raises:
        InputError: If one is neither.
    """
    examples = []
    for i, one in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(one, str | Example):
            raise InputError(
                f"text {i} (from 0) is of the type {type(one).__name__}: {one!r:.60}.",
                then="Give each text as str or as Example.",
            )
        examples.append(Example(id=str(i), prompt=one, raw=raw) if isinstance(one, str) else one)
    return examples


def is_text(text: str) -> bool:
    """Return whether no half of a character is in a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def count_words(texts: Sequence[str], columns: Mapping[str, int]) -> csr_array:
    """Return how often each text holds each word of a vocabulary.

    Args:
        texts: The texts.
        columns: The column of each word; words without one are left out.
    """
    rows: list[int] = []
    found: list[int] = []
    for row, text in enumerate(texts):
        here = [columns[word] for word in bag_of_words(text) if word in columns]
        rows += [row] * len(here)
        found += here
    ones = np.ones(len(found))
    return csr_array((ones, (rows, found)), shape=(len(texts), len(columns)))


def pool_activations(
    x: Float[np.ndarray, "rows d_model"], owner: Int[np.ndarray, "rows"], how: Pooling | None
) -> Float[np.ndarray, "texts d_model"]:
    """Return one row a text.

    Args:
        x: The rows of the texts, one text after the other.
        owner: The text of each row, ascending from 0; each text has a row.
        how: The pooling; of `last` only the last rows are given.
    """
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    if how == "max":
        return np.maximum.reduceat(x, first, axis=0)
    total = np.add.reduceat(x, first, axis=0)
    return total / np.bincount(owner)[:, None] if how == "mean" else total


def pool_latents(
    code: Mapping[str, np.ndarray],
    owner: Int[np.ndarray, "rows"],
    how: Pooling | None,
    linear: Linear,
) -> csr_array:
    """Return one row a text: its tokens' magnitudes |z|, pooled as `FeatureStore.pooled` does.

    Args:
        code: The latents that fire on each row, as `encode_rows` gives them.
        owner: The text of each row, ascending from 0; each text has a row.
        how: The pooling; of `last` only the last rows are given.
        linear: Latents that it does not read are left out.
    """
    shape = (int(owner[-1]) + 1, linear.width)
    read = np.zeros(linear.width, dtype=bool)
    read[linear.columns] = True
    chosen = read[code["ids"]]
    key = np.repeat(owner, np.diff(code["indptr"]))[chosen] * np.int64(linear.width)
    key = key + code["ids"][chosen]
    order = np.argsort(key, kind="stable")
    key, values = key[order], np.abs(code["values"][chosen][order]).astype(np.float64)
    first = np.flatnonzero(np.diff(key, prepend=-1))
    if len(key):
        values = (np.maximum if how == "max" else np.add).reduceat(values, first)
    rows, columns = np.divmod(key[first], linear.width)
    if how == "mean":
        values = values / np.bincount(owner)[rows]
    return csr_array((values, (rows, columns)), shape=shape)
