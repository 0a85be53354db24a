"""How the sandbox's models learn: AdamW on the answers' tokens, at a rate that rises and falls."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 50


def teach(
    model: PreTrainedModel,
    steps: int,
    loss_of: Callable[[int], Float[Tensor, ""]],
    rate_of: Callable[[int], float],
    name: str,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model in place.

    Args:
        model: The model.
        steps: How many steps to take.
        loss_of: The loss of a step, counted from 0.
        rate_of: The learning rate of a step.
        name: What the log calls the model.
        on_step: Called with the number of steps done and the loss.

    Returns:
        The loss of each step.
    """
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate_of(0), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    losses: list[float] = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step:
            on_step(step + 1, losses[-1])
    mean, seconds = float(np.mean(losses[-50:])), time.perf_counter() - started
    log.info("trained the sandbox's %s: %d steps, loss %.3f, %.0f s", name, steps, mean, seconds)
    return losses


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear rise, then half a cosine to zero.

    Args:
        step: Counted from 0.
        steps: How many there are.
    """
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def weighted_loss(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch seq"],
    weights: Float[Tensor, "batch seq"],
    **inputs: Any,
) -> Float[Tensor, ""]:
    """Return the mean loss of the tokens, by weight; `inputs` go to the model beside the ids."""
    # Padding is on the right, so causal attention alone keeps it out.
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
    each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (each * wanted).sum() / wanted.sum()
