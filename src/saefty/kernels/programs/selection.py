# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The k largest of each row of pre-activations, exactly; one program reads one row.

Numbers are compared as integers: those of positive floats are in the same order. `candidates` finds
a key that at least k entries reach and few more, and keeps what reaches it in the order of the
latents; `ranked` puts what was kept in order. The key comes from the maxima of disjoint groups: one
that k maxima reach is reached by at least k entries. Only where more entries reach it than there is
room for (as where many are equal) is the row searched by halving, until they fit or all that is
left in doubt is equal; then those of the lowest latents are kept.

Nothing may stand between `triton.jit` and a function, for it reads the source: `no_type_check`
keeps checks of types away.
"""

from typing import no_type_check

import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]


@triton.jit
@no_type_check
def _keys(pre, columns, d_sae, SIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Return integers in the order of the entries; 0 is what does not fire, NaN is the largest."""
    value = tl.load(pre + columns, mask=columns < d_sae, other=0.0)
    if WIDE:
        value = value.to(tl.float64)
        size = tl.abs(value) if SIGNED else value
        key = size.to(tl.int64, bitcast=True)
        key = tl.where(size > 0, key, 0)
        key = tl.where(value != value, 0x7FF0000000000001, key)
    else:
        value = value.to(tl.float32)
        size = tl.abs(value) if SIGNED else value
        key = size.to(tl.int32, bitcast=True)
        key = tl.where(size > 0, key, 0)
        key = tl.where(value != value, 0x7F800001, key)
    return key


@triton.jit
@no_type_check
def _reaching(pre, d_sae, least, SIGNED: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr):
    """Return how many entries of a row have at least this key."""
    columns = tl.arange(0, TILE)
    hits = tl.zeros((TILE,), tl.int32)
    for start in range(0, d_sae, TILE):
        hits += (_keys(pre, start + columns, d_sae, SIGNED, WIDE) >= least).to(tl.int32)
    return tl.sum(hits, axis=0)


@triton.jit
@no_type_check
def _keep(
    pre, d_sae, least, spare, most, keys, latents,
    SIGNED: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write down what is above a key and the first that equal it; return how many there are."""
    columns = tl.arange(0, TILE)
    kept = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    total = tl.full((), 0, tl.int32)
    for start in range(0, d_sae, TILE):
        key = _keys(pre, start + columns, d_sae, SIGNED, WIDE)
        reached = tl.sum((key >= least).to(tl.int32), axis=0)
        if reached > 0:
            same = (key == least).to(tl.int32)
            turn = equal + tl.cumsum(same, axis=0) - same
            taken = ((key > least) | ((same > 0) & (turn < spare))).to(tl.int32)
            place = kept + tl.cumsum(taken, axis=0) - taken
            fits = (taken > 0) & (place < most)
            tl.store(keys + place, key, mask=fits)
            tl.store(latents + place, start + columns, mask=fits)
            kept += tl.sum(taken, axis=0)
            equal += tl.sum(same, axis=0)
            total += reached
    return total


@triton.jit
@no_type_check
def candidates(
    pre, stride, d_sae, k, most, keys, latents, counts,
    SIGNED: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keep at most `most` entries of a row, the k first of the oracle's order among them."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * stride
    keys += row * most
    latents += row * most
    columns = tl.arange(0, TILE)
    low = tl.full((), 1, tl.int64 if WIDE else tl.int32)
    high = tl.full((), 0x7FF0000000000002 if WIDE else 0x7F800002, tl.int64 if WIDE else tl.int32)
    if d_sae > most:
        highest = tl.zeros((TILE,), tl.int64 if WIDE else tl.int32)
        for start in range(0, d_sae, TILE):
            highest = tl.maximum(highest, _keys(pre, start + columns, d_sae, SIGNED, WIDE))
        high = tl.max(highest, axis=0) + 1
        above = high
        reached = tl.full((), TILE, tl.int32)
        while (above - low > 1) & (reached > k + (most - k) // 4):
            middle = low + (above - low) // 2
            found = tl.sum((highest >= middle).to(tl.int32), axis=0)
            reached = tl.where(found >= k, found, reached)
            low = tl.where(found >= k, middle, low)
            above = tl.where(found >= k, above, middle)
    total = _keep(pre, d_sae, low, most, most, keys, latents, SIGNED, WIDE, TILE)
    if total > most:
        while (high - low > 1) & (total > most):
            middle = low + (high - low) // 2
            found = _reaching(pre, d_sae, middle, SIGNED, WIDE, TILE)
            enough = found >= k
            total = tl.where(enough, found, total)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        spare = most - _reaching(pre, d_sae, low + 1, SIGNED, WIDE, TILE)
        tl.debug_barrier()  # what was written above is written over
        total = _keep(pre, d_sae, low, spare, most, keys, latents, SIGNED, WIDE, TILE)
    tl.store(counts + row, tl.minimum(total, most))


@triton.jit
@no_type_check
def ranked(
    pre, stride, keys, latents, counts, most, k, values, chosen,
    ROOM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Put the k largest of a row's candidates where their rank says; equal keys keep their order.

    A candidate's rank is how many come before it: no sorting, and the same for every kind of key.
    """
    row = tl.program_id(0).to(tl.int64)
    keys += row * most
    latents += row * most
    count = tl.load(counts + row)
    mine = tl.arange(0, ROOM)
    there = mine < count
    key = tl.load(keys + mine, mask=there, other=0)
    rank = tl.zeros((ROOM,), tl.int32)
    for start in range(0, count, PART):
        others = start + tl.arange(0, PART)
        theirs = tl.load(keys + others, mask=others < count, other=0)
        larger = theirs[None, :] > key[:, None]
        first = (theirs[None, :] == key[:, None]) & (others[None, :] < mine[:, None])
        rank += tl.sum((larger | first).to(tl.int32), axis=1)
    taken = there & (rank < k)
    latent = tl.load(latents + mine, mask=there, other=0)
    value = tl.load(pre + row * stride + latent, mask=there, other=0.0)
    tl.store(values + row * k + rank, value, mask=taken)
    tl.store(chosen + row * k + rank, latent.to(tl.int64), mask=taken)
