"""One training step of a large TopK SAE on a GPU: saefty beside eai-sparsify and the product alone.

Usage: python benchmarks/gpu_training.py [--libraries ...] [--rounds 3] [--write] [--tiny]

4,096 wide, 131,072 latents, k = 64, batches of 8,192, the encoder's product in bfloat16 in both:
`train.precision=bfloat16` here, autocast there, with its kernels in Triton. Each measurement is a
process of its own, and the libraries take turns. Beside it the encoder's product alone is timed, in
bfloat16 and in chunks: a step that does nothing else would reach a share of 1. It needs one CUDA
GPU with 60 GB; without one it says so and ends. `--tiny` runs small sizes anywhere.

`benchmarks/peers.sh` makes the environment of the peer; on a machine with a GPU it fetches the
torch that can use it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from training_worker import LR, Sparsify

ROOT = Path(__file__).parents[1]
SIZES = {"d_in": 4096, "d_sae": 131_072, "k": 64, "batch": 8192, "steps": 20}
TINY = {"d_in": 64, "d_sae": 2048, "k": 8, "batch": 256, "steps": 2}
N_BATCHES, WARM_UP, CHUNK_BYTES = 8, 5, 1 << 30
PYTHON = {
    "saefty": sys.executable,
    "saefty, all float32": sys.executable,
    "eai-sparsify": ROOT / ".venv-sparsify/bin/python",
}
COLUMNS = {
    "name": "implementation",
    "ms": "ms a step: median (least)",
    "rate": "tokens/s",
    "ratio": "× eai-sparsify",
    "share": "share of the bfloat16 product's rate",
    "memory": "peak GPU MB",
    "fvu": "FVU after the steps",
}


class Saefty:
    """The step of a run of `saefty train` with train.precision=bfloat16."""

    rough = True

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        from saefty.optimisation import Trainee
        from saefty.saes.base import SaeConfig
        from saefty.training_settings import OptimizerSection

        self.trainee = Trainee(
            SaeConfig("topk", x.shape[1], d_sae, k), OptimizerSection(lr=LR, warmup_steps=0),
            grad_clip=1.0, n_steps=10**9, dead_after=10**7, device=x.device, rough=self.rough,
        )  # fmt: skip
        self.trainee.start(x, seed=0)
        self.done = 0
        print("kernels:", type(self.trainee.kernels).__name__)

    def step(self, x: Tensor) -> None:
        self.trainee.step(x, self.done)
        self.done += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        sae = self.trainee.sae
        return sae.decode(sae.encode_sparse(x))


class SaeftyFloat32(Saefty):
    """The same with the whole product in float32."""

    rough = False


class SparsifyOnGpu(Sparsify):
    """sparsify with its kernels in Triton, or nothing."""

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        from sparsify import utils

        print("decoder:", utils.decoder_impl.__name__)
        if x.is_cuda and utils.decoder_impl.__name__ != "triton_decode":
            raise SystemExit("eai-sparsify has no kernels in Triton here: install triton beside it")
        super().__init__(x, d_sae, k)


LIBRARIES = {"saefty": Saefty, "saefty, all float32": SaeftyFloat32, "eai-sparsify": SparsifyOnGpu}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(d_in: int, batch: int) -> list[Tensor]:
    """Return rows made of 20 of 4 d_in random directions each, centred and of unit scale."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator).to(device())
    directions /= directions.norm(dim=1, keepdim=True)
    found = []
    for _ in range(N_BATCHES + 1):
        features = torch.randint(4 * d_in, (batch, 20), generator=generator).to(device())
        amounts = (0.5 + torch.rand(batch, 20, generator=generator)).to(device())
        found.append(
            torch.nn.functional.embedding_bag(
                features, directions, per_sample_weights=amounts, mode="sum"
            )
        )
    mean = found[0].mean(dim=0)
    scale = (found[0] - mean).square().mean().sqrt()
    return [(x - mean) / scale for x in found]


def timed(function) -> float:
    """Return how long a call took on the device, in ms."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def product_time(x: Tensor, d_sae: int) -> float:
    """Return the ms of the encoder's product alone, in bfloat16, a chunk of rows at a time."""
    W = torch.randn(d_sae, x.shape[1], device=x.device).bfloat16().T
    rows = max(1, min(len(x), CHUNK_BYTES // (2 * d_sae)))
    out = torch.empty(rows, d_sae, dtype=torch.bfloat16, device=x.device)

    def product() -> None:
        for part in x.bfloat16().split(rows):
            torch.mm(part, W, out=out[: len(part)])

    return statistics.median([timed(product) for _ in range(10)][3:])


def work(library: str, d_in: int, d_sae: int, k: int, batch: int, steps: int) -> dict:
    """Train in this process and return what was measured."""
    *seen, held_out = batches(d_in, batch)
    torch.manual_seed(0)
    learner, times = LIBRARIES[library](seen[0], d_sae, k), []
    for i in range(WARM_UP + steps):
        x = seen[i % len(seen)]
        times.append(timed(lambda x=x: learner.step(x)))
    memory = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
    with torch.no_grad():
        error = (held_out - learner.reconstruct(held_out)).square().sum()
    fvu = float(error / (held_out - held_out.mean(0)).square().sum())
    del learner
    product = product_time(held_out, d_sae)
    return {"times": times[WARM_UP:], "product": product, "memory": memory, "fvu": fvu}


def measure(library: str, sizes: dict[str, int]) -> dict:
    """Run one process and return what it printed last."""
    command = [PYTHON[library], __file__, "--work", library, json.dumps(sizes)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    *said, result = done.stdout.strip().splitlines()
    print(library, *said, flush=True)
    return json.loads(result)


def rows_of(found: dict[str, list[dict]], batch: int) -> list[dict]:
    """Return one row of text for each library."""
    times = {name: [t for r in results for t in r["times"]] for name, results in found.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = medians.get("eai-sparsify")
    return [
        {
            "name": name,
            "ms": f"{medians[name]:.1f} ({min(times[name]):.1f})",
            "rate": f"{batch / medians[name] * 1e3:,.0f}",
            "ratio": f"{peer / medians[name]:.2f}" if peer else "n/a",
            "share": f"{statistics.median(r['product'] for r in results) / medians[name]:.2f}",
            "memory": f"{max(r['memory'] for r in results):.0f}",
            "fvu": f"{results[0]['fvu']:.4f}",
        }
        for name, results in found.items()
    ]


def main() -> None:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", nargs="+", default=list(PYTHON), choices=list(PYTHON))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    parser.add_argument("--work", nargs=2, metavar=("LIBRARY", "SIZES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(work(given.work[0], **json.loads(given.work[1]))))
        return
    if not (given.tiny or torch.cuda.is_available()):
        print("There is no CUDA GPU here, so nothing is measured; --tiny tries the script.")
        return
    absent = [name for name in given.libraries if not Path(PYTHON[name]).exists()]
    if absent:
        raise SystemExit(f"{', '.join(absent)} is not installed: run benchmarks/peers.sh first.")
    sizes = TINY if given.tiny else SIZES
    found: dict[str, list[dict]] = {name: [] for name in given.libraries}
    for _ in range(given.rounds):
        for name, results in found.items():
            results.append(measure(name, sizes))
    import page

    rows = rows_of(found, sizes["batch"])
    print(page.table(COLUMNS, rows))
    if given.write and not given.tiny:
        gpu = torch.cuda.get_device_name()
        note = f" The GPU is one {gpu}, with Triton {version('triton')}."
        page.put("gpu training", "python benchmarks/gpu_training.py --write", COLUMNS, rows, note)


if __name__ == "__main__":
    main()
