"""δ of every block of a random Llama: one forward pass against two for each block.

Usage: python benchmarks/contrast_speed.py [--rounds 5] [--prompts 16] [--tiny]

The model is that of extraction_speed.py: 512 wide, 8 blocks of 8 heads, float32. The prompts have
256 words, of which the second quarter stands for an image: no vision tower runs, which the plain
way would have to run for each pass. The plain way reads each block's δ by two passes that stop
behind it, one with its attention on and one with it off, the first shared by all blocks; attention
is turned off by plain hooks. All ways alternate in one process. Exits with 1 if a δ differs from
the plain way's by more than 1e-5 of the largest activation.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

import page
from extraction_speed import SIZES, SMALL, make_model
from measure import take_turns
from saefty.models.base import TokenBatch, load_model
from saefty.models.contrast import ContrastSection, capture_contrast
from saefty.models.transformer import TransformerModel
from saefty.records import Example, Site

WORDS = 256
CASES = [
    ("zero_attention", "post_attn_resid"),
    ("zero_attention", "resid_post"),
    ("knockout", "post_attn_resid"),
    ("knockout", "resid_post"),
]
COLUMNS = {
    "way": "way",
    "fast": "one pass, ms",
    "plain": "two passes a block, ms",
    "pass": "× a pass without contrast",
    "ratio": "times faster",
    "gap": "largest difference",
}


def make_batch(model: TransformerModel, prompts: int, words: int) -> TokenBatch:
    """Return prompts of one length whose second quarter stands for an image."""
    stream = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, model.info.vocab_size - 1, (prompts, words), generator=stream).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in drawn]
    batch = model.collate(model.tokenize([Example(t, t, raw=True) for t in texts]))
    image = torch.zeros_like(batch.mask)
    image[:, words // 4 : words // 2] = True
    return replace(batch, image=image)


@torch.no_grad()
def plainly(
    model: TransformerModel, batch: TokenBatch, part: str, method: str
) -> dict[Site, Tensor]:
    """Return δ of every block by plain hooks."""
    sites = [Site(layer, part) for layer in range(model.n_layers)]
    length = batch.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(batch.ids), 1, -1, -1)
    hidden = causal & ~(~batch.image[:, None, :, None] & batch.image[:, None, None, :])

    def masking(layer: int, mask: Tensor):
        return model.blocks[layer].self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )

    def zero(module, args, output):
        return torch.zeros_like(output[0]), *output[1:]

    everywhere = [masking(site.layer, causal) for site in sites] if method == "knockout" else []
    on = model.capture(batch, sites, batch.mask)
    delta = {}
    for site in sites:
        if method == "knockout":
            handle = masking(site.layer, hidden)
        else:
            handle = model.blocks[site.layer].self_attn.register_forward_hook(zero)
        delta[site] = on[site] - model.capture(batch, [site], batch.mask)[site]
        handle.remove()
    for handle in everywhere:
        handle.remove()
    return delta


def measure(model: TransformerModel, batch: TokenBatch, rounds: int) -> list[dict[str, str]]:
    """Return one row of the table for each case."""
    ways: dict[str, Callable[[], dict[Site, Tensor]]] = {}
    gaps = {}
    for method, part in CASES:
        sites = [Site(layer, part) for layer in range(model.n_layers)]
        section = ContrastSection(method=method)
        name = f"saefty, {method} at {part}"
        ways[name] = lambda s=sites, c=section: capture_contrast(model, batch, s, batch.mask, c)
        ways[f"plain {name}"] = lambda p=part, m=method: plainly(model, batch, p, m)
        ways[f"on {name}"] = lambda s=sites: model.capture(batch, s, batch.mask)
        fast, plain, on = ways[name](), ways[f"plain {name}"](), ways[f"on {name}"]()
        scale = max(float(x.abs().max()) for x in on.values())
        gaps[name] = max(float((fast[s] - plain[s]).abs().max()) for s in sites) / scale
    kept, _ = take_turns(ways, rounds, 0.0)
    middle = {name: statistics.median(times[name] for times in kept) for name in ways}
    return [
        {
            "way": name,
            "fast": f"{middle[name]:.0f}",
            "plain": f"{middle[f'plain {name}']:.0f}",
            "pass": f"{middle[name] / middle[f'on {name}']:.2f}",
            "ratio": f"{middle[f'plain {name}'] / middle[name]:.1f}",
            "gap": f"{gaps[name]:.1e}",
        }
        for name in gaps
    ]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(str(make_model(Path(folder), given.tiny)), dtype="float32", device="cpu")
        assert isinstance(model, TransformerModel)
        assert model.n_layers == SIZES["num_hidden_layers"]
        words = SMALL["hidden_size"] if given.tiny else WORDS
        rows = measure(model, make_batch(model, given.prompts, words), given.rounds)
    print(page.table(COLUMNS, rows))
    return int(any(float(row["gap"]) > 1e-5 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
