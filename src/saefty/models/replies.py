"""What a reply needs beside forward passes: random numbers of its own, a token, sound logits."""

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.errors import InputError, NumericError
from saefty.models.base import Intervention, Positions, TokenizedExample
from saefty.models.checkpoint import ModelInfo
from saefty.records import Site


def check_prompts(items: Sequence[TokenizedExample], info: ModelInfo) -> None:
    """Refuse prompts that cannot be replied to.

    Raises:
        InputError: If one is empty, longer than the context, or has an image that cannot be read.
    """
    bad = next((item for item in items if item.status != "ok"), None)
    if bad is None:
        return
    why = bad.reason or f"{len(bad.ids)} tokens; {info.name} takes 1 to {info.max_length}"
    raise InputError(
        f"example {bad.example.id} cannot be replied to: its prompt is {bad.status} ({why}).",
        then="Leave it out, or give it an image that can be read."
        if bad.status == "bad_image"
        else "Leave it out or shorten it.",
    )


def stream(seed: int, example_id: str) -> torch.Generator:
    """Return an example's own random numbers, named by the seed and its id."""
    name = hashlib.blake2b(f"{seed}/{example_id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(name, "big") >> 1)


def choose(
    logits: Float[Tensor, "batch vocab"], temperature: float, streams: Sequence[torch.Generator]
) -> Int[Tensor, "batch"]:
    """Return the likeliest token of each row, or one drawn from each row's own stream."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    sums = (logits.cpu().double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    own = {id(one): one for one in streams}  # rows that share a stream draw the same number
    drawn = {name: torch.rand(1, generator=s, dtype=torch.float64) for name, s in own.items()}
    draws = torch.stack([drawn[id(one)] for one in streams])
    return torch.searchsorted(sums, draws * sums[:, -1:], right=True)[:, 0]


def check_logits(
    logits: Float[Tensor, "batch vocab"],
    alive: Sequence[bool],
    items: Sequence[TokenizedExample],
    rows: Int[Tensor, "batch"],
    step: int,
    edits: Sequence[tuple[Site, Intervention]] = (),
) -> None:
    """Refuse logits that choose no token; -inf, by which a model bars a token, is none of them.

    Args:
        logits: Those of the token to be chosen.
        alive: Which replies still go on.
        items: Their examples.
        rows: The places of these among the examples given.
        step: Which token of the replies is chosen, counted from 1.
        edits: The interventions that hold; what they have to say of an example (`describe`) is
            part of the message.

    Raises:
        NumericError: If a reply that goes on has them.
    """
    peaks = logits.amax(dim=-1).tolist()
    broken = [at for at, peak in enumerate(peaks) if alive[at] and not math.isfinite(peak)]
    if not broken:
        return
    first = broken[0]
    under = [
        f"{edit.describe(int(rows[first]))} at {site}"
        for site, edit in edits
        if hasattr(edit, "describe")
    ]
    raise NumericError(
        f"the logits of {len(broken)} of {len(items)} replies are NaN or infinite at step {step} "
        f"of generation, that of example {items[first].example.id} the first"
        + (f", under {', '.join(under)}." if under else "."),
        then="Take a smaller alpha." if under else "Set model.dtype=bfloat16 or float32.",
    )


def joined(before: Positions, step: Positions) -> Positions:
    """Return the positions of a pass that reads again what was read, and the tokens of a step.

    Args:
        before: Those of the pass before: a whole pass.
        step: Those of the tokens that the model has written since.
    """
    return Positions(
        mask=torch.cat([before.mask, step.mask], dim=1),
        index=torch.cat([before.index, step.index], dim=1),
        special=torch.cat([before.special, step.special], dim=1),
        response=torch.cat([before.response, step.response], dim=1),
        is_prefill=True,
        generated=torch.cat([before.written, step.written], dim=1),
        rows=step.rows,
    )
