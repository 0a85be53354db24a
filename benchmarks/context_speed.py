"""Activations of contexts of 128 tokens: saefty's whole path beside SAELens's ActivationsStore.

Usage: python benchmarks/context_speed.py [--rounds 3] [--contexts 384] [--write] [--tiny]

`benchmarks/peers.sh` makes SAELens's environment. The model is that of `extraction_speed.py`; both
read block 5 in float32 and in bfloat16. Each measurement is a process of its own
(`context_worker.py`), the libraries take turns, and each process times a float32 product before and
after; the medians are over the passes beside products that ran at 85 % of the best one or more.
Exits with 1 if the two libraries differ by more than 1e-5 of the largest activation in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

import page
from extraction_speed import SIZES, SMALL, make_model

ROOT = Path(__file__).parents[1]
LENGTH, PASSES, QUIET = 128, 2, 0.85
PYTHON = {"saefty": sys.executable, "sae-lens": ROOT / ".venv-saelens/bin/python"}
WAYS = {
    "saefty extract, written to disk": ("saefty", "float32"),
    "saefty extract, bfloat16, written to disk": ("saefty", "bfloat16"),
    "SAELens ActivationsStore": ("sae-lens", "float32"),
    "SAELens ActivationsStore, bfloat16": ("sae-lens", "bfloat16"),
}
SLOW = "SAELens ActivationsStore"
COLUMNS = {
    "way": "way",
    "median": "tokens/s, median",
    "best": "tokens/s, best",
    "ratio": "× SAELens in float32",
    "gap": "largest difference",
}


def measure(way: str, folder: Path) -> dict:
    """Run one process and return what it printed."""
    library, dtype = WAYS[way]
    command = [PYTHON[library], ROOT / "benchmarks/context_worker.py", library, dtype, folder,
               PASSES]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(ways: list[str], folder: Path, rounds: int, quiet: float) -> tuple[list[dict], float]:
    """Return one row of text for each way, and the best rate of the product beside them."""
    found = defaultdict(list)
    for _ in range(rounds):
        for way in ways:
            found[way].append(measure(way, folder))
            print(way, [round(ms) for ms in found[way][-1]["times"]], flush=True)
    best = max(max(one["calibration"]) for those in found.values() for one in those)
    times = {}
    for way, those in found.items():
        kept = [one for one in those if min(one["calibration"]) >= quiet * best]
        kept = kept or [max(those, key=lambda one: min(one["calibration"]))]
        times[way] = [ms for one in kept for ms in one["times"]]
    turns = min(map(len, times.values()))
    rounds_kept = [{way: those[i] for way, those in times.items()} for i in range(turns)]
    true = np.load(folder / "{}_{}.npy".format(*WAYS[SLOW if SLOW in ways else ways[0]]))
    gaps = {}
    for way in ways:
        rows = np.load(folder / "{}_{}.npy".format(*WAYS[way]))
        gaps[way] = float(np.abs(rows - true).max() / np.abs(true).max())
    slow = SLOW if SLOW in ways else ways[0]
    return page.rates(rounds_kept, len(true), slow, gaps), best


def main() -> int:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=384)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    if any(not Path(PYTHON[WAYS[way][0]]).exists() for way in given.ways):
        raise SystemExit("sae-lens is not installed: run benchmarks/peers.sh first.")
    sizes = SMALL if given.tiny else SIZES
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", given.tiny)
        draw = np.random.default_rng(0)
        tokens = draw.integers(1, sizes["vocab_size"], (given.contexts, LENGTH))
        np.save(folder / "tokens.npy", tokens)
        rows, best = compare(given.ways, folder, given.rounds, 0.0 if given.tiny else QUIET)
    print(page.table(COLUMNS, rows))
    if given.write:
        note = f" The best 2048 × 2048 product in float32 ran at {best:.0f} GFLOP/s."
        options = f"--rounds {given.rounds} --contexts {given.contexts}"
        command = f"python benchmarks/context_speed.py {options} --write"
        page.put("contexts", command, COLUMNS, rows, note)
    exact = [row for row in rows if WAYS[row["way"]][1] == "float32"]
    return int(any(float(row["gap"]) > 1e-5 for row in exact))


if __name__ == "__main__":
    sys.exit(main())
