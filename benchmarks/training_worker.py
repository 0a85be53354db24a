"""One training in a process of its own: `training_speed.py` runs this file in each environment.

Usage: python benchmarks/training_worker.py LIBRARY POOL D_SAE K BATCH STEPS

It knows one library, and measures all alike: float32, Adam at a constant rate of 1e-3, batches in
the order of the pool, and one held-out batch. It prints one line of JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import measure
from pool import Pool

LR, WARM_UP = 1e-3, 2


class Saefty:
    """The step of a run of `saefty train`, with its clipping, projection and dead latents."""

    kernels: str | None = None

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        from saefty import matmul
        from saefty.kernels.base import KERNELS
        from saefty.optimisation import Trainee
        from saefty.saes.base import SaeConfig
        from saefty.training_settings import OptimizerSection

        optimizer = OptimizerSection(lr=LR, warmup_steps=0)
        config = SaeConfig("topk", x.shape[1], d_sae, k)
        self.trainee = Trainee(config, optimizer, grad_clip=1.0, n_steps=10**9, dead_after=10**7)
        if self.kernels:
            matmul.settle(matmul.DEFAULT)  # products in parts need a compiler
            self.trainee.kernels = KERNELS[self.kernels]()
        self.trainee.start(x, seed=0)
        self.done = 0

    def step(self, x: Tensor) -> None:
        self.trainee.step(x, self.done)
        self.done += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        sae = self.trainee.sae
        return sae.decode(sae.encode_sparse(x))


class SaeftyFloat32(Saefty):
    """The kernels in C++ with the encoder's whole product in float32, as without bfloat16 units."""

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        from saefty import matmul
        from saefty.kernels.base import KERNELS

        super().__init__(x, d_sae, k)
        matmul.settle(matmul.DEFAULT)
        kernels = self.trainee.kernels
        kernels.topk = partial(KERNELS["torch_sparse"].topk, kernels)


class SaeftyUncompiled(Saefty):
    """The same without the kernels in C++, as on machines without a compiler."""

    kernels = "screened"


class SaeftyPlain(Saefty):
    """Without them, and with the encoder's whole product in float32, as without bfloat16 units."""

    kernels = "torch_sparse"


class SaeLens:
    """SAELens's trainer; its sparse activations need the rescaling by decoder norms to be off."""

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        config = TopKTrainingSAEConfig(
            d_in=x.shape[1],
            d_sae=d_sae,
            k=k,
            use_sparse_activations=True,
            rescale_acts_by_decoder_norm=False,
        )
        settings = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=len(x), lr=LR, lr_end=LR
        )
        self.trainer = SAETrainer(settings, TopKTrainingSAE(config), data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae(x)


class Sparsify:
    """sparsify's SparseCoder with the lines that its trainer runs for a step, and plain Adam."""

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=d_sae, k=k)
        self.coder = SparseCoder(x.shape[1], config, device=x.device)
        self.coder.b_dec.data = x.mean(0)  # as its trainer does before the first step
        self.adam = torch.optim.Adam(self.coder.parameters(), lr=LR, fused=x.is_cuda or None)
        self.since_fired = torch.zeros(d_sae, dtype=torch.long, device=x.device)

    def step(self, x: Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x, dead_mask=None)
        out.fvu.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        self.since_fired += len(x)
        self.since_fired[out.latent_indices.flatten()] = 0

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.coder(x).sae_out


LIBRARIES = {
    "saefty": Saefty,
    "saefty, all float32": SaeftyFloat32,
    "saefty, no compiler": SaeftyUncompiled,
    "saefty, no compiler, all float32": SaeftyPlain,
    "eai-sparsify": Sparsify,
    "sae-lens": SaeLens,
}


def fvu(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def run(library: str, pool: Path, d_sae: int, k: int, batch: int, steps: int) -> dict[str, object]:
    rows = Pool(pool, batch)
    torch.manual_seed(0)
    learner = LIBRARIES[library](rows[0], d_sae, k)
    before, times = measure.calibrate(), []
    for i in range(WARM_UP + steps):
        x = rows[i]
        times += measure.timed(lambda x=x: learner.step(x), 1)
    memory, after = measure.peak_mb(), measure.calibrate()
    x, W, b = rows.held_out, torch.randn(d_sae, rows.d_in).T, torch.zeros(d_sae)
    product = min(measure.timed(lambda: torch.addmm(b, x, W), 4)[1:])
    with torch.no_grad():
        error = fvu(x, learner.reconstruct(x))
    return {
        "library": library,
        "times": times[WARM_UP:],
        "calibration": [before, after],
        "product": product,
        "memory": memory,
        "fvu": error,
    }


if __name__ == "__main__":
    name, file, *sizes = sys.argv[1:]
    print(json.dumps(run(name, Path(file), *map(int, sizes))))
