"""The first two principal components of codes: raw, centred, and standardised.

A tall "stripe and cloud" in a scatter of raw codes often is the mean, or one latent of large scale,
and not structure; it goes away when the mean is taken off, or when each latent is divided by its
standard deviation. So the three are computed together, from the same passes over the codes.

The components are eigenvectors v of AᵀA with A = (X - 1 mᵀ) D, with m = 0 and D = 1 for raw codes.
A block Lanczos method finds them that multiplies by X alone: neither A nor a dense X is made. The
space for raw codes begins with the mean and so serves centred codes too, whose AᵀA is
XᵀX - n m mᵀ. A space grows until ‖AᵀA v - σ² v‖, which is known without another product, shows
that σ² is right and, where a component stands out, that v is. That σ² is right, any v of the space
may show: the one for which ‖AᵀA v - σ² v‖ is least shows it several steps before the component
itself does, because of components that are about as long the space holds mixtures.

Source: Golub and Underwood 1977, "The block Lanczos method for computing eigenvalues"; on how few
steps it takes from a random start, Musco and Musco 2015 (arXiv:1504.05477); on the vectors of least
‖AᵀA v - σ² v‖, Jia 1997, "Refined iterative algorithms based on Arnoldi's process for large
unsymmetric eigenproblems".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from saefty.metrics.firing import widened
from saefty.token_sample import Block, TokenSample

COMPONENTS = 2
BLOCK = 2  # random vectors that a space begins with: as many equal components are told apart
DENSE_BLOCK = 8  # where a pass over the codes costs far more than one vector more
MOST_VECTORS = 128  # of a space
EXACT = 1e-7  # ‖AᵀA v - σ² v‖ / σ² at most, of a component that stands out
ROUGH = 0.015  # of some v, where a component does not: its σ is within 1.5 %
NEAR = 12  # components of a space of which that v is made
LOOKS = 2  # steps from one look at them to the next
FORMS = ("raw", "centred", "standardised")
APART = 1.1
DENSE_VALUES = 1 << 26  # of dense codes that are looked at: about 3,000 tokens of 20,000 latents
HELD_VALUES = 1 << 24  # of sparse codes that are held in double precision: 200 MB
CONSTANT = 1e-12  # share of the mean square below which a latent's variance is rounding
TINY = 1e-10  # share of AᵀA below which a direction is rounding
LOST = 1e-3  # what is left of a vector once what is known is taken off: below, that is done again
NOTHING = 1e-7  # σ, as a share of the first one, below which a component is rounding


@dataclass(frozen=True)
class Projection:
    """Tokens along the first two components of one form of the codes.

    Attributes:
        scores: Coordinates of each token; a component that there is not is 0.
        shares: Share of the sum of squares of that form along each component.
        components: The components, one row each, of length 1 in the space of that form.
        stands_out: Whether the sum of squares along each component is a tenth above that along
            the third one; otherwise many directions are about as long, and which two are shown
            means little.
    """

    scores: Float[np.ndarray, "tokens 2"]
    shares: tuple[float, float]
    components: Float[np.ndarray, "2 d_sae"]
    stands_out: tuple[bool, bool]


@dataclass(frozen=True)
class CodePca:
    """Projections of the same tokens.

    Attributes:
        forms: `raw`, `centred` and `standardised`.
        l0: How many latents are active on each token.
        mean_cosine: |cosine| between the first raw component and the mean code: near 1, the
            component is the mean. NaN where either is 0.
    """

    forms: dict[str, Projection]
    l0: Int[np.ndarray, "tokens"]
    mean_cosine: float


def project_codes(sample: TokenSample, seed: int = 0) -> CodePca:
    """Return the first two principal components of the sampled tokens, in three forms.

    Of dense codes every second, third, … token is taken, so that this lasts seconds.

    Args:
        sample: The tokens.
        seed: Of the random start; components that stand out do not depend on it.

    Returns:
        The projections. A component's sign is chosen so that its largest score is positive.
    """
    codes = _Codes(_thinned(sample))
    spaces = _spaces(codes, np.random.default_rng(seed))
    found = _projections(codes, spaces)
    mean, first = codes.mean, found["raw"].components[0]
    length = float(np.linalg.norm(mean) * np.linalg.norm(first))
    cosine = abs(float(mean @ first)) / length if length > 0 else float("nan")
    return CodePca(found, codes.sample.l0(), min(cosine, 1.0) if cosine == cosine else cosine)


def _thinned(sample: TokenSample) -> TokenSample:
    size = sum(part.size for part in sample.parts if isinstance(part, np.ndarray))
    step = -(-size // DENSE_VALUES)
    if step <= 1:
        return sample
    parts, first = [], 0
    for part in sample.parts:
        rows = slice(-first % step, None, step)
        parts.append(csr_array(part[rows]) if isinstance(part, csr_array) else part[rows])
        first += part.shape[0]
    return TokenSample(tuple(parts), sample.width)


class _Codes:
    """X, the means and scales of its latents, and products with it."""

    def __init__(self, sample: TokenSample) -> None:
        self.sample, self.n, self.width = sample, sample.n_tokens, sample.width
        sparse = [part for part in sample.parts if isinstance(part, csr_array)]
        self.is_sparse = len(sparse) == len(sample.parts)
        self._held: csr_array | None = None
        if sparse and self.is_sparse and sum(part.nnz for part in sparse) <= HELD_VALUES:
            self._held = _joined(sparse)
        total, square = np.zeros(self.width), np.zeros(self.width)
        for block in self._blocks():
            if isinstance(block, csr_array):
                each = np.ones(block.shape[0])
                total += block.T @ each
                parts = (block.data * block.data, block.indices, block.indptr)
                square += csr_array(parts, shape=block.shape).T @ each
            else:
                total += block.sum(axis=0)
                square += np.einsum("ij,ij->j", block, block)
        tokens = max(self.n, 1)
        self.mean = total / tokens
        variance = square / tokens - self.mean**2
        varies = variance > CONSTANT * square / tokens
        self.scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
        self.squares = {
            "raw": float(square.sum()),
            "centred": float(variance[varies].sum() * self.n),
            "standardised": float(varies.sum() * self.n),
        }

    def _blocks(self) -> Iterator[Block]:
        # In double precision, because a mean much larger than what varies is taken off.
        if self._held is not None:
            yield self._held
            return
        for block in self.sample.blocks():
            wide = block if isinstance(block, csr_array) else widened(block)
            yield wide.astype(np.float64)

    def times(
        self, w: Float[np.ndarray, "vectors d_sae"], shift: Float[np.ndarray, "vectors"]
    ) -> Float[np.ndarray, "vectors tokens"]:
        """Return X w - shift for each vector w."""
        lines = [np.zeros((len(w), 0)), *(_times(x, w, shift) for x in self._blocks())]
        return np.concatenate(lines, axis=1)

    def squared(
        self, w: Float[np.ndarray, "vectors d_sae"], shift: Float[np.ndarray, "vectors"]
    ) -> tuple[Float[np.ndarray, "vectors d_sae"], Float[np.ndarray, "vectors"]]:
        """Return Xᵀ (X w - shift) and 1ᵀ (X w - shift) for each vector w, in one pass over X."""
        product, total = np.zeros_like(w), np.zeros(len(w))
        for block in self._blocks():
            left = _times(block, w, shift)
            total += left.sum(axis=1)
            product += (block.T @ left.T).T if isinstance(block, csr_array) else left @ block
        return product, total


def _times(x: Block, w: np.ndarray, shift: np.ndarray) -> np.ndarray:
    # All vectors together: the codes are then read once for all of them.
    return ((x @ w.T).T if isinstance(x, csr_array) else w @ x.T) - shift[:, None]


def _joined(parts: list[csr_array]) -> csr_array:
    """Return parts below one another, in double precision and with short indices.

    SciPy's own `vstack` has indices of 64 bits wherever a part has, and products take longer then.
    """
    starts = np.cumsum([0, *(part.nnz for part in parts)])
    ends = [part.indptr[1:] + start for part, start in zip(parts, starts, strict=False)]
    values = np.concatenate([part.data for part in parts], dtype=np.float64)
    ids = np.concatenate([part.indices for part in parts], dtype=np.int32, casting="same_kind")
    bounds = np.concatenate([[0], *ends]).astype(np.int32)
    return csr_array((values, ids, bounds), shape=(len(bounds) - 1, parts[0].shape[1]))


def _spaces(codes: _Codes, rng: np.random.Generator) -> dict[str, "_Space"]:
    """Grow a space for raw and centred codes and one for standardised codes; return each form's."""
    raw = _Space(codes, ("raw", "centred"), rng, codes.mean)
    standardised = _Space(codes, ("standardised",), rng)
    for step in range(1, MOST_VECTORS):
        w, v = raw.newest, standardised.newest * codes.scale
        if len(w) + len(v) == 0:
            break
        shift = np.concatenate([np.zeros(len(w)), v @ codes.mean])
        product, total = codes.squared(np.vstack([w, v]), shift)
        product[len(w) :] -= np.outer(total[len(w) :], codes.mean)
        raw.extend(product[: len(w)], look=step % LOOKS == 0)
        standardised.extend(product[len(w) :] * codes.scale, look=step % LOOKS == 0)
    return {"raw": raw, "centred": raw, "standardised": standardised}


class _Space:
    """An orthonormal basis, one vector a row, and AᵀA of raw or standardised codes within it.

    Args:
        codes: The codes.
        forms: Whose components are sought in it.
        rng: Draws the vectors that it begins with.
        first: A vector that it begins with besides.
    """

    def __init__(
        self,
        codes: _Codes,
        forms: tuple[str, ...],
        rng: np.random.Generator,
        first: Float[np.ndarray, "d_sae"] | None = None,
    ) -> None:
        self._codes, self._rng = codes, rng
        self._forms = [form for form in forms if codes.squares[form] > 0]
        most = min(MOST_VECTORS, codes.width) if self._forms else 0
        self._basis = np.empty((most, codes.width))
        self._within = np.zeros((most, most))
        self._known = 0  # of so many vectors AᵀA was taken
        self._last = self._new = slice(0, 0)
        self._rest = np.zeros((0, 0))
        start = self._drawn()
        if first is not None:
            start = np.vstack([first / (np.linalg.norm(first) or 1.0), start])
        self._append(start, 1.0)

    @property
    def newest(self) -> Float[np.ndarray, "block d_sae"]:
        """The vectors of which AᵀA is to be taken next; none once all is found."""
        return self._basis[self._new]

    def extend(self, product: Float[np.ndarray, "block d_sae"], look: bool) -> None:
        """Take AᵀA of the newest vectors and add what is new in it, unless a look finds it all."""
        if not len(product):
            return
        self._last, self._known = self._new, self._new.stop
        along, rest = self._split(product)
        self._within[self._last, : self._known] = along
        self._within[: self._known, self._last] = along.T
        size = float(np.abs(self._within).max())
        self._rest = self._append(rest, size)
        if not len(self.newest):
            # All that these vectors lead to is known: others find components equal to theirs.
            if np.abs(along).max() > TINY * size:
                self._append(self._split(self._drawn())[1], 1.0)
        elif look and all(self._is_found(form) for form in self._forms):
            self._new = slice(self._known, self._known)

    def _drawn(self) -> Float[np.ndarray, "block d_sae"]:
        block = BLOCK if self._codes.is_sparse else DENSE_BLOCK
        return self._rng.standard_normal((block, self._codes.width))

    def _split(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return vectors' parts along the basis, in its terms, and what is orthogonal to it."""
        basis = self._basis[: self._known]
        along = vectors @ basis.T
        rest = vectors - along @ basis
        if (_lengths(rest) < LOST * _lengths(vectors)).any():
            rest -= (rest @ basis.T) @ basis  # what rounding left, which is a large part by now
        return along, rest

    def _append(self, vectors: np.ndarray, size: float) -> np.ndarray:
        """Add the directions of vectors orthogonal to the basis; return the vectors in their terms.

        Args:
            vectors: The vectors.
            size: Of what they come from: a share of it too small to be more than rounding is left.
        """
        q, r = _directions(vectors, TINY * size)
        new = q[np.diag(r) > TINY * size][: len(self._basis) - self._known]
        self._new = slice(self._known, self._known + len(new))
        self._basis[self._new] = new
        return r

    def values(self, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return σ² of the first components, AᵀA v - σ² v in other terms, and v in the basis'."""
        within = self._within[: self._known, : self._known]
        if form == "centred":
            mean = self._basis[: self._known] @ self._codes.mean
            within = within - self._codes.n * np.outer(mean, mean)
        squares, vectors = np.linalg.eigh(within)
        squares, vectors = squares[::-1][:NEAR], vectors[:, ::-1][:, :NEAR]
        return squares, self._rest @ vectors[self._last], vectors

    def _is_found(self, form: str) -> bool:
        squares, rests, _ = self.values(form)
        if len(squares) <= COMPONENTS:
            return False
        for i, square in enumerate(squares[:COMPONENTS]):
            if square <= NOTHING**2 * squares[0]:
                continue
            if square >= APART * squares[COMPONENTS]:
                error, needed = float(np.linalg.norm(rests[:, i])), EXACT
            else:
                # Of all v orthogonal to the components before, which may be right already.
                every = np.vstack([np.diag(squares[i:] - square), rests[:, i:]])
                error, needed = float(np.linalg.svd(every, compute_uv=False)[-1]), ROUGH
            if error > needed * square:
                return False
        return True

    def components(self, vectors: np.ndarray) -> Float[np.ndarray, "found d_sae"]:
        """Return vectors given in the basis' terms."""
        return vectors.T @ self._basis[: self._known]


def _directions(vectors: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return orthonormal rows q and an upper r with vectors = rᵀ q; shorter ones have no direction.

    By Gram and Schmidt, twice: for so few vectors that takes a third of the time of NumPy's QR.
    """
    q, r = np.zeros_like(vectors), np.zeros((len(vectors), len(vectors)))
    for i, vector in enumerate(vectors):
        for _ in range(2):
            along = q[:i] @ vector
            r[:i, i] += along
            vector = vector - along @ q[:i]
        r[i, i] = np.linalg.norm(vector)
        if r[i, i] > least:
            q[i] = vector / r[i, i]
    return q, r


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def _projections(codes: _Codes, spaces: dict[str, _Space]) -> dict[str, Projection]:
    """Return the first components found of each form, whose scores take one pass over the codes."""
    squares, components = {}, {}
    for form in FORMS:
        if codes.squares[form] > 0:
            squares[form], _, vectors = spaces[form].values(form)
            components[form] = spaces[form].components(vectors[:, :COMPONENTS])
        else:
            squares[form], components[form] = np.zeros(0), np.zeros((0, codes.width))
    scaled = {f: v * codes.scale if f == "standardised" else v for f, v in components.items()}
    shifts = [w @ codes.mean * (form != "raw") for form, w in scaled.items()]
    lines = codes.times(np.vstack(list(scaled.values())), np.concatenate(shifts))
    ends = np.cumsum([len(w) for w in scaled.values()])
    return {
        form: _projection(codes, form, squares[form], components[form], own)
        for form, own in zip(FORMS, np.split(lines, ends[:-1]), strict=True)
    }


def _projection(
    codes: _Codes, form: str, squares: np.ndarray, found: np.ndarray, lines: np.ndarray
) -> Projection:
    """Return the components found and the codes along them."""
    scores, components = np.zeros((codes.n, COMPONENTS)), np.zeros((COMPONENTS, codes.width))
    shares = [0.0] * COMPONENTS
    if codes.squares[form] <= 0:
        return Projection(scores, (0.0, 0.0), components, (True, True))
    lengths = _lengths(lines)
    for i in np.flatnonzero(lengths > NOTHING * lengths[0]):
        sign = 1.0 if lines[i][np.argmax(np.abs(lines[i]))] >= 0 else -1.0
        scores[:, i], components[i] = sign * lines[i], sign * found[i]
        shares[i] = float(lengths[i] ** 2 / codes.squares[form])
    third = float(squares[COMPONENTS]) if len(squares) > COMPONENTS else 0.0
    apart = [float(one**2) >= APART * third for one in (*lengths, 0.0)]
    return Projection(scores, (shares[0], shares[1]), components, (apart[0], apart[1]))
