"""Peak memory of the index by latent and of analyze, each alone in a process, and with more rows.

Usage: python benchmarks/codes_memory.py [--tokens 40960] [--write] [--tiny]

Feature stores of 64 active latents a token, of 20,480, with as many tokens as asked for and with
ten times as many. *index* is what `encode` does after its last piece; *analyze* is the stage of
that name, pictures included. The peak is the kernel's own figure for the process; the rows without
tokens are what the libraries of each take.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import peak_mb
from saefty.stores.index import build_index

COLUMNS = {
    "job": "job",
    "tokens": "tokens",
    "entries": "entries",
    "seconds": "s",
    "memory": "peak MB",
    "growth": "against a tenth of the rows",
}


def do_index(store: Path | None, out: Path) -> None:
    """Turn the store's only layer round."""
    if store is not None:
        shards = len(list((store / "layer_0").glob("shard_*")))
        build_index(
            store, 0, shards, json.loads((store / "manifest.json").read_text())["d_sae"]["0"]
        )


def do_analyze(store: Path | None, out: Path) -> None:
    """Run the stage."""
    from saefty.runs import RunSection
    from saefty.stages import analyze

    if store is not None:
        section = analyze.AnalyzeSection(features=str(store))
        analyze.run(analyze.AnalyzeConfig(analyze=section, run=RunSection(dir=str(out))))


JOBS = {"index": do_index, "analyze": do_analyze}


def measure(job: str, store: Path | None, out: Path) -> dict:
    """Run one job in a process of its own and return what it printed."""
    command = [sys.executable, __file__, "--job", job, str(store or ""), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job, store, out = given.job
        began = time.perf_counter()
        JOBS[job](Path(store) if store else None, Path(out))
        took = time.perf_counter() - began
        print("\n" + json.dumps({"seconds": took, "memory": peak_mb()}))
        return
    import page  # whose libraries would count in the memory of the jobs
    from query_speed import ACTIVE, write_store

    number = 300 if given.tiny else given.tokens
    sizes = [0, number, 10 * number]
    rows, before = [], {}
    with tempfile.TemporaryDirectory() as place:
        for tokens in sizes:
            store = Path(place) / f"{tokens}"
            if tokens:
                write_store(store, tokens)
            for job in JOBS:
                out = Path(place) / f"{job}{tokens}"
                found = measure(job, store if tokens else None, out)
                growth = f"{found['memory'] / before[job] - 1:+.1%}" if tokens == sizes[2] else ""
                before[job] = found["memory"]
                rows.append(
                    {
                        "job": job,
                        "tokens": f"{tokens:,}",
                        "entries": f"{tokens * ACTIVE:,}",
                        "seconds": f"{found['seconds']:.1f}" if tokens else "",
                        "memory": f"{found['memory']:.0f}",
                        "growth": growth,
                    }
                )
                print(rows[-1], flush=True)
    rows.sort(key=lambda row: list(JOBS).index(row["job"]))
    print(page.table(COLUMNS, rows))
    if given.write:
        page.put("codes memory", "python benchmarks/codes_memory.py --write", COLUMNS, rows)


if __name__ == "__main__":
    main()
