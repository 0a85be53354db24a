"""The 20 tokens on which a latent is strongest: the index of a feature store beside DuckDB.

Usage: python benchmarks/query_speed.py [--tokens 80000] [--rounds 3] [--write] [--tiny]

Codes of 64 latents a token, of 20,480, are written as a feature store, and the same as a long table
(token, latent, value): as Parquet in the order of the tokens and in that of latent and magnitude,
and as DuckDB's own file in the latter order. The same latents are asked for in each, in processes
that take turns; all answers must be equal, or the command fails. `benchmarks/peers.sh` makes
DuckDB's environment; without it only saefty is measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import page
from saefty import fsio
from saefty.stores.activations import ROW_COLUMNS
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import KIND, FeatureStore, commit_features
from saefty.stores.index import build_index

ROOT = Path(__file__).parents[1]
DUCKDB = ROOT / ".venv-duckdb/bin/python"
WIDTH, ACTIVE, SHARD, TOP, ASKED = 20_480, 64, 16_384, 20, 20
GROUP = 122_880  # rows that DuckDB itself puts into a group, by whose least and largest it skips
TABLE = pa.schema([("token", pa.int64()), ("latent", pa.uint32()), ("value", pa.float32())])
COLUMNS = {
    "way": "way",
    "pairs": "tokens × latents",
    "anew": "opened anew, ms",
    "anew_ratio": "× saefty",
    "held": "open already, ms",
    "held_ratio": "× saefty",
    "size": "MB",
}
FIRST = "saefty, first of a process"


def shards(tokens: int):
    """Yield the codes of some tokens at a time; the same ones each time."""
    for piece, first in enumerate(range(0, tokens, SHARD)):
        rng, rows = np.random.default_rng([2, piece]), min(SHARD, tokens - first)
        step = WIDTH // ACTIVE
        ids = (np.arange(ACTIVE) * step + rng.integers(0, step, (rows, ACTIVE))).astype(np.uint32)
        values = rng.exponential(size=(rows, ACTIVE)).astype(np.float32)
        order = np.argsort(-values, axis=1)
        ids, values = (np.take_along_axis(x, order, axis=1).ravel() for x in (ids, values))
        yield piece, first, {"indptr": np.arange(rows + 1) * ACTIVE, "ids": ids, "values": values}


def write_store(folder: Path, tokens: int) -> float:
    """Write the codes as a feature store; return how long its index took, in s."""
    writer, records = StoreWriter(folder, KIND, "benchmark"), []
    for piece, _, code in shards(tokens):
        n = len(code["indptr"]) - 1
        rows = {name: np.zeros(n, kind) for name, kind in ROW_COLUMNS.items()}
        records.append(commit_features(writer, piece, {0: code}, rows, {}))
    fsio.commit_text(folder / EXAMPLES, '{"example_id": "one"}\n')
    began = time.perf_counter()
    name = build_index(folder, 0, len(records), WIDTH)
    took = time.perf_counter() - began
    facts = {"layers": [0], "sites": {"0": "0"}, "d_sae": {"0": WIDTH}, "saes": {"0": None}}
    writer.finish(records, facts, [EXAMPLES, name])
    return took


def write_tables(folder: Path, store: FeatureStore, tokens: int) -> None:
    """Write the same as Parquet, by token and by latent."""
    with pq.ParquetWriter(folder / "token.parquet", TABLE, compression="zstd") as file:
        for _, first, code in shards(tokens):
            token = first + np.repeat(np.arange(len(code["indptr"]) - 1), ACTIVE)
            file.write_table(pa.table([token, code["ids"], code["values"]], schema=TABLE))
    with pq.ParquetWriter(folder / "latent.parquet", TABLE, compression="zstd") as file:
        for begin in range(0, WIDTH, 512):
            found = [store.tokens_of(0, latent) for latent in range(begin, begin + 512)]
            latent = np.repeat(np.arange(begin, begin + 512), [len(rows) for rows, _ in found])
            columns = [np.concatenate([one[i] for one in found]) for i in (0, 1)]
            table = pa.table([columns[0], latent.astype(np.uint32), columns[1]], schema=TABLE)
            file.write_table(table, row_group_size=GROUP)


def ours(folder: str, latents: list[int]) -> dict:
    """Ask the feature store, as a notebook does; each question verifies what it reads of the index.

    What was verified is not verified again in a process, so `held` is asked of what `anew` read.
    """
    anew, held, answers = [], [], []

    def timed(store: FeatureStore | None, latent: int) -> float:
        began = time.perf_counter()
        store = store or FeatureStore.open(folder)
        rows, values = store.tokens_of(0, latent, top=TOP)
        took = time.perf_counter() - began
        answers.append(list(zip(rows.tolist(), values.tolist(), strict=True)))
        return took

    first = timed(None, latents[0])
    answers.clear()
    anew = [timed(None, latent) for latent in latents]
    kept = list(answers)
    store = FeatureStore.open(folder)
    store.tokens_of(0, latents[0])
    held = [timed(store, latent) for latent in latents]
    return {"first": first, "anew": anew, "held": held, "answers": kept}


def run(command: list) -> dict:
    """Run a process and return the JSON object that it prints last."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, tokens: int, rounds: int, duckdb: Path) -> list[dict]:
    """Return one row of text for each way.

    Args:
        folder: Where to write.
        tokens: How many tokens the codes have.
        rounds: How often each way is asked.
        duckdb: The Python of DuckDB's environment.

    Raises:
        SystemExit: If two ways answer differently.
    """
    took = write_store(folder / "store", tokens)
    print(f"{tokens * ACTIVE:,} entries were indexed in {took:.1f} s", flush=True)
    latents = np.random.default_rng(3).choice(WIDTH, ASKED, replace=False).tolist()
    files = {"saefty": folder / "store/layer_0/index.safetensors"}
    if duckdb.exists():
        write_tables(folder, FeatureStore.open(folder / "store"), tokens)
        own, worker = folder / "latent.duckdb", Path(__file__).with_name("query_worker.py")
        run([duckdb, worker, json.dumps({"make": str(own), "parquet": f"{folder}/latent.parquet"})])
        files["DuckDB, Parquet by token"] = folder / "token.parquet"
        files["DuckDB, Parquet by latent"] = folder / "latent.parquet"
        files["DuckDB, its own file by latent"] = own
    else:
        print(f"DuckDB is left out: there is no {duckdb} (benchmarks/peers.sh makes it)")
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in files}
    wanted = None
    for _ in range(rounds):
        for name, file in files.items():
            if name == "saefty":
                asked = ["--ask", folder / "store", json.dumps(latents)]
                found = run([sys.executable, __file__, *asked])
                times[name]["first"].append(found["first"])
            else:
                request = {"file": str(file), "latents": latents, "top": TOP}
                found = run([duckdb, worker, json.dumps(request)])
            wanted = wanted or found["answers"]
            if found["answers"] != wanted:
                raise SystemExit(f"{name} finds other tokens than saefty does")
            for kind in ("anew", "held"):
                times[name][kind] += found[kind]
    return rows_of(times, files, tokens)


def rows_of(times: dict, files: dict[str, Path], tokens: int) -> list[dict]:
    """Return the medians as text."""
    median = {
        name: {kind: 1e3 * statistics.median(found) for kind, found in kinds.items()}
        for name, kinds in times.items()
    }
    base, rows = median["saefty"], []
    pairs = f"{tokens:,} × {ACTIVE} = {tokens * ACTIVE / 1e6:.1f} M"
    for name, found in median.items():
        cells = {kind: f"{found[kind]:.3f}" for kind in ("anew", "held")}
        ratios = {f"{kind}_ratio": f"{found[kind] / base[kind]:,.0f}" for kind in ("anew", "held")}
        size = f"{files[name].stat().st_size / 1e6:.0f}"
        rows.append({"way": name, "pairs": pairs, **cells, **ratios, "size": size})
    first = {"way": FIRST, "pairs": pairs, "anew": f"{base['first']:.3f}", "held": "", "size": ""}
    first |= {"anew_ratio": f"{base['first'] / base['anew']:,.0f}", "held_ratio": ""}
    return [rows[0], first, *rows[1:]]


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="80000", help="How many, with a comma between sizes.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    parser.add_argument("--duckdb", type=Path, default=DUCKDB, help="Python with DuckDB.")
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask:
        print(json.dumps(ours(given.ask[0], json.loads(given.ask[1]))))
        return
    rows = []
    for tokens in [300] if given.tiny else map(int, given.tokens.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), tokens, 1 if given.tiny else given.rounds, given.duckdb)
    print(page.table(COLUMNS, rows))
    if given.write:
        command = f"python benchmarks/query_speed.py --tokens {given.tokens} --write"
        page.put("query", command, COLUMNS, rows)


if __name__ == "__main__":
    main()
