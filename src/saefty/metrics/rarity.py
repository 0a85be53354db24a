"""How common a latent is among the strongest of the tokens, and when a run first shows it.

A latent that is among the strongest on every token says little about any of them. Its score is an
average over all tokens of the run, so it is relative to these texts.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

TOP_SCORE = 100


def rarity_scores(chunks: Iterable[csr_array], d_sae: int) -> Float[np.ndarray, "d_sae"]:
    """Return how common each latent is among the strongest of a token; a low score is rare.

    The latent of rank r of a token (0 is the strongest) scores max(0, 100 - r) there, and 0 where
    it does not fire. The scores are averaged over all tokens.

    Args:
        chunks: The latents of one layer, [tokens, d_sae] each, strongest first within a token, as
            `FeatureStore.chunks` yields them.
        d_sae: The number of latents.

    Returns:
        A score a latent, from 0 (never among a token's 100 strongest) to 100 (always strongest).
    """
    total, tokens = np.zeros(d_sae), 0
    for chunk in chunks:
        rank = ranks(chunk)
        counted = rank < TOP_SCORE
        total += np.bincount(
            chunk.indices[counted], weights=TOP_SCORE - rank[counted], minlength=d_sae
        )
        tokens += chunk.shape[0]
    return np.asarray(total / max(tokens, 1))


def ranks(chunk: csr_array) -> Int[np.ndarray, "nnz"]:
    """Return each stored value's place within its token, from 0."""
    starts = np.repeat(chunk.indptr[:-1].astype(np.int64), np.diff(chunk.indptr))
    return np.asarray(np.arange(len(chunk.indices)) - starts)


def appearance(
    layers: Mapping[int | str, Iterable[csr_array]], widths: Mapping[int | str, int]
) -> dict[int | str, Int[np.ndarray, "d_sae"]]:
    """Number the latents of a run in the order in which they first appear, over all its layers.

    Earlier tokens come first; within a token the layers in their order, and within a layer the
    stronger latent.

    Args:
        layers: The latents of each layer in chunks, as for `rarity_scores`, all layers with the
            same tokens.
        widths: The number of latents of each layer.

    Returns:
        For each layer a number a latent, from 0; -1 for latents that never fire. No number is given
        twice.
    """
    found: list[tuple[np.ndarray, ...]] = []
    for place, (layer, chunks) in enumerate(layers.items()):
        seen, first_row = np.zeros(widths[layer], dtype=bool), 0
        for chunk in chunks:
            ids, first = np.unique(chunk.indices, return_index=True)
            new = ~seen[ids]
            ids, first = ids[new].astype(np.int64), first[new]
            seen[ids] = True
            row = np.searchsorted(chunk.indptr, first, side="right") - 1
            rank = first - chunk.indptr[row]
            found.append((first_row + row, np.full(len(ids), place), rank, ids))
            first_row += chunk.shape[0]
    numbers = {layer: np.full(widths[layer], -1, dtype=np.int64) for layer in layers}
    if not found:
        return numbers
    rows, places, rank, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((rank, places, rows))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    for place, layer in enumerate(layers):
        here = places == place
        numbers[layer][ids[here]] = number[here]
    return numbers


def unseen(once: int, twice: int, samples: int) -> tuple[float, float]:
    """Return how many latents that fired in no text would fire in more, at least, and its error.

    Chao's estimate of unseen species and its standard error (Chao 1987, in the bias-corrected form
    for samples of presence and absence), with texts as samples: many latents that fired in a
    single text are a sign of many that were missed.

    Args:
        once: Latents that fired in exactly one text.
        twice: Latents that fired in exactly two.
        samples: How many texts were read.
    """
    if samples < 1:
        return 0.0, 0.0
    share, below = (samples - 1) / samples, twice + 1
    variance = (
        share * once * (once - 1) / (2 * below)
        + share**2 * once * (2 * once - 1) ** 2 / (4 * below**2)
        + share**2 * once**2 * twice * (once - 1) ** 2 / (4 * below**4)
    )
    # Never -0: that is what (0 - 1) times no latent would give.
    return max(0.0, share * once * (once - 1) / (2 * below)), variance**0.5
