"""How long until a TopK SAE explains a planted dictionary: saefty beside eai-sparsify.

Usage: python benchmarks/time_to_fvu.py [--target 0.05] [--rates 1e-3 2e-3] [--write] [--tiny]

Both see the same rows in the same order (1,000 known features, 512 wide, 8,192 latents, k = 32,
batches of 4,096), each from its own first weights; FVU is measured every few steps on rows that
neither trains on, outside of the clock. Both are tried at every learning rate of `--rates`, and the
libraries are compared each at its own best one: the one that took it the least time. A training
that has taken longer than the library's best so far is stopped.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import page
import training_speed
from training_speed import PYTHON, ROOT

SETTING, TINY = (512, 8192, 32, 4096), (16, 128, 4, 64)
N_BATCHES = 49
COLUMNS = {
    "name": "implementation",
    "rate": "learning rate",
    "steps": "steps",
    "seconds": "s of training",
    "longer": "× as long as the first one's best",
    "fvu": "FVU then",
    "ms": "ms a step: median (first ten, last ten)",
}
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
Trained = dict[tuple[str, float], dict]  # what was measured, by library and rate


def measure(library: str, pool: Path, rate: float, target: float, limit: float, sizes) -> dict:
    """Run one training in a process of its own and return what it printed."""
    python = PYTHON[library]
    asked = [library, pool, rate, target, limit, *sizes]
    done = subprocess.run(
        [str(part) for part in (python, ROOT / "benchmarks/fvu_worker.py", *asked)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_rates(found: Trained, target: float) -> dict[str, float]:
    """Return each library's best rate: of those that reached the target, the quickest one's."""

    def cost(key: tuple[str, float]) -> tuple[bool, float]:
        return found[key]["fvu"] > target, sum(found[key]["times"])

    return {name: min((key for key in found if key[0] == name), key=cost)[1] for name, _ in found}


def rows_of(found: Trained, target: float) -> list[dict]:
    """Return one row of text for each training; the first library is what others compare to."""
    best, rows = best_rates(found, target), []
    least = sum(found[next(iter(best.items()))]["times"])
    for (library, rate), done in found.items():
        times = np.array(done["times"]) * 1e3
        more = "more than " if done["fvu"] > target else ""
        part = [f"{np.median(some):.0f}" for some in (times, times[:10], times[-10:])]
        rows.append(
            {
                "name": library,
                "rate": f"{rate:g}" + (", its best" if best[library] == rate else ""),
                "steps": f"{len(times)}",
                "seconds": f"{times.sum() / 1e3:.1f}",
                "longer": f"{more}{times.sum() / 1e3 / least:.1f}",
                "fvu": f"{done['fvu']:.4f}",
                "ms": f"{part[0]} ({part[1]}, {part[2]})",
            }
        )
    return rows


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=0.05)
    parser.add_argument("--libraries", nargs="+", default=["saefty", "eai-sparsify"])
    parser.add_argument("--rates", type=float, nargs="+", help=f"Rather than {RATES}.")
    parser.add_argument("--limit", type=float, default=900.0, help="Seconds a training may take.")
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    d_in, *sizes = TINY if given.tiny else SETTING
    limit = 0.2 if given.tiny else given.limit
    found: Trained = {}
    with tempfile.TemporaryDirectory() as folder:
        training_speed.N_BATCHES = 3 if given.tiny else N_BATCHES
        pool = training_speed.make_pool(Path(folder), d_in, sizes[-1])
        for library in given.libraries:
            least = limit
            for rate in given.rates or RATES[: 2 if given.tiny else None]:
                # A rate that takes longer than the best so far need not be seen to its end.
                done = measure(library, pool, rate, given.target, least, sizes)
                if done["fvu"] <= given.target:
                    least = min(least, sum(done["times"]))
                found[library, rate] = done
                print(library, rate, len(done["times"]), sum(done["times"]), done["fvu"])
    rows = rows_of(found, given.target)
    print(page.table(COLUMNS, rows), flush=True)
    if given.write:
        page.put("time to FVU", page.given_command(), COLUMNS, rows)


if __name__ == "__main__":
    main()
