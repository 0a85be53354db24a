"""Time one training step of a TopK SAE: ours against the dense formula in torch, same data.

Both do the whole step: encoder, selection, decoder, gradients, projection, clipping, AdamW and
decoder norm. They alternate in one process, after two steps to warm up, and each round also times
the encoder's product alone, which no implementation can avoid: the ratio to it carries over to
other machines. Run: python benchmarks/training_step.py [--rounds 7] [--shape 512,8192,32,4096]
"""

import argparse
import platform
import statistics
import time

import torch

from saefty.optimisation import Trainee
from saefty.saes.base import SaeConfig
from saefty.sandbox.planted import PlantedDictionary
from saefty.training_settings import OptimizerSection

LR = 1e-3


class Dense:
    """TopK as one would first write it: scatter into a dense code, autograd, AdamW."""

    def __init__(self, trainee, k):
        self.k = k
        self.weights = {
            name: torch.nn.Parameter(value.detach().clone().contiguous())
            for name, value in trainee.sae.named_parameters()
        }
        self.adam = torch.optim.AdamW(self.weights.values(), lr=LR, eps=6.25e-10, weight_decay=0.0)

    def step(self, x):
        w = self.weights
        pre = (x @ w["W_enc"] + w["b_enc"]).relu()
        values, indices = pre.topk(self.k, dim=1)
        z = torch.zeros_like(pre).scatter(1, indices, values)
        loss = (z @ w["W_dec"] + w["b_dec"] - x).square().mean()
        loss.backward()
        with torch.no_grad():
            W, g = w["W_dec"], w["W_dec"].grad
            g -= (g * W).sum(dim=1, keepdim=True) * W
            torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
            self.adam.step()
            self.adam.zero_grad()
            W /= W.norm(dim=1, keepdim=True)
        return float(loss.detach())


def timed(function, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return (time.perf_counter() - began) * 1e3, result


def measure(shape, rounds):
    d_in, d_sae, k, batch = shape
    world = PlantedDictionary(n_features=1000, d_in=d_in, offset=0.0)
    x = torch.from_numpy(world.sample(batch * 2)) * d_in**0.5
    batches = [x[:batch], x[batch:]]
    optimizer = OptimizerSection(lr=LR, warmup_steps=0)
    config = SaeConfig("topk", d_in, d_sae, k)
    ours = Trainee(config, optimizer, grad_clip=1.0, n_steps=10**9, dead_after=10**12)
    ours.start(batches[0], seed=0)
    dense = Dense(ours, k)
    W, b = torch.randn(d_in, d_sae), torch.zeros(d_sae)
    times = {"product": [], "dense": [], "ours": []}
    for i in range(rounds + 2):
        now = batches[i % 2]
        product, _ = timed(torch.addmm, b, now, W)
        slow, loss = timed(dense.step, now)
        fast, figures = timed(ours.step, now, i)
        if i >= 2:
            for name, value in zip(times, (product, slow, fast), strict=True):
                times[name].append(value)
    agreement = abs(figures["loss"] - loss) / loss
    return {name: statistics.median(values) for name, values in times.items()}, agreement


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", action="append", help="d_in,d_sae,k,batch")
    arguments = parser.parse_args()
    shapes = arguments.shape or ["512,8192,32,4096", "768,24576,64,2048"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor()}")
    columns = "d_in d_sae k batch dense_ms ours_ms ratio product_ms ours/product loss_differs"
    print("| " + " | ".join(columns.split()) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for text in shapes:
        shape = tuple(int(part) for part in text.split(","))
        ms, agreement = measure(shape, arguments.rounds)
        cells = [
            *(str(part) for part in shape),
            f"{ms['dense']:.0f}", f"{ms['ours']:.0f}", f"{ms['dense'] / ms['ours']:.1f}",
            f"{ms['product']:.0f}", f"{ms['ours'] / ms['product']:.2f}", f"{agreement:.0e}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
