"""Trainings of other architectures in a process of one library: `families_speed.py` runs this file.

Usage: python benchmarks/families_worker.py LIBRARY POOL D_SAE K BATCH STEPS CASE ...

All start from the same weights: decoder rows of norm 1, the encoder their transpose times the one
factor that fits the first batch best. Where a case is *sparse*, thresholds (JumpReLU) or the bias
of the gates are set so that 3 k latents a row are active; at *5 %* that many of all latents, and
where it is *dense* about half of them. What follows is a step as each library's trainer takes it:
float32, Adam at 1e-3. It prints one line of JSON.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import measure
from pool import Pool

LR, WARM_UP, SPARSE, LEVELS = 1e-3, 2, 3, 4
BANDWIDTH = 0.1
THEIRS = "dictionary_learning"


class Start:
    """The weights that a case starts from, the same in every library."""

    def __init__(self, case: str, x: Tensor, d_sae: int, k: int) -> None:
        self.case, self.k, self.arch = case, k, case.split(",")[0]
        directions = torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(0))
        self.W_dec = directions / directions.norm(dim=1, keepdim=True)
        pre = x @ self.W_dec.T
        share = k / d_sae
        if self.arch in {"jumprelu", "gated"}:
            share = {"sparse": SPARSE * k / d_sae, "5 %": 0.05, "dense": 0.5}[case.split(", ")[1]]
        part = pre[:256].flatten()
        self.threshold = float(part.kthvalue(int((1 - share) * len(part))).values)
        z = pre * (pre > self.threshold)
        if self.arch == "gated":
            z = (pre - self.threshold).relu()
        explained = z @ self.W_dec
        factor = float((explained * x).sum() / explained.square().sum())
        self.W_enc = self.W_dec * factor  # latent by latent
        self.threshold = max(self.threshold * factor, 1e-3)
        self.widths = [d_sae // 2**i for i in reversed(range(LEVELS))]
        self.shape = (x.shape[1], d_sae)

    def put(self, weights: dict[str, Tensor], names: dict[str, Tensor]) -> None:
        """Copy into a library's own weights."""
        with torch.no_grad():
            for name, value in names.items():
                weights[name].copy_(value)


class Saefty:
    """The step of a run of `saefty train`."""

    def __init__(self, start: Start, x: Tensor) -> None:
        from saefty.optimisation import Trainee
        from saefty.saes.base import SaeConfig
        from saefty.training_settings import OptimizerSection

        options = {"jumprelu": {"bandwidth": BANDWIDTH}, "matryoshka": {"prefixes": LEVELS}}
        optimizer = OptimizerSection(lr=LR, warmup_steps=0)
        config = SaeConfig(start.arch, *start.shape, start.k, options=options.get(start.arch, {}))
        self.trainee = Trainee(config, optimizer, grad_clip=1.0, n_steps=100, dead_after=10**7)
        self.trainee.start(x, seed=0)
        sae, self.done = self.trainee.sae, 0
        first = {"W_dec": start.W_dec, "W_enc": start.W_enc.T, "b_dec": torch.zeros(1)}
        first["b_enc"] = torch.full((1,), -start.threshold if start.arch == "gated" else 0.0)
        if start.arch == "gated":
            first["b_mag"] = first["b_enc"]
        if start.arch == "jumprelu":
            first["threshold"] = torch.full((1,), start.threshold)
        start.put(dict(sae.named_parameters()), first)

    def step(self, x: Tensor) -> None:
        self.trainee.step(x, self.done)
        self.done += 1

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = self.trainee.sae
        z = sae.activate_in_training(x @ sae.W_enc + sae.b_enc)
        return z, sae.decode(z)


class SaeLens:
    """SAELens's trainer, without the rescaling by decoder norms."""

    def __init__(self, start: Start, x: Tensor) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        kind, options = {
            "batch_topk": ("BatchTopK", {"k": start.k, "rescale_acts_by_decoder_norm": False}),
            "matryoshka": (
                "MatryoshkaBatchTopK",
                {
                    "k": start.k,
                    "rescale_acts_by_decoder_norm": False,
                    "matryoshka_widths": list(start.widths),
                },
            ),
            "jumprelu": ("JumpReLU", {"jumprelu_bandwidth": BANDWIDTH}),
            "gated": ("Gated", {}),
        }[start.arch]
        made = getattr(sae_lens, f"{kind}TrainingSAEConfig")
        config = made(d_in=start.shape[0], d_sae=start.shape[1], **options)
        settings = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=len(x), lr=LR, lr_end=LR
        )
        self.sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
        first = {"W_dec": start.W_dec, "W_enc": start.W_enc.T}
        if start.arch == "gated":
            first |= dict.fromkeys(("b_gate", "b_mag"), torch.full((1,), -start.threshold))
        if start.arch == "jumprelu":
            first["threshold"] = torch.full((1,), start.threshold)
        start.put(dict(self.sae.named_parameters()), first)
        self.trainer = SAETrainer(settings, self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = self.sae.encode_with_hidden_pre(x)
        return z, self.sae.decode(z)


class DictionaryLearning:
    """dictionary_learning's trainers; its package imports much that they do not use."""

    def __init__(self, start: Start, x: Tensor) -> None:
        if THEIRS not in sys.modules:
            base = importlib.util.find_spec(THEIRS).submodule_search_locations[0]
            for name in THEIRS, f"{THEIRS}.trainers":
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = [base + name.removeprefix(THEIRS).replace(".", "/")]
        d_in, d_sae = start.shape
        budget: dict[str, Any] = {"k": start.k}
        sizes = np.diff([0, *start.widths]) / d_sae
        file, name, options = {
            "batch_topk": ("batch_top_k", "BatchTopKTrainer", budget),
            "matryoshka": (
                "matryoshka_batch_top_k",
                "MatryoshkaBatchTopKTrainer",
                budget | {"group_fractions": sizes.tolist()},
            ),
            "jumprelu": (
                "jumprelu",
                "JumpReluTrainer",
                {"bandwidth": BANDWIDTH, "target_l0": 3.0 * start.k, "sparsity_warmup_steps": None},
            ),
            "gated": ("gdm", "GatedSAETrainer", {"sparsity_warmup_steps": None}),
        }[start.arch]
        trainer = getattr(importlib.import_module(f"{THEIRS}.trainers.{file}"), name)
        self.trainer = trainer(
            steps=10**9, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="", lr=LR,
            warmup_steps=0, device="cpu", **options,
        )  # fmt: skip
        self.sae, self.done, self.budget = (
            self.trainer.ae,
            0,
            start.arch not in {"jumprelu", "gated"},
        )
        linear = hasattr(self.sae, "decoder")
        first = {
            "decoder.weight" if linear else "W_dec": start.W_dec.T if linear else start.W_dec,
            "encoder.weight" if linear else "W_enc": start.W_enc if linear else start.W_enc.T,
        }
        if start.arch == "gated":
            first |= dict.fromkeys(("gate_bias", "mag_bias"), torch.full((1,), -start.threshold))
        if start.arch == "jumprelu":
            first["threshold"] = torch.full((1,), start.threshold)
        start.put(dict(self.sae.named_parameters()), first)

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.done, x)
        self.done += 1

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.sae.encode(x, use_threshold=False) if self.budget else self.sae.encode(x)
        return z, self.sae.decode(z)


LIBRARIES = {"saefty": Saefty, "sae-lens": SaeLens, "dictionary-learning": DictionaryLearning}


def run(library: str, pool: Path, case: str, sizes: list[int]) -> dict[str, object]:
    """Return the times of one case's steps, what they led to, and the rate of a product beside."""
    d_sae, k, batch, steps = sizes
    rows = Pool(pool, batch)
    torch.manual_seed(0)
    learner = LIBRARIES[library](Start(case, rows[0], d_sae, k), rows[0])
    before, times = measure.calibrate(), []
    for i in range(WARM_UP + steps):
        x = rows[i]
        times += measure.timed(lambda x=x: learner.step(x), 1)
    after, held_out = measure.calibrate(), rows.held_out
    with torch.no_grad():
        z, x_hat = learner.code(held_out)
    variance = (held_out - held_out.mean(0)).square().sum()
    return {
        "times": times[WARM_UP:],
        "calibration": [before, after],
        "fvu": float((held_out - x_hat).square().sum() / variance),
        "l0": float((z != 0).sum() / len(z)),
    }


if __name__ == "__main__":
    name, file, *rest = sys.argv[1:]
    numbers, cases = [int(given) for given in rest[:4]], rest[4:]
    print(json.dumps({case: run(name, Path(file), case, numbers) for case in cases}))
