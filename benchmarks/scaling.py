"""How training grows: with the dictionary, with the SAEs that share a pass, and with the store.

Usage: python benchmarks/scaling.py [--write] [--tiny]

Three curves of TopK SAEs on 512 wide rows (k = 32, batches of 2,048): the time of a step against
the number of latents; the rows that each of several SAEs learns from in a second when they share
one pass over a store in float16, and how long they wait for its rows, read ahead or not by turns;
and the peak memory of a process that trains on ever more rows. `--write` also draws
docs/pictures/scaling.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

import page
from measure import peak_mb, timed
from saefty import fsio
from saefty.optimisation import Trainee
from saefty.plots.base import DPI, SERIES, style
from saefty.saes.base import SaeConfig
from saefty.saes.section import SaeSection
from saefty.sandbox.planted import PlantedDictionary
from saefty.stores.activations import KIND, ROW_COLUMNS, ActivationStore, commit_activations
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.training import train_saes
from saefty.training_data import Cursor, stream
from saefty.training_settings import OptimizerSection, TrainSection

PICTURE = page.PAGE.parent / "pictures" / "scaling.png"
D_IN, K, BATCH, STEPS, TURNS = 512, 32, 2048, 8, 4
WIDTHS = (4096, 8192, 16384, 32768, 65536)
SAES, SHARED = (1, 2, 4, 8), 8192
ROWS, FIT, FIT_STEPS = (20_000, 60_000, 180_000), 4096, 12
TINY = {"D_IN": 16, "K": 4, "BATCH": 64, "STEPS": 2, "TURNS": 2, "WIDTHS": (128, 256),
        "SAES": (1, 2), "SHARED": 128, "ROWS": (300, 600), "FIT": 128, "FIT_STEPS": 2}  # fmt: skip
COLUMNS = {
    "what": "what grows",
    "size": "to",
    "figure": "figure",
    "relative": "relative to the first",
}


def make_store(folder: Path, n_rows: int) -> ActivationStore:
    """Write an activation store of planted rows, ten to an example, in float16."""
    writer, records = StoreWriter(folder, KIND, "benchmark"), []
    world = PlantedDictionary(n_features=min(1000, 8 * D_IN), d_in=D_IN)
    for piece, first in enumerate(range(0, n_rows, 50_000)):
        n = min(50_000, n_rows - first)
        x = torch.from_numpy(world.sample(n, piece)).half()
        table = {name: np.zeros(n, kind) for name, kind in ROW_COLUMNS.items()}
        table["example"] = ((first + np.arange(n)) // 10).astype(ROW_COLUMNS["example"])
        table["token_pos"] = ((first + np.arange(n)) % 10).astype(ROW_COLUMNS["token_pos"])
        records.append(commit_activations(writer, piece, {0: x}, table, {"masked": {}}))
    line = fsio.dump_json_line({"example_id": "e", "label": None})
    fsio.commit_text(folder / EXAMPLES, line * -(-n_rows // 10))
    facts = {"layers": [0], "sites": {"0": "blocks.0.hook_resid_post"}, "d_in": D_IN,
             "dtype": "float16"}  # fmt: skip
    writer.finish(records, facts, [EXAMPLES])
    return ActivationStore.open(folder)


def make_trainee(d_sae: int, x: torch.Tensor, k: int) -> Trainee:
    trainee = Trainee(
        SaeConfig("topk", D_IN, d_sae, k),
        OptimizerSection(lr=1e-3, warmup_steps=0),
        grad_clip=1.0,
        n_steps=10**9,
        dead_after=10**7,
    )
    trainee.start(x, seed=0)
    return trainee


def step_times() -> list[float]:
    """Return the median time of a step for each number of latents, in ms."""
    world, medians = PlantedDictionary(n_features=min(1000, 8 * D_IN), d_in=D_IN), []
    batches = [torch.from_numpy(world.sample(BATCH, i)) for i in range(4)]
    for d_sae in WIDTHS:
        trainee = make_trainee(d_sae, batches[0], K)
        times = []
        for i in range(STEPS + 2):
            times += timed(partial(trainee.step, batches[i % 4], i), 1)
        medians.append(statistics.median(times[2:]))
        print(d_sae, round(medians[-1], 1), flush=True)
    return medians


def shared_rates(store: ActivationStore) -> tuple[list[float], dict[bool, list[str]]]:
    """Return, for each number of SAEs, the rows all of them learn a second, and what waiting takes.

    The rows are those of a pass that reads ahead; waiting is of both ways, which take turns.
    """
    keep, rates = np.ones(store.n_rows, bool), []
    told: dict[bool, list[str]] = {True: [], False: []}
    for n in SAES:
        with closing(stream(store, 0, BATCH, 0, keep, Cursor())) as batches:
            first = next(batches)[1]
        trainees = [make_trainee(SHARED, first, K // (1 + i % 2)) for i in range(n)]
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(TURNS + 1):
            for ahead, found in times.items():
                found += turn_of(store, keep, trainees, turn, ahead)
        for ahead, found in times.items():
            waited, whole = (statistics.median(part[STEPS:]) for part in zip(*found, strict=True))
            told[ahead].append(f"{waited / whole:.1%}")
            print(n, "ahead" if ahead else "after", f"{whole * 1e3:.1f} ms", told[ahead][-1])
            if ahead:
                rates.append(n * BATCH / whole)
    return rates, told


def turn_of(
    store: ActivationStore, keep: np.ndarray, trainees: list[Trainee], turn: int, ahead: bool
) -> list[tuple[float, float]]:
    """Take some steps; return for each how long it waited for its batch, and took in all, in s."""
    times = []
    start = Cursor(0, turn * (STEPS + 1))
    with closing(stream(store, 0, BATCH, 0, keep, start, ahead=ahead)) as batches:
        next(batches)
        for step in range(STEPS):
            began = time.perf_counter()
            x = next(batches)[1]
            read = time.perf_counter()
            for trainee in trainees:
                trainee.step(x, turn * STEPS + step)
            times.append((read - began, time.perf_counter() - began))
    return times


def peak_of(folder: Path) -> float:
    """Return the peak memory of a process that trains on a store, in MB."""
    command = [sys.executable, __file__, "--train", str(folder), str(D_IN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"training failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def train_on(folder: Path) -> None:
    """Train on a store, as `saefty train` does, and print the peak memory."""
    train = TrainSection(max_steps=FIT_STEPS, batch_size=BATCH)
    sae = SaeSection(d_sae=FIT, k=K)
    store = ActivationStore.open(folder)
    train_saes(store, sae, train, OptimizerSection(), folder.with_name(f"{folder.name}_sae"))
    print(json.dumps(peak_mb()))


def draw(widths: list[float], rates: list[float], peaks: list[float]) -> None:
    """Draw the three curves."""
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    with mpl.rc_context(style()):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        axes = figure.subplots(1, 3)
        panels = (
            ("A step's time", "latents", "ms a step", WIDTHS, widths),
            ("SAEs that share a pass", "SAEs", "rows learnt a second, all SAEs", SAES, rates),
            ("Memory by the store", "rows of the store", "peak memory, MB", ROWS, peaks),
        )
        for ax, (title, across, up, x, y), colour in zip(axes, panels, SERIES, strict=False):
            ax.plot(x, y, "o-", color=colour)
            ax.set(title=title, xlabel=across, ylabel=up, xscale="log", xticks=x)
            if ax is axes[0]:  # a straight line is growth in proportion
                ax.set_yscale("log")
                ax.set_yticks([5, 10, 20, 50, 100, 200, 500, 1000])
                ax.set_ylim(min(y) / 1.3, 1.3 * max(y))
                ax.tick_params(axis="x", labelsize=8)
            else:
                ax.set_ylim(0, 1.15 * max(y))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(plain)
                axis.set_minor_formatter(NullFormatter())
        with fsio.staged(PICTURE) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def main() -> None:
    """Measure, print and, if asked to, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tiny or (given.train and given.train[1] == str(TINY["D_IN"])):
        globals().update(TINY)
    if given.train:
        train_on(Path(given.train[0]))
        return
    widths = step_times()
    with tempfile.TemporaryDirectory() as folder:
        stores = [make_store(Path(folder) / f"{n}", n) for n in ROWS]
        rates, waited = shared_rates(stores[-1])
        peaks = [peak_of(store.folder) for store in stores]
    curves = (
        ("saefty: latents", WIDTHS, widths, "{:,.0f} ms a step"),
        ("saefty: SAEs in a pass", SAES, rates, "{:,.0f} rows/s, all SAEs"),
        ("saefty: rows of the store", ROWS, peaks, "{:,.0f} MB at most"),
    )
    rows = [
        {
            "what": what,
            "size": f"{size:,}",
            "figure": text.format(value),
            "relative": f"{value / values[0]:.2f}",
        }
        for what, sizes, values, text in curves
        for size, value in zip(sizes, values, strict=True)
    ]
    print(page.table(COLUMNS, rows), flush=True)
    if given.write:
        ahead, after = (", ".join(waited[way]) for way in (True, False))
        note = f" Waiting for rows took {ahead} of a pass with {', '.join(map(str, SAES))} SAEs; "
        note += f"where they are not read ahead, {after}."
        note += "\n\n![A step's time, rows learnt a second, peak memory](pictures/scaling.png)"
        page.put("scaling", "python benchmarks/scaling.py --write", COLUMNS, rows, note)
        draw(widths, rates, peaks)


if __name__ == "__main__":
    main()
