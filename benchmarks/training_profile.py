"""One training step of a TopK SAE, part by part, each beside what the machine allows for it.

Usage: python benchmarks/training_profile.py [--setting 512 768] [--write] [--tiny]

The calls of the compiled kernels are timed within whole steps. The floor of the encoder is one
product in bfloat16 into memory that is there; that of anything else is the memory it has to read
and write once, at the rate at which this machine copies.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import page
from measure import timed
from saefty.kernels import cpu, tiles
from saefty.optimisation import Trainee
from saefty.saes.base import SaeConfig
from saefty.training_settings import OptimizerSection
from training_speed import SETTINGS, TINY, make_pool

PARTS = {
    "packed": "encoder: rounding its weights",
    "rounded": "encoder: rounding its weights",
    "tile_topk": "encoder: product, selection, candidates anew in float32",
    "screen": "encoder: selection",
    "rescore": "encoder: candidates anew in float32",
    "topk": "encoder: selection",
    "reconstruct": "decoding, error, its products with the decoder",
    "by_latent": "gradients, latent by latent",
    "latent_gradients": "gradients, latent by latent",
    "latent_gradients_by_rows": "gradients, latent by latent",
    "latent_gradients_by_slices": "gradients, latent by latent",
    "adamw": "AdamW, unit rows",
}
PRODUCT, WHOLE = "encoder: product", "saefty's whole step"
REST = "all else (clipping, dead latents, sums, calls)"
COLUMNS = {"part": "part", "ms": "ms", "share": "share", "floor": "floor, ms", "times": "× floor"}
WARM_UP, STEPS = 3, 20


class Clock:
    """Adds up how long calls take, by part."""

    def __init__(self) -> None:
        self.times: dict[str, float] = defaultdict(float)

    def watch(self, function, part=None):
        """Return the function with its calls timed; a C function's name says which part it is."""

        def call(*given, **named):
            began = time.perf_counter()
            found = function(*given, **named)
            self.times[part or PARTS[given[0].__name__]] += (time.perf_counter() - began) * 1e3
            return found

        return call


def floors(d_in: int, d_sae: int, k: int, batch: int) -> dict[str, float]:
    """Return the least time of each part, in ms."""
    x, W = torch.randn(batch, d_in).bfloat16(), torch.randn(d_sae, d_in).bfloat16()
    out = torch.empty(batch, d_sae, dtype=torch.bfloat16)
    product = min(timed(lambda: torch.mm(x, W.T, out=out), 6)[1:])
    source = torch.zeros(2**25)
    there = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / min(timed(lambda: there.copy_(source), 6)[1:])  # bytes a ms
    weights, rows, entries = d_sae * d_in * 4, batch * d_in * 4, batch * k * 4
    moved = {
        "rounded": weights * 1.5,
        "reconstruct": 2 * rows + weights + 3 * entries,
        "latent_gradients": 2 * rows + 3 * weights + 2 * entries,
        "adamw": 2 * 7 * weights,
    }
    found = {PARTS[name]: amount / copied for name, amount in moved.items()}
    return {**found, PARTS["tile_topk"]: product, PRODUCT: product}


def profile(setting: tuple[int, ...], steps: int) -> tuple[float, dict[str, float]]:
    """Return the median time of a step and the mean time of its parts, in ms."""
    d_in, d_sae, k, batch, _ = setting
    with tempfile.TemporaryDirectory() as folder:
        pool = torch.from_numpy(np.load(make_pool(Path(folder), d_in, batch)))
    batches = pool.split(batch)
    trainee = Trainee(
        SaeConfig("topk", d_in, d_sae, k),
        OptimizerSection(lr=1e-3, warmup_steps=0),
        grad_clip=1.0,
        n_steps=10**9,
        dead_after=10**7,
    )
    trainee.start(batches[0], seed=0)
    for i in range(WARM_UP):
        trainee.step(batches[i], i)
    clock, multiply = Clock(), torch.addmm
    cpu.call, tiles.call = (clock.watch(module.call) for module in (cpu, tiles))
    torch.addmm = clock.watch(multiply, PRODUCT)
    try:
        times = []
        for i in range(WARM_UP, WARM_UP + steps):
            x = batches[i % len(batches)]
            times += timed(lambda x=x, i=i: trainee.step(x, i), 1)
    finally:
        torch.addmm = multiply
    parts = {part: ms / steps for part, ms in clock.times.items()}
    parts[REST] = sum(times) / steps - sum(parts.values())
    return statistics.median(times), parts


def rows_of(parts: dict[str, float], least: dict[str, float]) -> list[dict]:
    """Return one row of text for each part, and one for the step."""
    whole = sum(parts.values())
    least = {**least, WHOLE: sum(least.get(part, 0.0) for part in parts)}
    rows = []
    for part, ms in [*sorted(parts.items(), key=lambda item: -item[1]), (WHOLE, whole)]:
        floor = least.get(part, 0.0)
        rows.append(
            {
                "part": part,
                "ms": f"{ms:.1f}",
                "share": f"{ms / whole:.0%}",
                "floor": f"{floor:.1f}" if floor else "",
                "times": f"{ms / floor:.1f}" if floor else "",
            }
        )
    return rows


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", type=int, nargs="+", default=list(SETTINGS), help="Widths.")
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    for width in given.setting[: 1 if given.tiny else None]:
        setting = TINY if given.tiny else SETTINGS[width]
        median, parts = profile(setting, 2 if given.tiny else STEPS)
        rows = rows_of(parts, floors(*setting[:4]))
        print(page.table(COLUMNS, rows), flush=True)
        if given.write:
            command = f"python benchmarks/training_profile.py --setting {width} --write"
            note = f" A step's median is {median:.0f} ms; the parts are means of {STEPS} steps."
            page.put(f"training profile {width}", command, COLUMNS, rows, note)


if __name__ == "__main__":
    main()
