"""What a person sets about training: its length, and how weights move."""

import math
from typing import Literal

from pydantic import Field

from saefty.config import Config

MAX_WARMUP_STEPS = 1000


class TrainSection(Config):
    """How long to train, on which layers, and what to watch."""

    layers: tuple[int, ...] | None = None
    """Layers to train on, counted from 0; None takes all that were extracted."""

    max_steps: int = Field(default=5000, gt=0)
    """Stop after this many batches."""

    epochs: float | None = Field(default=None, gt=0)
    """Stop after this many passes over the rows, if that comes before `max_steps`."""

    batch_size: int = Field(default=4096, gt=0)
    """Rows in a batch; at most the rows there are."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """How the encoder multiplies to propose the k largest latents; all else is float32, the weights
    too, and so is all of an architecture without k."""

    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest global norm of a gradient; None leaves gradients as they are."""

    seed: int = Field(default=0, ge=0)
    """Seed of the split, the first weights and the order of the batches."""

    validation: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows to hold out, whole examples at a time; 0 trains on all."""

    validation_rows: int = Field(default=16_384, gt=0)
    """Hold out no more rows than about this."""

    eval_every: int = Field(default=250, gt=0)
    """Steps between measurements on the held-out rows."""

    patience: int | None = Field(default=10, gt=0)
    """Stop after this many measurements without a new best; None never stops early."""

    dead_rows: int | None = Field(default=None, gt=0)
    """Rows without firing after which a latent is dead; None is 10 % of the run, at most 10 M."""

    log_every: int = Field(default=50, gt=0)
    """Steps between lines of train_log.jsonl."""

    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""

    device: str = "auto"
    """`auto` (cuda, else cpu), `cpu`, `cuda`, `cuda:1`."""


class OptimizerSection(Config):
    """How weights move."""

    lr: float = Field(default=3e-4, gt=0)
    """Highest learning rate."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which the rate rises from 0; None takes 5 % of the steps, at most 1000."""

    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine ends, as a share of `lr`."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's moving average."""

    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the squared gradient's moving average."""

    eps: float = Field(default=6.25e-10, gt=0)
    """Added to the root of the squared gradient; small, because rare latents have small ones."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of every weight per unit of learning rate."""

    def rate(self, step: int, n_steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(MAX_WARMUP_STEPS, n_steps // 20)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        passed = (step - warmup) / max(1, n_steps - warmup)
        share = self.final_lr_share
        return self.lr * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, passed))))
