"""Codes to analyse, block by block, wherever they are: a feature store, activations, a dump.

A source is walked once. Whatever it is, at most one of its shards or chunks is held, and rows that
hold NaN or infinity are refused or left out before anything is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array
from torch import Tensor

from saefty.encoding import ENCODED_ROWS, check_against_store, encode_rows
from saefty.errors import InputError, NumericError
from saefty.feature_dump import UNTOUCHED, FeatureDump
from saefty.sae_sets import SaeSet
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ActivationStore
from saefty.stores.features import FeatureStore, Key, layer_of
from saefty.token_sample import DENSE_SHARE, Block

Nonfinite = Literal["stop", "mask"]


@dataclass(frozen=True)
class CodeSource:
    """The codes of one SAE over all tokens.

    Attributes:
        key: The SAE's layer, or `<layer>__<name>`.
        place: Where the codes come from, in words.
        n_tokens: How many tokens there are.
        dense_bytes: Bytes of one token's codes in the scratch file; 0 where they are sparse.
        stretches: Starts a walk: yields what to call each stretch of tokens, and its codes.
    """

    key: Key
    place: str
    n_tokens: int
    dense_bytes: int
    stretches: Callable[[], Iterator[tuple[str, Block]]]


def of_features(store: FeatureStore, layers: Sequence[int] | None) -> list[CodeSource]:
    """Return the SAEs of a feature store.

    Args:
        store: The store.
        layers: Only these layers.

    Raises:
        MismatchError: If a layer that was asked for is not there.
    """

    def source(key: Key) -> CodeSource:
        def stretches() -> Iterator[tuple[str, Block]]:
            for i, chunk in enumerate(store.chunks(key)):
                yield f"{store.folder}/layer_{key}/shard_{i:05d}.safetensors", chunk

        place, width = f"the features of layer {key} in {store.folder}", store.d_sae(key)
        stored = int(store.manifest.get("nnz", {}).get(str(key), 0))
        dense = stored >= DENSE_SHARE * store.n_tokens * width
        return CodeSource(key, place, store.n_tokens, 4 * width if dense else 0, stretches)

    for layer in layers or ():
        store.site(layer)  # refuses what is not there
    return [source(key) for key in store.codes if layers is None or layer_of(key) in layers]


def of_activations(store: ActivationStore, saes: SaeSet) -> list[CodeSource]:
    """Return the codes that SAEs give to a store's activations; they are made on the way.

    Args:
        store: The activations.
        saes: The SAEs.

    Raises:
        MismatchError: If an SAE reads another place or width than the store holds.
    """
    check_against_store(saes.records, store)

    def source(key: Key) -> CodeSource:
        layer = saes.records[key].site.layer

        def stretches() -> Iterator[tuple[str, Block]]:
            sae = saes[key]
            for i in range(len(store.pieces)):
                where = f"the codes of {store.folder}/layer_{layer}/shard_{i:05d}.safetensors"
                for block in _encoded(sae, store.shard(layer, i)):
                    yield where, block

        place = f"the SAE of layer {key} on the activations in {store.folder}"
        return CodeSource(key, place, store.n_rows, 0, stretches)

    return [source(key) for key in saes.records]


def of_rows(sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"], place: str) -> CodeSource:
    """Return the codes that an SAE gives to rows in memory; they are made on the way.

    Args:
        sae: The SAE.
        x: The activations, finite.
        place: Where they come from, in words.
    """

    def stretches() -> Iterator[tuple[str, Block]]:
        for block in _encoded(sae, x):
            yield place, block

    return CodeSource(sae.site.layer if sae.site else 0, place, len(x), 0, stretches)


def _encoded(sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"]) -> Iterator[csr_array]:
    for part in x.split(ENCODED_ROWS):
        code = encode_rows(sae, part)
        parts = (code["values"], code["ids"].astype(np.int32), code["indptr"])
        yield csr_array(parts, shape=(len(part), sae.d_sae))


def of_dump(dump: FeatureDump, layers: Sequence[int] | None) -> list[CodeSource]:
    """Return the layers of a dump of dense codes.

    Args:
        dump: The dump.
        layers: Only these layers.

    Raises:
        InputError: If the last chunk of a layer cannot be used.
        MismatchError: If a layer that was asked for is not there.
    """

    def source(layer: int) -> CodeSource:
        def stretches() -> Iterator[tuple[str, Block]]:
            for chunk in dump.chunks(layer):
                for block in chunk.blocks():
                    yield str(chunk.path), block

        facts = dump.facts(layer)
        place = f"the chunks of layer {layer} in {dump.folder}"
        return CodeSource(layer, place, facts.n_tokens, facts.row_bytes, stretches)

    return [source(layer) for layer in (dump.layers if layers is None else layers)]


def numbered(
    source: CodeSource, nonfinite: Nonfinite, left_out: list[int]
) -> Iterator[tuple[int, Block]]:
    """Walk a source: yield the number of each stretch's first token, and codes without NaN.

    Args:
        source: The codes.
        nonfinite: `stop` refuses NaN and infinity, `mask` leaves their tokens out; the tokens that
            remain are numbered without gaps.
        left_out: How many tokens were left out is appended, stretch by stretch.

    Raises:
        NumericError: If a value is NaN or infinite, with `stop`.
        InputError: If no token remains.
    """
    first, place, row = 0, "", 0
    for where, block in source.stretches():
        row = row if where == place else 0
        place = where
        bad = _not_finite(block)
        if bad is not None and bad.any():
            if nonfinite == "stop":
                raise NumericError(
                    f"{where}: row {row + int(np.flatnonzero(bad)[0])} holds NaN or infinity "
                    f"({int(bad.sum())} of the rows {row} to {row + len(bad) - 1} do).",
                    safe=UNTOUCHED,
                    then="Find out where they come from (float16 holds no number above 65,504), or "
                    "set analyze.nonfinite=mask to leave these tokens out.",
                )
            left_out.append(int(bad.sum()))
            row += block.shape[0]
            block = csr_array(block[~bad]) if isinstance(block, csr_array) else block[~bad]
        else:
            row += block.shape[0]
        yield first, block
        first += block.shape[0]
    if first == 0:
        raise InputError(
            f"{source.place}: there is no token to analyse ({sum(left_out)} were left out because "
            "they hold NaN or infinity).",
            safe=UNTOUCHED,
            then="Analyse codes of at least one token.",
        )


def _not_finite(block: Block) -> Bool[np.ndarray, "tokens"] | None:
    """Return which rows hold NaN or infinity; None if none do."""
    if isinstance(block, csr_array):
        wrong = ~np.isfinite(block.data)
        if not wrong.any():
            return None
        rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))[wrong]
        return np.bincount(rows, minlength=block.shape[0]) > 0
    if block.dtype == np.float16:  # by their bits: NumPy's own test takes ten times as long
        bits = np.ascontiguousarray(block).view(np.uint16)
        wrong = (bits & np.uint16(0x7C00)) == np.uint16(0x7C00)
    else:
        wrong = ~np.isfinite(block)
    return np.asarray(wrong.any(axis=1)) if wrong.any() else None
