"""The first two principal components of codes: raw, centred, and standardised.

A tall "stripe and cloud" in a scatter of raw codes often is the mean, or one latent of large scale,
and not structure; it goes away when the mean is taken off, or when each latent is divided by its
standard deviation. So the three are computed together, from the same passes over the codes.

The components are eigenvectors v of AᵀA with A = (X - 1 mᵀ) D, with m = 0 and D = 1 for raw codes.
A block Lanczos method finds them that multiplies by X alone: neither A nor a dense X is made. The
space for raw codes begins with the mean and so serves centred codes too, whose AᵀA is
XᵀX - n m mᵀ. A space grows until ‖AᵀA v - σ² v‖, which is known without another product, shows
that σ² is right and, where a component stands out, that v is.

Source: Golub and Underwood 1977, "The block Lanczos method for computing eigenvalues"; on how few
steps it takes from a random start, Musco and Musco 2015 (arXiv:1504.05477).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from saefty.metrics.firing import widened
from saefty.token_sample import Block, TokenSample

COMPONENTS = 2
BLOCK = 2  # random vectors that a space begins with: as many equal components are told apart
DENSE_BLOCK = 8  # where a pass over the codes costs far more than one vector more
MOST_VECTORS = 128  # of a space
EXACT = 1e-7  # ‖AᵀA v - σ² v‖ / σ² at most, of a component that stands out
ROUGH = 0.03  # and of one that does not: its σ is within 1.5 %
LOOKS = 2  # steps from one look at them to the next
FORMS = ("raw", "centred", "standardised")
APART = 1.1
DENSE_VALUES = 1 << 26  # of dense codes that are looked at: about 3,000 tokens of 20,000 latents
HELD_VALUES = 1 << 24  # of sparse codes that are held in double precision: 200 MB
CONSTANT = 1e-12  # share of the mean square below which a latent's variance is rounding
TINY = 1e-10  # share of AᵀA below which a direction is rounding
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
    found = {form: _projection(codes, spaces[form], form) for form in FORMS}
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
        total, square = np.zeros(self.width), np.zeros(self.width)
        for block in sample.blocks():
            if isinstance(block, csr_array):
                values = block.data.astype(np.float64)
                total += np.bincount(block.indices, values, minlength=self.width)
                square += np.bincount(block.indices, values * values, minlength=self.width)
            else:
                dense = widened(block).astype(np.float64)
                total += dense.sum(axis=0)
                square += np.einsum("ij,ij->j", dense, dense)
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
        sparse = [part for part in sample.parts if isinstance(part, csr_array)]
        self.is_sparse = len(sparse) == len(sample.parts)
        self._held: csr_array | None = None
        if sparse and self.is_sparse and sum(part.nnz for part in sparse) <= HELD_VALUES:
            self._held = csr_array(vstack(sparse, format="csr")).astype(np.float64)

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
        return np.hstack([np.zeros((len(w), 0)), *(_times(x, w, shift) for x in self._blocks())])

    def squared(
        self, w: Float[np.ndarray, "vectors d_sae"], shift: Float[np.ndarray, "vectors"]
    ) -> tuple[Float[np.ndarray, "vectors d_sae"], Float[np.ndarray, "vectors"]]:
        """Return Xᵀ (X w - shift) and 1ᵀ (X w - shift) for each vector w, in one pass over X."""
        product, total = np.zeros_like(w), np.zeros(len(w))
        for block in self._blocks():
            left = _times(block, w, shift)
            total += left.sum(axis=1)
            if isinstance(block, csr_array):
                columns = block.T
                for out, line in zip(product, left, strict=True):
                    out += columns @ line
            else:
                product += left @ block
        return product, total


def _times(x: Block, w: np.ndarray, shift: np.ndarray) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return w @ x.T - shift[:, None]
    # One after the other: SciPy takes longer for all of them at once.
    lines = [x @ line for line in w]
    return np.stack(lines) - shift[:, None] if lines else np.zeros((0, x.shape[0]))


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
        basis = self._basis[: self._known]
        along = product @ basis.T
        self._within[self._last, : self._known] = along
        self._within[: self._known, self._last] = along.T
        size = float(np.abs(self._within).max())
        self._rest = self._append(self._orthogonal(product), size)
        if not len(self.newest):
            # All that these vectors lead to is known: others find components equal to theirs.
            if np.abs(along).max() > TINY * size:
                self._append(self._orthogonal(self._drawn()), 1.0)
        elif look and all(self._is_found(form) for form in self._forms):
            self._new = slice(self._known, self._known)

    def _drawn(self) -> Float[np.ndarray, "block d_sae"]:
        block = BLOCK if self._codes.is_sparse else DENSE_BLOCK
        return self._rng.standard_normal((block, self._codes.width))

    def _orthogonal(self, vectors: np.ndarray) -> np.ndarray:
        basis = self._basis[: self._known]
        for _ in range(2):  # once leaves what rounding puts back
            vectors = vectors - (vectors @ basis.T) @ basis
        return vectors

    def _append(self, vectors: np.ndarray, size: float) -> np.ndarray:
        """Add the directions of vectors orthogonal to the basis; return the vectors in their terms.

        Args:
            vectors: The vectors.
            size: Of what they come from: a share of it too small to be more than rounding is left.
        """
        q, r = np.linalg.qr(vectors.T)
        new = q.T[np.abs(np.diag(r)) > TINY * size][: len(self._basis) - self._known]
        self._new = slice(self._known, self._known + len(new))
        self._basis[self._new] = new
        return np.asarray(r)

    def values(self, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return σ² of the first three components, ‖AᵀA v - σ² v‖, and v in the basis' terms."""
        within = self._within[: self._known, : self._known]
        if form == "centred":
            mean = self._basis[: self._known] @ self._codes.mean
            within = within - self._codes.n * np.outer(mean, mean)
        squares, vectors = np.linalg.eigh(within)
        squares, vectors = squares[::-1][: COMPONENTS + 1], vectors[:, ::-1][:, : COMPONENTS + 1]
        return squares, np.linalg.norm(self._rest @ vectors[self._last], axis=0), vectors

    def _is_found(self, form: str) -> bool:
        squares, errors, _ = self.values(form)
        if len(squares) <= COMPONENTS:
            return False
        for square, error in zip(squares[:COMPONENTS], errors, strict=False):
            needed = EXACT if square >= APART * squares[COMPONENTS] else ROUGH
            if error > needed * square and square > NOTHING**2 * squares[0]:
                return False
        return True

    def components(self, vectors: np.ndarray) -> Float[np.ndarray, "found d_sae"]:
        """Return vectors given in the basis' terms."""
        return vectors.T @ self._basis[: self._known]


def _projection(codes: _Codes, space: _Space, form: str) -> Projection:
    """Return the first components found."""
    scores, components = np.zeros((codes.n, COMPONENTS)), np.zeros((COMPONENTS, codes.width))
    shares = [0.0] * COMPONENTS
    if codes.squares[form] <= 0:
        return Projection(scores, (0.0, 0.0), components, (True, True))
    squares, _, vectors = space.values(form)
    found = space.components(vectors[:, :COMPONENTS])
    w = found * codes.scale if form == "standardised" else found
    lines = codes.times(w, np.zeros(len(w)) if form == "raw" else w @ codes.mean)
    lengths = np.linalg.norm(lines, axis=1)
    for i in np.flatnonzero(lengths > NOTHING * lengths[0]):
        sign = 1.0 if lines[i][np.argmax(np.abs(lines[i]))] >= 0 else -1.0
        scores[:, i], components[i] = sign * lines[i], sign * found[i]
        shares[i] = float(lengths[i] ** 2 / codes.squares[form])
    third = float(squares[COMPONENTS]) if len(squares) > COMPONENTS else 0.0
    apart = [float(one**2) >= APART * third for one in (*lengths, 0.0)]
    return Projection(scores, (shares[0], shares[1]), components, (apart[0], apart[1]))
