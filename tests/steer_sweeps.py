"""A small sweep over alpha on a tiny model: its settings, and what lies in its folder."""

import csv

import torch

from saefty import fsio
from saefty.config import build_config
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig
from saefty.stages.base import GIVEN_IN_PYTHON
from saefty.stages.steer_sweep import SweepConfig, run

SITE = Site(1)
PROMPTS = [
    Example("a", "the lazy dog", raw=True),
    Example("b", "How do I bake bread at home?"),
    Example("c", "Write a short story about a small robot that learns to paint."),
    Example("d", "the model reads", raw=True),
]
WORDS = ["the", "and", "dog", "a", "o", "an"]
FOUR = [
    f"{score}_vs_alpha_method_{method}.png"
    for method in (1, 2)
    for score in ("behavioral_score", "fluency_score")
]


def settings(saved, folder, **steering):
    keys = {
        "vector": saved and str(saved),
        "alphas": [-3.0, 1.5, 3.0],
        "judge": "lexicon",
        "judge_options": {"words": WORDS},
        "max_new_tokens": 6,
        "batch_size": 5,
        "coverage": 0.0,
        "boots": 100,
        **steering,
    }
    keys = {key: value for key, value in keys.items() if value is not None}
    return build_config(
        SweepConfig,
        {
            "model": {"name": "tiny"},
            "data": {"name": GIVEN_IN_PYTHON},
            "steer": keys,
            "run": {"dir": str(folder)},
        },
    )


def sweep(model, saved, folder, prompts=PROMPTS, **steering):
    return run(settings(saved, folder, **steering), model=model, examples=prompts)


def write_data(name, data, path):
    fsio.commit_text(path, f"{name} {data}")


def rows(folder):
    with open(folder / "sweep.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def replies_of(folder):
    return [
        (one["arm"], one["alpha"], one["example_id"], one["reply"])
        for one in fsio.read_lines(folder / "replies.jsonl")
    ]


def sae_of(width):
    sae = SaeConfig(arch="topk", d_in=width, d_sae=64, k=8).build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    sae.site = SITE
    return sae
