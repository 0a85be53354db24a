"""Shortcuts in the data: ways to know the label without any understanding of harm.

A latent, a probe or a whole model can look good because harmful texts are longer, because a text
stands on both sides of a split, or because everything harmful came from one dataset. Each check
returns a warning that names the shortcut with its numbers, or nothing.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import csr_array

from saefty.metrics.base import group_codes
from saefty.metrics.intervals import Bootstrap, Interval

LENGTH_MARGIN = 0.1
SHINGLE = 5
NEAR = 0.9
HASH_SPACE = 1 << 20
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class LeakWarning:
    """One shortcut.

    Attributes:
        name: `length`, `words`, `duplicates`, `near_duplicates`, `conflicting_labels` or `source`.
        message: What was found, with its numbers, and what to do about it.
        figures: The numbers by name.
    """

    name: str
    message: str
    figures: dict[str, float] = field(default_factory=dict)


def find_leaks(
    texts: Sequence[str],
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    sources: Int[np.ndarray, "examples"] | None = None,
    parts: tuple[Bool[np.ndarray, "examples"], Bool[np.ndarray, "examples"]] | None = None,
    *,
    images: Sequence[str | None] | None = None,
    words_auroc: Interval | None = None,
    source_names: Sequence[str] | None = None,
    seed: int = 0,
) -> list[LeakWarning]:
    """Return every shortcut that was found, the gravest first.

    Args:
        texts: What the model read, one an example.
        harmful: The labels; both kinds must be present.
        clusters: A code an example, equal for examples that belong together; None if all are apart.
        sources: A code an example for the dataset it came from; None if there is one.
        parts: The two sides of a split, such as selection and report; None skips duplicates.
        images: A name an example for the content of its image, None where it has none; texts with
            different images are no duplicates. None if there are no images.
        words_auroc: Held-out AUROC of a bag of words, where one was measured.
        source_names: Names of the source codes, for the messages.
        seed: Fixes the bootstrap.

    Returns:
        The warnings; an empty list if nothing was found.
    """
    found = [source_leak(harmful, sources, source_names)]
    if parts is not None:
        found += duplicate_leaks(texts, harmful, *parts, images)
    found.append(length_leak(texts, harmful, clusters, seed=seed))
    found.append(words_leak(words_auroc))
    return [warning for warning in found if warning is not None]


def length_leak(
    texts: Sequence[str],
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    *,
    seed: int = 0,
) -> LeakWarning | None:
    """Warn if the length of a text tells its label: AUROC off ½ by 0.1, with an interval off ½."""
    lengths = np.array([len(text) for text in texts], dtype=float)
    area = Bootstrap(len(texts), clusters, seed=seed).ranking(lengths, harmful)["auroc"]
    certain = area.low > 0.5 or area.high < 0.5
    if not certain or abs(area.estimate - 0.5) < LENGTH_MARGIN:
        return None
    longer = "longer" if area.estimate > 0.5 else "shorter"
    medians = [float(np.median(lengths[group])) for group in (harmful, ~harmful)]
    return LeakWarning(
        "length",
        f"the label leaks through length: harmful texts are {longer} (median {medians[0]:.0f} "
        f"characters against {medians[1]:.0f}), and length alone tells them apart with AUROC "
        f"{area}. Match the lengths of the two groups.",
        {
            "auroc": area.estimate,
            "low": area.low,
            "high": area.high,
            "median_harmful": medians[0],
            "median_harmless": medians[1],
        },
    )


def words_leak(auroc: Interval | None) -> LeakWarning | None:
    """Warn if single words tell the label: held-out AUROC of 0.6 or more, its interval above ½."""
    if auroc is None or auroc.estimate < 0.5 + LENGTH_MARGIN or not auroc.low > 0.5:
        return None
    return LeakWarning(
        "words",
        f"the label leaks through single words: a bag of words alone reaches AUROC {auroc} on "
        "held-out prompt groups. What a latent adds beyond vocabulary is not shown by its AUROC; "
        "compare it with this figure, or balance the words.",
        {"auroc": auroc.estimate, "low": auroc.low, "high": auroc.high},
    )


def source_leak(
    harmful: Bool[np.ndarray, "examples"],
    sources: Int[np.ndarray, "examples"] | None,
    names: Sequence[str] | None = None,
) -> LeakWarning | None:
    """Warn if examples come from sources whose examples all have one label."""
    if sources is None or len(np.unique(sources)) < 2:
        return None
    codes = group_codes(sources, len(harmful))
    shares = np.bincount(codes, weights=harmful) / np.bincount(codes)
    fixed = np.isin(shares, (0.0, 1.0))
    examples = fixed[codes].mean()
    if not fixed.any():
        return None
    accuracy = (np.maximum(shares, 1 - shares) * np.bincount(codes)).sum() / len(harmful)
    label = [str(code) if names is None else names[int(code)] for code in np.unique(sources)]
    listed = ", ".join(
        f"{label[i]} ({'all harmful' if shares[i] else 'all harmless'})"
        for i in np.flatnonzero(fixed)[:6]
    )
    return LeakWarning(
        "source",
        f"the source gives the label away: {fixed.sum()} of {len(fixed)} sources have one label "
        f"only, {listed}; they hold {examples:.0%} of the examples, and the source alone labels "
        f"{accuracy:.0%} right. Whatever else differs between the sources passes for harm; add "
        "both kinds from each source.",
        {
            "fixed_sources": float(fixed.sum()),
            "sources": float(len(fixed)),
            "share_of_examples": float(examples),
            "accuracy_of_source": float(accuracy),
        },
    )


def duplicate_leaks(
    texts: Sequence[str],
    harmful: Bool[np.ndarray, "examples"],
    first: Bool[np.ndarray, "examples"],
    second: Bool[np.ndarray, "examples"],
    images: Sequence[str | None] | None = None,
) -> list[LeakWarning]:
    """Warn of texts that stand on both sides of a split, word for word or nearly.

    Texts are compared after `normalise`, and are no twins with different images. Near means that
    the sets of their stretches of 5 characters overlap by 0.9 or more (Jaccard); a text with an
    exact twin is not counted again.

    Args:
        texts: What the model read.
        harmful: The labels; equal texts with different labels get a warning of their own.
        first: The side that chooses or learns.
        second: The side that reports.
        images: As in `find_leaks`.

    Returns:
        From none to three warnings.
    """
    shown = [None] * len(texts) if images is None else images
    what = "texts" if not any(shown) else "texts with their images"
    plain = [(normalise(text), image) for text, image in zip(texts, shown, strict=True)]
    labels: dict[tuple[str, str | None], set[bool]] = defaultdict(set)
    for one, label in zip(plain, harmful.tolist(), strict=True):
        labels[one].add(label)
    left = [plain[i] for i in np.flatnonzero(first)]
    known, known_images = set(left), {image for _, image in left}
    exact = np.array([i for i in np.flatnonzero(second) if plain[i] in known], dtype=int)
    rest = np.setdiff1d(np.flatnonzero(second), exact)
    near = _near_twins(left, [plain[i] for i in rest if plain[i][1] in known_images])
    found = []
    total = int(second.sum())
    for name, count, words in (
        ("duplicates", len(exact), "word for word"),
        ("near_duplicates", int(near.sum()), f"but for a few letters (overlap {NEAR} or more)"),
    ):
        if count:
            found.append(
                LeakWarning(
                    name,
                    f"{count} of the {total} {what} of the report side stand on the selection side "
                    f"too, {words}: the report repeats what was seen. Give such texts the same "
                    "group (data.group), or remove them.",
                    {"texts": float(count), "share": count / total},
                )
            )
    both = sum(len(kinds) == 2 for kinds in labels.values())
    if both:
        found.append(
            LeakWarning(
                "conflicting_labels",
                f"{both} {what} are labelled harmful in one place and harmless in another: nothing "
                "that reads them can be right about both.",
                {"texts": float(both)},
            )
        )
    return found


def normalise(text: str) -> str:
    """Return a text without what does not change its meaning: case, width, spaces, punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join("".join(kept).split())


def _near_twins(
    known: Sequence[tuple[str, str | None]], asked: Sequence[tuple[str, str | None]]
) -> np.ndarray:
    """Return which of the asked texts nearly equal a known one with the same image."""
    left, right = (_shingles([text for text, _ in side]) for side in (known, asked))
    codes: dict[str | None, int] = {}
    ours, theirs = (
        np.array([codes.setdefault(image, len(codes)) for _, image in side], dtype=int)
        for side in (known, asked)
    )
    sizes = (np.diff(left.indptr), np.diff(right.indptr))
    twins = np.zeros(len(asked), dtype=bool)
    columns = left.T.tocsr()
    for start in range(0, len(asked), ROWS_AT_ONCE):
        shared = (right[start : start + ROWS_AT_ONCE] @ columns).tocoo()
        row, column = shared.coords
        union = sizes[1][start + row] + sizes[0][column] - shared.data
        alike = (shared.data >= NEAR * union) & (theirs[start + row] == ours[column])
        twins[start + row[alike]] = True
    return twins


def _shingles(texts: Sequence[str]) -> csr_array:
    """Return which stretches of 5 characters each text holds, hashed to columns."""
    hasher = np.uint64(0x9E3779B97F4A7C15)
    indices, indptr = [], [0]
    for text in texts:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        width = min(SHINGLE, max(len(codes), 1))
        value = np.zeros(max(len(codes) - width + 1, 0), dtype=np.uint64)
        for offset in range(width):
            value = (value + codes[offset : offset + len(value)] + np.uint64(1)) * hasher
            value ^= value >> np.uint64(29)
        indices.append(np.unique(value % np.uint64(HASH_SPACE)).astype(np.int32))
        indptr.append(indptr[-1] + len(indices[-1]))
    ids = np.concatenate(indices) if indices else np.zeros(0, dtype=np.int32)
    return csr_array((np.ones(len(ids)), ids, indptr), shape=(len(texts), HASH_SPACE))
