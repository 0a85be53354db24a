"""One training step of a TopK SAE: saefty beside sae-lens and eai-sparsify, on the same data.

Usage: python benchmarks/training_speed.py [--setting 512 768] [--rounds 3] [--write] [--tiny]

`benchmarks/peers.sh` makes the peers' environments. Each measurement is a process of its own
(`training_worker.py`), the libraries take turns, and each process times a float32 product before
and after. What ran beside a product slower than 85 % of the best one is thrown away and repeated,
for as long as `--minutes` allow.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

import page
from measure import summary
from saefty.sandbox.planted import PlantedDictionary

ROOT = Path(__file__).parents[1]
SETTINGS = {512: (512, 8192, 32, 4096, 10), 768: (768, 24576, 64, 2048, 5)}
TINY = (16, 128, 4, 64, 2)
N_BATCHES, QUIET = 17, 0.85
PYTHON = {
    "saefty": sys.executable,
    "saefty, all float32": sys.executable,
    "saefty, no compiler": sys.executable,
    "saefty, no compiler, all float32": sys.executable,
    "eai-sparsify": ROOT / ".venv-sparsify/bin/python",
    "sae-lens": ROOT / ".venv-saelens/bin/python",
}
OWN = tuple(name for name, python in PYTHON.items() if python == sys.executable)
VERSION = "from importlib.metadata import version; print(version('{}'))"
COLUMNS = {
    "name": "implementation",
    "ms": "ms a step: median (least)",
    "rate": "tokens/s",
    "ratio": "× best peer",
    "product": "step ÷ encoder product",
    "memory": "peak MB",
    "fvu": "FVU after the steps",
    "kept": "processes undisturbed",
}


def make_pool(folder: Path, d_in: int, batch: int) -> Path:
    """Write rows with 1,000 known features, centred and of unit scale, as training sees them."""
    world = PlantedDictionary(n_features=min(1000, 8 * d_in), d_in=d_in, offset=0.0)
    x = np.concatenate([world.sample(batch, seed) for seed in range(N_BATCHES)])
    x -= x.mean(axis=0)
    np.save(folder / "pool.npy", x / np.sqrt(np.square(x).mean()))
    return folder / "pool.npy"


def measure(library: str, pool: Path, sizes: tuple[int, ...]) -> dict:
    """Run one process and return what it printed."""
    command = [PYTHON[library], ROOT / "benchmarks/training_worker.py", library, pool, *sizes]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    libraries: list[str], setting: tuple[int, ...], rounds: int, minutes: float, quiet: float
) -> dict[str, tuple[list[dict], str]]:
    """Return for each library the measurements that were kept, and how many of how many these are.

    Kept are those whose products ran at a share of `quiet` of the best product's rate, or more; of
    a library none of whose measurements did, the one with the best product is taken ("0 of ...").
    """
    d_in, d_sae, k, batch, steps = setting
    began, found = time.monotonic(), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(Path(folder), d_in, batch)

        def kept(library: str) -> list[dict]:
            best = max(max(r["calibration"]) for all_of_it in found.values() for r in all_of_it)
            return [r for r in found[library] if min(r["calibration"]) >= quiet * best]

        missing = list(libraries) * rounds
        while missing:
            for library in missing:
                found[library].append(measure(library, pool, (d_sae, k, batch, steps)))
                last = found[library][-1]
                print(library, summary(last["times"]), [round(c) for c in last["calibration"]])
            missing = [name for name in libraries for _ in range(rounds - len(kept(name)))]
            if time.monotonic() - began > 60 * minutes:
                break
        results = {}
        for name in libraries:
            undisturbed = kept(name)
            best = max(found[name], key=lambda r: min(r["calibration"]))
            results[name] = (undisturbed or [best], f"{len(undisturbed)} of {len(found[name])}")
        return results


def rows_of(results: dict[str, tuple[list[dict], str]], batch: int) -> list[dict]:
    """Return one row of text for each library."""
    times = {name: [t for r in kept for t in r["times"]] for name, (kept, _) in results.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    peers = [medians[name] for name in medians if name not in OWN]
    rows = []
    for name, (kept, share) in results.items():
        product = statistics.median(r["product"] for r in kept)
        rows.append(
            {
                "name": name if name in OWN else f"{name} {version_of(name)}",
                "ms": summary(times[name]),
                "rate": f"{batch / medians[name] * 1e3:,.0f}",
                "ratio": f"{min(peers) / medians[name]:.2f}" if peers else "n/a",
                "product": f"{medians[name] / product:.2f}",
                "memory": f"{max(r['memory'] for r in kept):.0f}",
                "fvu": f"{kept[0]['fvu']:.4f}",
                "kept": share,
            }
        )
    return rows


def version_of(library: str) -> str:
    """Return the version of a library in its own environment."""
    command = [str(PYTHON[library]), "-c", VERSION.format(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", type=int, nargs="+", default=list(SETTINGS), help="Widths.")
    parser.add_argument("--libraries", nargs="+", default=list(PYTHON))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    absent = [name for name in given.libraries if not Path(PYTHON[name]).exists()]
    if absent:
        raise SystemExit(f"{', '.join(absent)} is not installed: run benchmarks/peers.sh first.")
    for width in given.setting[: 1 if given.tiny else None]:
        setting, quiet = (TINY, 0.0) if given.tiny else (SETTINGS[width], QUIET)
        results = compare(given.libraries, setting, given.rounds, given.minutes, quiet)
        rows = rows_of(results, setting[3])
        print(page.table(COLUMNS, rows), flush=True)
        if given.write:
            best = max(max(r["calibration"]) for kept, _ in results.values() for r in kept)
            note = f" The best 2048 × 2048 product in float32 ran at {best:.0f} GFLOP/s."
            page.put(f"training {width}", page.given_command(), COLUMNS, rows, note)


if __name__ == "__main__":
    main()
