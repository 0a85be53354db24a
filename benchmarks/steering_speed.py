"""Steered generation beside plain generation: what the hooks cost; and what effect data cost.

Usage: python benchmarks/steering_speed.py [--only hooks|effects] [--rounds 100] [--prompts 32]
[--write] [--tiny]

The sandbox's model replies to requests of its world with up to 24 tokens each, greedily, in batches
of 32. All ways alternate in one process, in turning order, timed by the process's processor time.
Ways of one round are compared with each other, as they met the same machine, and the median over
the rounds is told. The vectors are so short that no token changes: the same tokens are generated,
and what differs is the hooks alone. Then effects of 1,500 vectors are measured (32 rollouts of up
to 16 tokens each, read again by an SAE of 512 latents), on two threads, by the clock on the wall,
beside a plain way with some of the vectors: one vector at a time, by transformers' own `generate`
under a hook, with its 32 rollouts as one batch, and all hidden states of the texts read again.
Exits with 1 if a token does change, or, unless --tiny, if one vector at one site costs more than
5 %, or effect data a minute.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import page
from saefty.config import build_config
from saefty.interventions.base import intervening
from saefty.interventions.steer import steer
from saefty.models.base import ModelAdapter, load_model
from saefty.models.chat import with_response
from saefty.records import Example, Site
from saefty.sae_ts.effects import read_effects
from saefty.saes.base import SaeConfig, SparseAutoencoder
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.world import World
from saefty.stages import effects

NEW_TOKENS, BATCH, LIMIT = 24, 32, 0.05
VECTORS, ROLLOUTS, LATENTS, MOST_SECONDS = 1500, 32, 512, 60.0
REPLY, PLAIN_VECTORS = 16, 24
SITE = Site(1)
PLAIN = "plain"
CHECKED = ("saefty, method 1", "saefty, method 2")
COLUMNS = {
    "way": "way",
    "median": "tokens/s, median",
    "best": "tokens/s, best",
    "ratio": "time × plain, median",
    "middle": "its middle half",
}


def ways(model: ModelAdapter, prompts: list[Example]) -> dict[str, Callable[[], list[str]]]:
    """Return what is timed, by name."""
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(len(prompts), model.d_model, generator=torch.Generator().manual_seed(1))
    short = 1e-6
    sites = [Site(layer) for layer in range(model.n_layers)]
    edits = {
        PLAIN: [],
        "saefty, method 1": [(SITE, steer(vector, short))],
        "saefty, method 2": [(SITE, steer(vector, short, method=2))],
        "saefty, another vector a row": [(SITE, steer(rows, [short] * len(rows)))],
        "saefty, method 1 behind every block": [(site, steer(vector, short)) for site in sites],
    }

    def replying(edit: list) -> Callable[[], list[str]]:
        def reply() -> list[str]:
            with intervening(model, edit):
                return model.generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=BATCH)

        return reply

    return {name: replying(edit) for name, edit in edits.items()}


def measure(timed: dict[str, Callable[[], list[str]]], rounds: int) -> list[dict[str, float]]:
    """Return the seconds of each way in each round; ways take turns at being first."""
    names, found = list(timed), []
    for number in range(rounds):
        seconds = {}
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            began = time.process_time()
            timed[name]()
            seconds[name] = time.process_time() - began
        found.append(seconds)
    return found


def measure_effects(
    model: ModelAdapter, prompts: list[Example], *, tiny: bool
) -> tuple[list[dict[str, str]], float]:
    """Return rows on effect data of many vectors and the plain way, and the former's seconds."""
    torch.set_num_threads(2)
    sae = SaeConfig(arch="topk", d_in=model.d_model, d_sae=LATENTS, k=5).build()
    with torch.no_grad():  # latents that fire: an SAE begins with weights of zero
        for weight in (sae.W_enc, sae.W_dec):
            generator = torch.Generator().manual_seed(len(weight))
            weight.copy_(torch.randn(weight.shape, generator=generator) / model.d_model**0.5)
    sae.site = SITE
    vectors, rollouts, few = (20, 2, 2) if tiny else (VECTORS, ROLLOUTS, PLAIN_VECTORS)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": {"name": str(MODEL_FOLDER)},
            "effects": {
                "vectors": vectors,
                "rollouts": rollouts,
                "max_new_tokens": REPLY,
                "scale": 20.0 if tiny else None,
            },
            "engine": {"threads": 2},
            "run": {"dir": str(Path(folder) / "effects")},
        }
        began = time.perf_counter()
        found = effects.run(
            build_config(effects.EffectsConfig, settings), model=model, sae=sae, examples=prompts
        )
        seconds = time.perf_counter() - began
        made = read_effects(found.folder)
    length = f"{found.figures['scale_in_residual_norms']:.2f}"
    steps = made.scale * torch.from_numpy(made.vectors[:few])
    given = [prompts[n % len(prompts)] for n in range(rollouts)]
    one_by_one(model, sae, given, steps[:1])  # warms up
    began = time.perf_counter()
    one_by_one(model, sae, given, steps)
    alone = time.perf_counter() - began
    rows = [
        {
            "way": way,
            "vectors": f"{count:,}",
            "rollouts": f"{count * rollouts:,}",
            "seconds": f"{took:.1f}",
            "rate": f"{count / took:.1f}",
            "ratio": f"{(count / took) / (few / alone):.1f}",
            "scale": length,
        }
        for way, count, took in (
            ("saefty steer effects", vectors, seconds),
            ("one vector at a time, a hook", few, alone),
        )
    ]
    return rows, seconds


@torch.no_grad()
def one_by_one(
    model: ModelAdapter, sae: SparseAutoencoder, prompts: list[Example], steps: torch.Tensor
) -> torch.Tensor:
    """Return mean latents of what is written under each vector, as one would first write it."""
    network, block = model.model, model.blocks[SITE.layer]
    means = []
    for step in steps:
        batch = model.collate(model.tokenize(prompts), side="left")
        handle = block.register_forward_hook(lambda _, __, output, step=step: output + step)
        ids = network.generate(
            batch.ids,
            attention_mask=batch.mask.long(),
            do_sample=True,
            max_new_tokens=REPLY,
            pad_token_id=0,
        )
        handle.remove()
        replies = model.tokenizer.batch_decode(
            ids[:, batch.ids.shape[1] :], skip_special_tokens=True
        )
        texts = [with_response(*pair) for pair in zip(prompts, replies, strict=True)]
        items = [item for item in model.tokenize(texts) if item.status == "ok"]
        read = model.collate(items)
        states = network(read.ids, attention_mask=read.mask.long(), output_hidden_states=True)
        own = read.response & read.mask & ~read.special
        z = sae.encode(states.hidden_states[SITE.layer + 1][own])
        means.append(z.double().mean(dim=0))
    return torch.stack(means)


EFFECTS = {
    "way": "way",
    "vectors": "vectors",
    "rollouts": "texts written and read again",
    "seconds": "seconds",
    "rate": "vectors/s",
    "ratio": "× one at a time",
    "scale": "their length, residual norms",
}


def hooks(model: ModelAdapter, prompts: list[Example], given: argparse.Namespace) -> list[str]:
    """Measure, print and write what hooks cost; return what is wrong, in words."""
    torch.set_num_threads(1)  # the processor's clock counts all threads
    timed = ways(model, prompts)
    replies = {name: way() for name, way in timed.items()}  # which warms up, too
    changed = [name for name, texts in replies.items() if texts != replies[PLAIN]]
    tokens = sum(len(ids) for ids in model.tokenizer(replies[PLAIN])["input_ids"])
    found = measure(timed, given.rounds)
    rows, ratios = [], {}
    for name in timed:
        times = [seconds[name] for seconds in found]
        each = [seconds[name] / seconds[PLAIN] for seconds in found]
        ratios[name] = statistics.median(each)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        rows.append(
            {
                "way": name,
                "median": f"{tokens / statistics.median(times):,.0f}",
                "best": f"{tokens / min(times):,.0f}",
                "ratio": f"{ratios[name]:.3f}",
                "middle": f"{low:.3f} to {high:.3f}",
            }
        )
    print(page.table(COLUMNS, rows))
    if given.write:
        command = "python benchmarks/steering_speed.py --only hooks --write"
        page.put("steering", command, COLUMNS, rows, " One thread; time is the processor's.")
    slow = [name for name in CHECKED if ratios[name] > 1 + LIMIT and not given.tiny]
    return [
        *([f"replies differ: {', '.join(changed)}"] if changed else []),
        *([f"slower than plain by more than {LIMIT:.0%}: {', '.join(slow)}"] if slow else []),
    ]


def effect_data(
    model: ModelAdapter, prompts: list[Example], given: argparse.Namespace
) -> list[str]:
    """Measure, print and write what effect data cost; return what is wrong, in words."""
    rows, seconds = measure_effects(model, prompts, tiny=given.tiny)
    print(page.table(EFFECTS, rows))
    if given.write:
        command = "python benchmarks/steering_speed.py --only effects --write"
        page.put("steering effects", command, EFFECTS, rows, " Time is the wall's.")
    late = seconds > MOST_SECONDS and not given.tiny
    return [f"effect data took {seconds:.0f} s, more than {MOST_SECONDS:.0f}"] if late else []


def main() -> int:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["hooks", "effects"], help="One of the two tables.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model = load_model(str(MODEL_FOLDER))
    requests = World(0).requests(4 if given.tiny else given.prompts, seed=5)
    prompts = [Example(one.id, one.turns[0].text) for one in requests]
    wrong = hooks(model, prompts, given) if given.only != "effects" else []
    wrong += effect_data(model, prompts, given) if given.only != "hooks" else []
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
