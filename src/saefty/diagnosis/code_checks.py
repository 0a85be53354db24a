"""Whether kept codes are z of the rows they are said to be of, decided by the SAE's own arithmetic.

A sample of the kept matrix is compared with what the SAE makes of the same rows of a store: its
codes, its pre-activations, its reconstruction, the codes of another layer or of rows that were
normalised first; and the same with the matrix's axes swapped. Each comparison is a relative error,
‖kept - made‖ / ‖made‖, over all sampled tokens together. Where nothing agrees row by row, each
sampled token is looked for in the whole store, because a dump may hold some of the rows only, or
hold them in another order.

Of a dump one chunk is open at a time, and of the store one block of rows is held.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.diagnosis.code_readings import CODES, Reading, RowSource, code_readings
from saefty.diagnosis.code_samples import Kept
from saefty.diagnosis.finding import AXES_SWAPPED, OVERFLOW, SCALE, WRONG_TENSOR, Finding
from saefty.diagnosis.judgement import MOST_SPOILT
from saefty.saes.base import SparseAutoencoder

AGREES = 0.05
"""Relative error below which kept numbers are what they are compared with; bfloat16 gives 0.01."""
CLEARLY = 0.5
"""How many times smaller an error is clearly smaller."""
LARGEST_HALF = 65504.0
SEARCHED_TOKENS, SEARCHED_ROWS = 48, 1 << 16
BLOCK_NUMBERS = 1 << 23
MOST, NEARLY_ALL = 0.9, 0.98


@dataclass(frozen=True)
class Comparison:
    """How far kept numbers are from what they are compared with.

    Attributes:
        name: What they are compared with.
        error: Relative error over the numbers that no format cut off.
        factor: What the made numbers are best multiplied by.
        rest: Relative error then.
        reading: What they are compared with.
        swapped: Whether the matrix was read with its axes swapped.
        order: How the tokens lie beside the store's rows, where that is not row by row.
        found: Share of the sampled tokens that agree, where they were looked for.
        like: Whether what was found is of like rows, and not of the same ones.
    """

    name: str
    error: float
    factor: float
    rest: float
    reading: Reading
    swapped: bool
    order: str = ""
    found: float = 1.0
    like: bool = False


@dataclass(frozen=True)
class CodeCheck:
    """What kept codes are.

    Attributes:
        kind: What they agree with; None where they agree with nothing that was tried.
        error: Relative error of that, else of what comes nearest; infinite if nothing compares.
        errors: Relative error of everything that was compared row by row.
        findings: The same in words.
    """

    kind: str | None
    error: float
    errors: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def check_codes(
    kept: Kept,
    sae: SparseAutoencoder,
    store: RowSource,
    layer: int,
    *,
    swapped: Kept | None = None,
    same_texts: bool | None = None,
) -> CodeCheck:
    """Say what kept codes are.

    Args:
        kept: Sampled tokens.
        sae: The SAE that they are said to come from.
        store: The activations they are said to be of, float32, and other layers if there are any.
        layer: The layer that the SAE reads.
        swapped: The same matrix with its axes swapped, where its shape allows that.
        same_texts: Whether the codes are of texts that the store holds; None where nobody knows.
    """
    readings = code_readings(sae, store, layer)
    ways = [(kept, False), *([(swapped, True)] if swapped is not None else [])]
    compared = [
        one
        for way, other in ways
        for reading in readings
        if (one := _row_by_row(way, store, reading, other)) is not None
    ]
    errors = {one.name: one.error for one in compared}
    best = _nearest(compared)
    scaled = [one for one in compared if one.reading.name == CODES and one.rest <= AGREES]
    if best is None or best.error > AGREES:
        best = scaled[0] if scaled else _searched(ways, readings, store, same_texts) or best
    n_tokens = swapped.n_tokens if best and best.swapped and swapped else kept.n_tokens
    if best is None or min(best.error, best.rest) > AGREES:
        error = best.error if best else math.inf
        unknown = _unknown(best, kept.values.shape[1], sae.d_sae)
        return CodeCheck(None, error, errors, (unknown, *_overflow(kept)))
    said = (*_said(best, n_tokens, store.n_rows, same_texts), *_overflow(kept))
    return CodeCheck(best.name, best.error, errors, said)


def _nearest(compared: Sequence[Comparison]) -> Comparison | None:
    """Return the best comparison; the SAE's own codes, unless another is clearly nearer.

    Where a change of reading changes next to nothing, rounding decides which of the two is nearer.
    """
    best = min(compared, key=lambda one: one.error, default=None)
    own = [one for one in compared if one.reading.name == CODES and one.error <= AGREES]
    own = [one for one in own if best is None or best.error >= CLEARLY * one.error]
    return min(own, key=lambda one: (one.swapped, one.error), default=best)


def _row_by_row(kept: Kept, store: RowSource, reading: Reading, swapped: bool) -> Comparison | None:
    """Compare tokens with the rows of the same numbers; None where widths differ."""
    there = kept.rows < store.n_rows
    if reading.width != kept.values.shape[1] or not there.any():
        return None
    made = reading.made(store.take(reading.layer, kept.rows[there]))
    return _compared(kept.values[there], made, reading, swapped)


def _compared(
    values: Float[np.ndarray, "tokens width"],
    made: Float[np.ndarray, "tokens width"],
    reading: Reading,
    swapped: bool,
) -> Comparison:
    good = _whole(values)
    v, h = np.where(good, values, 0.0), np.where(good, made, 0.0)
    size = float((h * h).sum())
    factor = float((v * h).sum()) / size if size > 0 else 0.0
    name = f"{reading.name}, axes swapped" if swapped else reading.name
    errors = [
        math.sqrt(float(((v - by * h) ** 2).sum()) / size) if size > 0 else math.inf
        for by in (1.0, factor)
    ]
    # The factor's own size counts: all numbers are near 0 times something.
    rest = errors[1] / abs(factor) if factor else math.inf
    return Comparison(name, errors[0], factor, rest, reading, swapped)


def _whole(values: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Return which numbers no format cut off."""
    return np.asarray(np.isfinite(values) & (np.abs(values) != LARGEST_HALF))


def _searched(
    ways: Sequence[tuple[Kept, bool]],
    readings: Sequence[Reading],
    store: RowSource,
    same_texts: bool | None,
) -> Comparison | None:
    """Look for sampled tokens among all rows; return what agrees with most of them, if any."""
    found = [
        one
        for kept, swapped in ways
        for reading in readings
        if reading.width == kept.values.shape[1]
        and (one := _search(kept, reading, store, swapped)) is not None
    ]
    best = min(found, key=lambda one: one.error, default=None)
    return replace(best, like=True) if best and same_texts is False else best


def _search(kept: Kept, reading: Reading, store: RowSource, swapped: bool) -> Comparison | None:
    fires = np.flatnonzero((_whole(kept.values) & (kept.values != 0)).any(axis=1))
    chosen = fires[np.linspace(0, len(fires) - 1, min(len(fires), SEARCHED_TOKENS)).astype(int)]
    if len(chosen) == 0:
        return None
    good = _whole(kept.values[chosen])
    wanted = np.where(good, kept.values[chosen], 0.0)
    sizes = (wanted**2).sum(axis=1)
    nearest, place = np.full(len(chosen), np.inf), np.zeros(len(chosen), np.int64)
    for rows in _blocks(store.n_rows, reading.width):
        made = reading.made(store.take(reading.layer, rows))
        distance = sizes[:, None] + good @ (made**2).T - 2 * wanted @ made.T
        at = distance.argmin(axis=1)
        least = distance[np.arange(len(chosen)), at]
        closer = least < nearest
        nearest[closer], place[closer] = least[closer], rows[at[closer]]
    errors = np.sqrt(nearest.clip(min=0) / np.where(sizes > 0, sizes, 1.0))
    same = errors <= AGREES
    if same.mean() < 0.5:
        return None
    one = _compared(
        kept.values[chosen[same]],
        reading.made(store.take(reading.layer, place[same])),
        reading,
        swapped,
    )
    share, order = float(same.mean()), _order(kept.rows[chosen[same]], place[same])
    apart = len(np.unique(place[same])) >= MOST * int(same.sum())
    like = order == ANOTHER_ORDER and not (share >= NEARLY_ALL and apart)
    return replace(one, order=order, found=share, like=like)


def _blocks(n_rows: int, width: int) -> Iterator[Int[np.ndarray, "rows"]]:
    size = max(1, BLOCK_NUMBERS // max(width, 1))
    for first in range(0, min(n_rows, SEARCHED_ROWS), size):
        yield np.arange(first, min(first + size, n_rows, SEARCHED_ROWS))


ANOTHER_ORDER = "they lie in another order than the store's rows"


def _order(tokens: Int[np.ndarray, "found"], places: Int[np.ndarray, "found"]) -> str:
    """Say how tokens lie beside the rows they were found at."""
    shifts, counts = np.unique(places - tokens, return_counts=True)
    if counts.max() >= MOST * len(tokens):
        return f"token 0 is row {shifts[counts.argmax()]:,} of the store, and they go on alike"
    if len(tokens) > 1 and (np.diff(places) >= 0).mean() >= MOST:
        return "they are some of the store's rows, in the store's order"
    return ANOTHER_ORDER


def _said(
    one: Comparison, n_tokens: int, n_rows: int, same_texts: bool | None
) -> Iterator[Finding]:
    numbers = {"error": one.error, "factor": one.factor}
    if one.swapped:
        yield Finding(
            "axes_swapped", "sick",
            f"The kept matrix is {one.reading.name} with its axes swapped: it holds [latents, "
            f"tokens] (relative error {one.error:.1g}).",
            numbers, (AXES_SWAPPED,),
        )  # fmt: skip
    if one.reading.cause is not None:
        yield Finding(
            "not_these_codes", "sick",
            f"The kept numbers are {one.reading.name} (relative error {one.error:.1g}).",
            numbers, (one.reading.cause,),
        )  # fmt: skip
    elif one.error > AGREES:
        yield Finding(
            "scaled_codes", "warning",
            f"The kept numbers are the SAE's codes times {one.factor:.4g} (relative error "
            f"{one.rest:.1g} then).",
            numbers, (SCALE,),
        )  # fmt: skip
    elif not one.swapped and not one.like:
        yield Finding(
            "these_codes", "info",
            f"The kept numbers are the SAE's codes of these rows (relative error {one.error:.1g}).",
            numbers,
        )  # fmt: skip
    yield from _like(one, n_rows, same_texts) if one.like else _lying(one, n_tokens, n_rows)


def _overflow(kept: Kept) -> Iterator[Finding]:
    share = float((~_whole(kept.values)).mean())
    if share and (kept.half or (np.abs(kept.values) == LARGEST_HALF).any()):
        yield Finding(
            "overflow", "sick",
            f"{share:.2%} of the sampled numbers are infinite, NaN or {LARGEST_HALF:,.0f}, the end "
            "of float16; the SAE's own arithmetic in float32 has no such end.",
            {"share": share}, (OVERFLOW,),
        )  # fmt: skip
    elif share:
        yield Finding(
            "not_whole", "sick" if share > MOST_SPOILT else "warning",
            f"{share:.2%} of the sampled numbers are infinite or NaN, and they were not kept in "
            "float16: what made them is damaged, or divided by zero.",
            {"share": share},
        )  # fmt: skip


def _like(one: Comparison, n_rows: int, same_texts: bool | None) -> Iterator[Finding]:
    texts = "the texts are not the same" if same_texts is False else "the texts may be others"
    what = "codes that this SAE gives to" if one.reading.name == CODES else f"{one.reading.name} of"
    yield Finding(
        "like_rows", "warning",
        f"The kept numbers are {what} like "
        f"activations, and not of these rows: {one.found:.0%} of the sampled tokens come near one"
        f"{_searched_of(n_rows)} (relative error {one.error:.1g}), at scattered places; {texts}.",
        {"error": one.error, "rows": n_rows, "found": one.found},
    )  # fmt: skip


def _searched_of(n_rows: int) -> str:
    """Return of how many rows, in words, those that were looked at are."""
    first = f"the first {SEARCHED_ROWS:,} of " if n_rows > SEARCHED_ROWS else ""
    return f" of {first}{n_rows:,} rows"


def _lying(one: Comparison, n_tokens: int, n_rows: int) -> Iterator[Finding]:
    numbers = {"tokens": n_tokens, "rows": n_rows, "found": one.found}
    if one.order:
        yield Finding(
            "other_rows", "warning",
            f"Token and row of the same number do not belong together: {one.order}. {one.found:.0%}"
            f" of the sampled tokens were found{_searched_of(n_rows).replace(' of', ' in', 1)}.",
            numbers,
        )  # fmt: skip
    elif n_tokens != n_rows:
        fewer = "the first of the store's rows" if n_tokens < n_rows else "all of the store's rows"
        rest = "" if n_tokens < n_rows else ", and tokens that the store does not hold"
        yield Finding(
            "other_number", "info",
            f"{n_tokens:,} tokens were kept, and the store holds {n_rows:,} rows; they are {fewer}"
            f"{rest}.",
            numbers,
        )  # fmt: skip


def _unknown(best: Comparison | None, width: int, d_sae: int) -> Finding:
    if best is None:
        return Finding(
            "unknown_codes", "sick",
            f"The kept matrix is {width} wide; the SAE has {d_sae} latents, and nothing else that "
            "it computes is so wide either: these are the codes of another SAE.",
            {"width": width, "d_sae": d_sae}, (WRONG_TENSOR,),
        )  # fmt: skip
    return Finding(
        "unknown_codes", "warning",
        f"The kept numbers agree with nothing that the SAE makes of these rows; nearest comes "
        f"{best.name} (relative error {best.error:.2g}). They may be of other texts, of another "
        "SAE, or of another place in the model.",
        {"error": best.error},
    )  # fmt: skip
