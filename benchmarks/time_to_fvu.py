"""How long until a TopK SAE explains a planted dictionary: saefty beside eai-sparsify.

Usage: python benchmarks/time_to_fvu.py [--target 0.05] [--write] [--tiny]

Both see the same rows in the same order (1,000 known features, 512 wide, 8,192 latents, k = 32,
batches of 4,096), each from its own first weights; FVU is measured every few steps on rows that
neither trains on, outside of the clock. `--rates` gives each library's learning rates.
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
    "longer": "× as long",
    "fvu": "FVU then",
    "ms": "ms a step, median",
}


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


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=0.05)
    parser.add_argument("--libraries", nargs="+", default=["saefty", "eai-sparsify"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--limit", type=float, default=900.0, help="Seconds a training may take.")
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    d_in, *sizes = TINY if given.tiny else SETTING
    limit = 0.2 if given.tiny else given.limit
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        training_speed.N_BATCHES = 3 if given.tiny else N_BATCHES
        pool = training_speed.make_pool(Path(folder), d_in, sizes[-1])
        for library in given.libraries:
            for rate in given.rates:
                done = measure(library, pool, rate, given.target, limit, sizes)
                found[library, rate] = done
                print(library, rate, len(done["times"]), sum(done["times"]), done["fvu"])
    first = sum(next(iter(found.values()))["times"])
    rows = []
    for (library, rate), done in found.items():
        seconds, more = sum(done["times"]), "more than " if done["fvu"] > given.target else ""
        rows.append(
            {
                "name": library,
                "rate": f"{rate:g}",
                "steps": f"{len(done['times'])}",
                "seconds": f"{seconds:.0f}",
                "longer": f"{more}{seconds / first:.1f}",
                "fvu": f"{done['fvu']:.4f}",
                "ms": f"{np.median(done['times']) * 1e3:.0f}",
            }
        )
    print(page.table(COLUMNS, rows), flush=True)
    if given.write:
        page.put("time to FVU", "python benchmarks/time_to_fvu.py --write", COLUMNS, rows)


if __name__ == "__main__":
    main()
