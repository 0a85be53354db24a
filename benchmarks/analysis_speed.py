"""Statistics of SAE codes: one pass over blocks against the whole matrix in memory.

Usage: python benchmarks/analysis_speed.py [--ways saefty,dense] [--write] [--tiny]

The matrix is 13,676 tokens of 20,480 latents, once with 64 active latents a token, held sparse, and
once with 56 % active, in float16. Each way runs in a process of its own, which imports what it uses
and no more. *dense* reads the matrix into float32 and takes means, maxima, `numpy.percentile` of
all values, `numpy.quantile` of each latent's (sparse codes alone) and scikit-learn's PCA of it.
Statistics and quantiles are compared with float64 sums and sorted columns of the matrix; above 1e-6
the command fails. The variance along the two components is compared with what ARPACK finds to ten
digits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, vstack
from scipy.sparse.linalg import LinearOperator, eigsh

from measure import peak_mb
from saefty.code_pca import project_codes
from saefty.metrics.firing import firing_stats, latent_quantiles
from saefty.token_sample import SampleTaker, draw_tokens, report_sample

TOKENS, LATENTS, ACTIVE, BLOCK = 13_676, 20_480, 64, 1024
TINY = (300, 1280)
COLUMNS = {
    "way": "way", "codes": "codes", "statistics": "statistics, s", "figures": "percentiles, L0, s",
    "quantiles": "quantiles of latents, s", "pca": "PCA, s", "all": "all, s", "memory": "peak MB",
    "error": "largest relative difference", "variance": "of the largest variance in a plane",
}  # fmt: skip
SHARES = (1, 5, 50, 95, 99)
QUANTILES = np.array([0.5, 0.95, 0.99])
LIMIT = 1e-6
PARTS = ("statistics", "figures", "quantiles", "pca")
NAMED = {"sparse": f"{ACTIVE} active, sparse", "dense": "56 % active, float16"}


def blocks(kind: str, shape: tuple[int, int]):
    """Yield the codes in blocks; the same ones each time."""
    tokens, latents = shape
    shift = np.random.default_rng(0).normal(0.2, 1.0, latents).astype(np.float32)
    for first in range(0, tokens, BLOCK):
        rng = np.random.default_rng([1, first])
        rows = min(BLOCK, tokens - first)
        if kind == "sparse":
            step = latents // ACTIVE
            ids = np.arange(ACTIVE) * step + rng.integers(0, step, (rows, ACTIVE))
            values = rng.exponential(size=rows * ACTIVE).astype(np.float32)
            ends = np.arange(rows + 1) * ACTIVE
            yield first, csr_array((values, ids.ravel().astype(np.int32), ends), (rows, latents))
        else:
            z = rng.standard_normal((rows, latents), dtype=np.float32) + shift
            yield first, np.maximum(z, 0, out=z).astype(np.float16)


def save(kind: str, shape: tuple[int, int], folder: Path) -> None:
    """Write the codes of one kind, block by block."""
    for first, block in blocks(kind, shape):
        parts = {"z": block} if kind == "dense" else vars_of(block)
        for name, part in parts.items():
            np.save(folder / f"{kind}-{first:06d}-{name}.npy", part)


def vars_of(block: csr_array) -> dict[str, np.ndarray]:
    return {"values": block.data, "ids": block.indices, "ends": block.indptr}


def read(kind: str, shape: tuple[int, int], folder: Path):
    """Yield the codes that `save` wrote."""
    for first in range(0, shape[0], BLOCK):
        place = f"{kind}-{first:06d}"
        if kind == "dense":
            yield first, np.load(folder / f"{place}-z.npy", mmap_mode="r")
            continue
        parts = [np.load(folder / f"{place}-{name}.npy") for name in ("values", "ids", "ends")]
        yield first, csr_array(tuple(parts), shape=(len(parts[2]) - 1, shape[1]))


def ours(kind: str, shape: tuple[int, int], folder: Path) -> tuple[dict, list[float]]:
    """Return the results and the seconds of the four parts, as saefty makes them."""
    at = [time.perf_counter()]
    taker = SampleTaker(draw_tokens(shape[0], 20_000, 0), folder / f"scratch-{kind}")
    stats = firing_stats(taker.watch(read(kind, shape, folder)))
    found = {name: getattr(stats, name) for name in NAMES}
    at.append(time.perf_counter())
    sample = taker.sample()
    report_sample(sample)
    at.append(time.perf_counter())
    if kind == "sparse":
        found["quantiles"] = latent_quantiles(csr_array(vstack(sample.parts)), QUANTILES)
    at.append(time.perf_counter())
    lengths = np.linalg.norm(project_codes(sample).forms["centred"].scores, axis=0)
    at.append(time.perf_counter())
    return {**found, "plane": (lengths**2).sum()}, np.diff(at).tolist()


def dense(kind: str, shape: tuple[int, int], folder: Path) -> tuple[dict, list[float]]:
    """Do the same with the whole matrix."""
    from sklearn.decomposition import PCA

    at = [time.perf_counter()]
    x = np.empty(shape, np.float32)
    for first, block in read(kind, shape, folder):
        rows = block.toarray() if isinstance(block, csr_array) else block
        x[first : first + len(rows)] = rows
    fires = x > 0
    count = fires.sum(axis=0)
    total = x.sum(axis=0, dtype=np.float64)
    found = {
        "firing_rate": count / len(x),
        "mean_all": total / len(x),
        "mean_when_active": total / np.maximum(count, 1),
        "max_all": x.max(axis=0),
    }
    at.append(time.perf_counter())
    np.percentile(x, SHARES)
    l0 = fires.sum(axis=1)
    np.percentile(l0, (95, 99))
    _ = x.min(), x.max(), x.mean(dtype=np.float64), np.median(l0)
    _ = [(x > eps).mean() for eps in (0, 1e-4, 1e-3, 1e-2, 0.1)]
    at.append(time.perf_counter())
    if kind == "sparse":  # latent by latent in memory, some at a time: quicker than along the rows
        parts = (np.ascontiguousarray(x[:, a : a + BLOCK].T) for a in range(0, shape[1], BLOCK))
        found["quantiles"] = np.hstack([np.quantile(part, QUANTILES, axis=1) for part in parts])
    at.append(time.perf_counter())
    pca = PCA(2, svd_solver="randomized", random_state=0)
    pca.fit_transform(x)
    at.append(time.perf_counter())
    return {**found, "plane": (pca.singular_values_**2).sum()}, np.diff(at).tolist()


WAYS = {"saefty": ours, "dense": dense}
NAMES = ("firing_rate", "mean_all", "mean_when_active", "max_all")


def truth(kind: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the results from float64 sums over dense blocks, and from sorted columns."""
    total, count, most = np.zeros(shape[1]), np.zeros(shape[1]), np.zeros(shape[1])
    for _, block in blocks(kind, shape):
        x = np.asarray(block.toarray() if kind == "sparse" else block, dtype=np.float64)
        total, count = total + x.sum(axis=0), count + (x > 0).sum(axis=0)
        most = np.maximum(most, x.max(axis=0))
    found = {
        "firing_rate": count / shape[0],
        "mean_all": total / shape[0],
        "mean_when_active": total / np.maximum(count, 1),
        "max_all": most,
    }
    if kind == "sparse":
        codes = csr_array(vstack([block for _, block in blocks(kind, shape)]), dtype=np.float64)
        columns = codes.tocsc()
        parts = (columns[:, a : a + BLOCK].toarray() for a in range(0, shape[1], BLOCK))
        found["quantiles"] = np.hstack([np.quantile(part, QUANTILES, axis=0) for part in parts])
        found["plane"] = plane(codes)
    return found


def plane(codes: csr_array) -> np.ndarray:
    """Return the largest sum of squares that centred codes have in a plane."""
    mean = codes.sum(axis=0) / codes.shape[0]

    def squared(v: np.ndarray) -> np.ndarray:
        left = codes @ v - mean @ v
        return codes.T @ left - mean * left.sum()

    operator = LinearOperator((codes.shape[1],) * 2, matvec=squared, dtype=np.float64)
    return eigsh(operator, 2, ncv=60, tol=1e-10, return_eigenvectors=False).sum()


def main() -> int:
    """Measure, compare, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    parser.add_argument("--ways", default=",".join(WAYS), help="Which of the two, with a comma.")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = TINY if given.tiny else (TOKENS, LATENTS)
    if given.job:
        way, kind, folder = given.job
        results, seconds = WAYS[way](kind, shape, Path(folder))
        np.savez(Path(folder) / f"{way}-{kind}.npz", **results)
        print(json.dumps({"seconds": seconds, "memory": peak_mb()}))
        return 0
    import page  # whose libraries would count in the memory of the ways

    rows, worst = [], 0.0
    for kind in ("sparse", "dense"):
        with tempfile.TemporaryDirectory() as place:
            save(kind, shape, Path(place))
            wanted = truth(kind, shape)
            for way in given.ways.split(","):
                command = [sys.executable, __file__, "--job", way, kind, place]
                tiny = ["--tiny"] if given.tiny else []
                done = subprocess.run([*command, *tiny], capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                with np.load(Path(place) / f"{way}-{kind}.npz") as held:
                    error = max(
                        float(np.abs(held[name] - value).max() / (np.abs(value).max() or 1.0))
                        for name, value in wanted.items()
                        if name != "plane"
                    )
                    share = held["plane"] / wanted["plane"] if "plane" in wanted else None
                worst = max(worst, error)
                rows.append(
                    {
                        "way": way,
                        "codes": NAMED[kind],
                        **dict(zip(PARTS, map("{:.2f}".format, found["seconds"]), strict=True)),
                        "all": f"{sum(found['seconds']):.2f}",
                        "memory": f"{found['memory']:.0f}",
                        "error": f"{error:.0e}",
                        "variance": "" if share is None else f"{share:.4f}",
                    }
                )
                if kind == "dense":
                    rows[-1]["quantiles"] = ""
    print(page.table(COLUMNS, rows))
    if given.write:
        page.put("analysis", "python benchmarks/analysis_speed.py --write", COLUMNS, rows)
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
