"""One training up to an FVU in a process of its own: `time_to_fvu.py` runs it in each environment.

Usage: python benchmarks/fvu_worker.py LIBRARY POOL RATE TARGET LIMIT D_SAE K BATCH

It prints one line of JSON: the seconds of each step, and the FVU of held-out rows behind the last.
"""

import json
import sys
import time
from pathlib import Path

import torch

import training_worker as worker
from pool import Pool

EVERY = 5


def learn(library: str, pool: str, target: float, limit: float, sizes: list[int]) -> dict:
    """Train until the FVU is down to the target or the seconds of all steps are up to the limit."""
    d_sae, k, batch = sizes
    rows = Pool(Path(pool), batch)
    torch.manual_seed(0)
    learner, held_out = worker.LIBRARIES[library](rows[0], d_sae, k), rows.held_out
    times, fvu = [], float("inf")
    while fvu > target and sum(times) < limit:
        x = rows[len(times)]
        began = time.perf_counter()
        learner.step(x)
        times.append(time.perf_counter() - began)
        if len(times) % EVERY == 0:
            with torch.no_grad():
                fvu = worker.fvu(held_out, learner.reconstruct(held_out))
    return {"times": times, "fvu": fvu}


if __name__ == "__main__":
    name, file, rate, *numbers = sys.argv[1:]
    worker.LR = float(rate)
    sizes = [int(number) for number in numbers[2:]]
    print(json.dumps(learn(name, file, float(numbers[0]), float(numbers[1]), sizes)))
