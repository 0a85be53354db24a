"""Whether an unlisted family is read rightly: a check on the first batch, before work is spent.

*Patch-back*: what was captured at a site, written back there, must leave the model's last output
(logits, or an encoder's final states) as it is; something else written there must change it. The
first fails where capture and edit look at different tensors, the second where the tensor leads
nowhere. Families that the package's own tests cover are listed and need no check.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.errors import MismatchError
from saefty.models.base import Intervention, ModelAdapter, TokenBatch
from saefty.records import Site

LISTED_FAMILIES = frozenset({
    "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen3_moe", "phi",
    "phi3", "olmo2", "gpt2", "gpt_neox", "gptj", "opt", "bert", "llava", "llava_next",
    "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "idefics3",
    "smolvlm", "mllama",
})  # fmt: skip
"""transformers' model types that are tested: every one in `docs/families.md`."""

ROWS = 2  # examples; one row alone would not show rows mixed up
ROUNDING = 4  # steps of the number format by which a repeated pass may differ


def check_unlisted(model: ModelAdapter, batch: TokenBatch, sites: Sequence[Site]) -> None:
    """Check patch-back at the sites of a model whose family is not listed.

    Raises:
        MismatchError: If a site fails.
    """
    if model.info.family not in LISTED_FAMILIES:
        check_patch_back(model, batch, sites)


def check_patch_back(model: ModelAdapter, batch: TokenBatch, sites: Sequence[Site]) -> None:
    """Write what was captured at each site back there, and then something else.

    Reads the first two examples of the batch, two forward passes a site and two besides.

    Args:
        model: What is to be checked.
        batch: What it is about to read.
        sites: Where it is to be read.

    Raises:
        MismatchError: If writing the captured activations back changes the model's output, or
            writing others does not.
    """
    few = model.collate(batch.items[:ROWS])
    before = model.final(few)[few.mask].float()
    captured = model.capture(few, sites)
    allowed = ROUNDING * torch.finfo(model.dtype).eps * float(before.abs().max())
    for site in sites:
        h = captured[site]
        with model.intervene(site, _always(h)):
            same = _largest_change(model, few, before)
        with model.intervene(site, _always(h.roll(1, dims=-1))):
            other = _largest_change(model, few, before)
        if not same <= allowed:
            what = f"writing the captured activations back moves its output by {same:.2g}"
        elif not other > same:
            what = "its output stays the same, whatever is written there"
        else:
            continue
        raise MismatchError(
            f"{site} is not read rightly in {model.name} ({model.info.architecture}, a family that "
            f"is not among the tested ones): {what}.",
            then="Set extract.hook_point to resid_post, or use a family of docs/families.md.",
        )


def _largest_change(model: ModelAdapter, batch: TokenBatch, before: Tensor) -> float:
    return float((model.final(batch)[batch.mask].float() - before).abs().max())


def _always(h: Float[Tensor, "batch seq d_model"]) -> Intervention:
    return lambda x, positions: h
