"""Some tokens of kept codes, of a dump or of a feature store; one chunk is open at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from saefty.feature_dump import FeatureDump
from saefty.stores.features import FeatureStore, Key

HALF = "F16"
STRETCH_TOKENS = 96  # sampled of a chunk


@dataclass(frozen=True)
class Kept:
    """Sampled tokens of codes that were kept.

    Attributes:
        rows: Which tokens, counted from the first that was kept.
        values: Their codes.
        n_tokens: How many tokens were kept.
        half: Whether they were kept in float16.
    """

    rows: Int[np.ndarray, "tokens"]
    values: Float[np.ndarray, "tokens width"]
    n_tokens: int
    half: bool = False


def sample_dump(
    dump: FeatureDump, layer: int, d_sae: int, seed: int = 0
) -> tuple[Kept, Kept | None]:
    """Return tokens of a dump's first, middle and last chunk, and the same with swapped axes.

    Args:
        dump: The dump.
        layer: Which layer.
        d_sae: Number of latents of the SAE: a chunk of so many rows may have its axes swapped.
        seed: Of the draw.

    Returns:
        The tokens as the chunks are, and as they would be if each were [latents, tokens]; None
        where the shapes do not allow that.
    """
    files, rng = dump.files(layer), np.random.default_rng(seed)
    chosen = sorted({0, len(files) // 2, len(files) - 1})
    plain: list[tuple[np.ndarray, np.ndarray]] = []
    swapped: list[tuple[np.ndarray, np.ndarray]] = []
    tokens = n_swapped = per_chunk = 0
    half = False
    for number in chosen:
        with dump.opened(files[number]) as chunk:
            n, width = chunk.shape
            half = chunk.dtype == HALF
            tokens, per_chunk = chunk.total, per_chunk or width
            rows = _drawn(rng, n)
            plain.append((tokens - n + rows, chunk.part(rows)))
            if n == d_sae:
                columns = _drawn(rng, width)
                n_swapped = number * per_chunk + width
                swapped.append((number * per_chunk + columns, chunk.part(columns, columns=True)))
    other = _kept(swapped, n_swapped, half) if len(swapped) == len(plain) else None
    return _kept(plain, tokens, half), other


def sample_features(store: FeatureStore, key: Key, seed: int = 0) -> Kept:
    """Return tokens of a feature store's first, middle and last shard.

    Args:
        store: The store.
        key: Which SAE.
        seed: Of the draw.
    """
    rng, last = np.random.default_rng(seed), len(store.pieces) - 1
    parts, first = [], 0
    for number, chunk in enumerate(store.chunks(key)):
        if number in {0, last // 2, last}:
            rows = _drawn(rng, chunk.shape[0])
            parts.append((first + rows, chunk[rows].toarray()))
        first += chunk.shape[0]
    return _kept(parts, first)


def _drawn(rng: np.random.Generator, n: int) -> Int[np.ndarray, "chosen"]:
    return np.sort(rng.choice(n, min(n, STRETCH_TOKENS), replace=False)).astype(np.int64)


def _kept(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], n_tokens: int, half: bool = False
) -> Kept:
    # Swapped chunks of fewer tokens are narrower when they are read as they are.
    same = [part for part in parts if part[1].shape[1] == parts[0][1].shape[1]]
    rows, values = zip(*same, strict=True)
    return Kept(np.concatenate(rows), np.concatenate(values).astype(np.float64), n_tokens, half)
