"""A training step of the other architectures: saefty beside sae-lens and dictionary-learning.

Usage: python benchmarks/families_speed.py [--cases ...] [--rounds 2] [--write] [--tiny]

`benchmarks/peers.sh` makes the peers' environments. The libraries take turns, each in a process of
its own (`families_worker.py`) that goes through all cases, with a float32 product timed before and
after each. What ran beside a product slower than 85 % of the best one is thrown away where there is
a better one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import page
from measure import summary
from training_speed import QUIET, make_pool

ROOT = Path(__file__).parents[1]
D_IN, SIZES = 512, (8192, 32, 4096, 3)
TINY_D_IN, TINY = 16, (128, 4, 64, 1)
CASES = (
    "batch_topk",
    "matryoshka",
    "jumprelu, sparse",
    "gated, sparse",
    "jumprelu, 5 %",
    "gated, 5 %",
    "jumprelu, dense",
    "gated, dense",
)
PYTHON = {
    "saefty": sys.executable,
    "sae-lens": ROOT / ".venv-saelens/bin/python",
    "dictionary-learning": ROOT / ".venv-sparsify/bin/python",
}
VERSION = "from importlib.metadata import version; print(version('{}'))"
COLUMNS = {
    "name": "implementation",
    "case": "architecture",
    "ms": "ms a step: median (least)",
    "rate": "tokens/s",
    "ratio": "× best peer",
    "l0": "L0 after the steps",
    "fvu": "FVU after the steps",
    "kept": "processes undisturbed",
}


def measure(library: str, pool: Path, sizes: tuple[int, ...], cases: list[str]) -> dict[str, dict]:
    """Run one process and return what it printed."""
    command = [PYTHON[library], ROOT / "benchmarks/families_worker.py", library, pool, *sizes]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in (*command, *cases)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(found: dict[tuple[str, str], list[dict]], batch: int, quiet: float) -> list[dict]:
    """Return one row of text for each case of each library."""
    best = max(max(r["calibration"]) for all_of_it in found.values() for r in all_of_it)
    kept, times = {}, {}
    for key, measured in found.items():
        undisturbed = [r for r in measured if min(r["calibration"]) >= quiet * best]
        kept[key] = f"{len(undisturbed)} of {len(measured)}"
        used = undisturbed or [max(measured, key=lambda r: min(r["calibration"]))]
        times[key] = [t for r in used for t in r["times"]]
    rows = []
    for (case, name), values in times.items():
        peers = [times[key] for key in times if key[0] == case and key[1] != "saefty"]
        fastest = min((statistics.median(t) for t in peers), default=None)
        median = statistics.median(values)
        rows.append(
            {
                "case": case,
                "name": name if name == "saefty" else f"{name} {version_of(name)}",
                "ms": summary(values),
                "rate": f"{batch / median * 1e3:,.0f}",
                "ratio": f"{fastest / median:.2f}" if fastest else "n/a",
                "l0": f"{found[case, name][0]['l0']:.0f}",
                "fvu": f"{found[case, name][0]['fvu']:.4f}",
                "kept": kept[case, name],
            }
        )
    return sorted(rows, key=lambda row: CASES.index(row["case"]))


def version_of(library: str) -> str:
    """Return the version of a library in its own environment."""
    command = [str(PYTHON[library]), "-c", VERSION.format(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--libraries", nargs="+", default=list(PYTHON))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    absent = [name for name in given.libraries if not Path(PYTHON[name]).exists()]
    if absent:
        raise SystemExit(f"{', '.join(absent)} is not installed: run benchmarks/peers.sh first.")
    d_in, sizes, quiet = (TINY_D_IN, TINY, 0.0) if given.tiny else (D_IN, SIZES, QUIET)
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(Path(folder), d_in, sizes[2])
        for _ in range(given.rounds):
            for library in given.libraries:
                for case, result in measure(library, pool, sizes, given.cases).items():
                    found[case, library].append(result)
                    rates = [round(rate) for rate in result["calibration"]]
                    print(library, case, summary(result["times"]), rates, flush=True)
    rows = rows_of(found, sizes[2], quiet)
    print(page.table(COLUMNS, rows), flush=True)
    if given.write:
        best = max(max(r["calibration"]) for measured in found.values() for r in measured)
        note = f" The best 2048 × 2048 product in float32 ran at {best:.0f} GFLOP/s."
        page.put("families", page.given_command(), COLUMNS, rows, note)


if __name__ == "__main__":
    main()
