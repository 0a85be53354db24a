# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Sparse sums over the entries of a row or of a latent, and the step that follows them.

A program holds one row of the result, as wide as the activations, in registers, and adds the
entries to it one after the other: always in the same order, so the same bits come out every time.

Nothing may stand between `triton.jit` and a function, for it reads the source: `no_type_check`
keeps checks of types away.
"""

from typing import no_type_check

import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]


@triton.jit
@no_type_check
def decoded(
    values, latents, offsets, W_dec, b_dec, x, width, out, dots,
    ERROR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum a row's decoder rows; with ERROR also subtract x, and multiply the entries with that."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((WIDTH,), values.dtype.element_ty)
    for entry in range(first, last):
        weights = W_dec + tl.load(latents + entry) * width + columns
        total += tl.load(values + entry) * tl.load(weights, mask=inside, other=0.0)
    if ERROR:
        total += tl.load(b_dec + columns, mask=inside, other=0.0)
        total -= tl.load(x + row * width + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, total, mask=inside)
    if ERROR:
        for entry in range(first, last):
            weights = W_dec + tl.load(latents + entry) * width + columns
            dot = tl.sum(total * tl.load(weights, mask=inside, other=0.0), axis=0)
            tl.store(dots + entry, dot)


@triton.jit
@no_type_check
def row_dots(rows, latents, offsets, W, width, dots, WIDTH: tl.constexpr):
    """Multiply a row with the weights of each of its latents."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    mine = tl.load(rows + row * width + columns, mask=inside, other=0.0)
    for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        weights = W + tl.load(latents + entry) * width + columns
        dot = tl.sum(mine * tl.load(weights, mask=inside, other=0.0), axis=0)
        tl.store(dots + entry, dot)


@triton.jit
@no_type_check
def _entries(first, last, places, values, by_value, x, error, columns, inside, width):
    """Sum a latent's entries: for its encoder's weights, its bias, and its decoder's weights."""
    W_enc = tl.zeros_like(columns).to(x.dtype.element_ty)
    W_dec = W_enc
    b_enc = tl.full((), 0.0, x.dtype.element_ty)
    for entry in range(first, last):
        at = tl.load(places + entry) * width + columns
        slope = tl.load(by_value + entry)
        W_enc += slope * tl.load(x + at, mask=inside, other=0.0)
        W_dec += tl.load(values + entry) * tl.load(error + at, mask=inside, other=0.0)
        b_enc += slope
    return W_enc, b_enc, W_dec


@triton.jit
@no_type_check
def _finish(
    latent, W_enc, b_enc, W_dec, unit, columns, inside, width,
    to_W_enc, to_b_enc, to_W_dec, to_squared, UNIT: tl.constexpr,
):  # fmt: skip
    """Take out of a decoder's gradient what is along its row, and write all down."""
    at = latent * width + columns
    if UNIT:
        direction = tl.load(unit + at, mask=inside, other=0.0)
        W_dec -= tl.sum(W_dec * direction, axis=0) * direction
    squared = tl.sum(W_enc * W_enc, axis=0) + tl.sum(W_dec * W_dec, axis=0) + b_enc * b_enc
    tl.store(to_W_enc + at, W_enc, mask=inside)
    tl.store(to_W_dec + at, W_dec, mask=inside)
    tl.store(to_b_enc + latent, b_enc)
    tl.store(to_squared + latent, squared)


@triton.jit
@no_type_check
def latent_gradients(
    starts, places, values, by_value, x, error, unit, width, most,
    W_enc, b_enc, W_dec, squared, UNIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Make the gradients of a latent, both at once; one of more than `most` entries is left out."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    if last - first <= most:
        by_encoder, by_bias, by_decoder = _entries(
            first, last, places, values, by_value, x, error, columns, inside, width
        )
        _finish(
            latent, by_encoder, by_bias, by_decoder, unit, columns, inside, width,
            W_enc, b_enc, W_dec, squared, UNIT,
        )  # fmt: skip


@triton.jit
@no_type_check
def gradient_parts(
    firsts, lasts, places, values, by_value, x, error, width,
    W_enc, b_enc, W_dec, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum a part of the entries of a latent that has many: one program alone would be late."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    by_encoder, by_bias, by_decoder = _entries(
        tl.load(firsts + part), tl.load(lasts + part), places, values, by_value, x, error,
        columns, inside, width,
    )  # fmt: skip
    at = part * width + columns
    tl.store(W_enc + at, by_encoder, mask=inside)
    tl.store(W_dec + at, by_decoder, mask=inside)
    tl.store(b_enc + part, by_bias)


@triton.jit
@no_type_check
def gradients_of_parts(
    latents, starts, part_W_enc, part_b_enc, part_W_dec, unit, width,
    W_enc, b_enc, W_dec, squared, UNIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a latent, in their order."""
    here = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    by_encoder = tl.zeros((WIDTH,), part_W_enc.dtype.element_ty)
    by_decoder = by_encoder
    by_bias = tl.full((), 0.0, part_W_enc.dtype.element_ty)
    for part in range(tl.load(starts + here), tl.load(starts + here + 1)):
        at = part * width + columns
        by_encoder += tl.load(part_W_enc + at, mask=inside, other=0.0)
        by_decoder += tl.load(part_W_dec + at, mask=inside, other=0.0)
        by_bias += tl.load(part_b_enc + part)
    _finish(
        tl.load(latents + here), by_encoder, by_bias, by_decoder, unit, columns, inside, width,
        W_enc, b_enc, W_dec, squared, UNIT,
    )  # fmt: skip


@triton.jit
@no_type_check
def adamw(
    weights, mean, power, gradient, size, each,
    factor, rate, beta1, rest1, beta2, rest2, eps, kept, first_share, second_share,
    UNIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Move `each` numbers by AdamW, and bring them to length 1 if they are a unit row."""
    columns = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * each + columns
    inside = (columns < each) & (at < size)
    slope = tl.load(gradient + at, mask=inside, other=0.0) * factor
    first = beta1 * tl.load(mean + at, mask=inside, other=0.0) + rest1 * slope
    second = beta2 * tl.load(power + at, mask=inside, other=0.0) + rest2 * slope * slope
    tl.store(mean + at, first, mask=inside)
    tl.store(power + at, second, mask=inside)
    moved = tl.load(weights + at, mask=inside, other=0.0) * kept
    moved -= rate * (first / first_share) / (tl.sqrt(second / second_share) + eps)
    if UNIT:
        moved = tl.where(inside, moved, 0.0)
        moved = moved / tl.sqrt(tl.sum(moved * moved, axis=0))
    tl.store(weights + at, moved, mask=inside)
