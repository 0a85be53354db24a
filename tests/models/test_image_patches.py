"""How many patches an image is cut into, counted where the model computes them; and the plan."""

from functools import cache

import pytest
from torch import nn

import tiny_vlms
from contrast_truth import hooked
from saefty.models.base import load_model
from saefty.models.batching import plan_batches
from saefty.reading import ReadingSection, prepare
from saefty.records import ROLES, Example

FEW_TOKENS = ("gemma3", "idefics3", "smolvlm", "mllama")
"""Families that give the text fewer tokens of an image than its tower computes patches."""


@cache
def loaded(family):
    return load_model(str(tiny_vlms.folder_of(family)))


def examples(n=4):
    paths = tiny_vlms.example_images()
    return [Example(f"i{i}", "What is shown?", image=paths[i % 4]) for i in range(n)]


def computed(model, item):
    """Return how many patches come out of what embeds them, in a pass over one example."""
    (embedding,) = [
        module
        for name, module in model.model.named_modules()
        if name.endswith(("patch_embedding", "patch_embed")) and not isinstance(module, nn.Identity)
    ]
    seen = []

    def count(module, args, out):
        seen.append(out.shape[0] if out.ndim == 2 else out[:, 0].numel())  # [n, d], [t, d, h, w]

    with hooked(embedding.register_forward_hook(count)):
        model.logits(model.collate([item]))
    return sum(seen)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_patches_are_those_that_the_image_tower_computes(family):
    model = loaded(family)
    for item in model.tokenize(examples()):
        assert item.patches == computed(model, item) > 0
    (text,) = model.tokenize([Example("t", "no picture")])
    assert text.patches == 0


@pytest.mark.parametrize("family", FEW_TOKENS)
def test_a_pass_holds_no_more_patches_than_tokens_where_an_image_has_few(family):
    model = loaded(family)
    items = model.tokenize(examples())
    of_image = [int((item.roles == ROLES.index("image")).sum()) for item in items]
    assert all(2 * tokens <= item.patches for tokens, item in zip(of_image, items, strict=True))
    most = max(item.patches for item in items)
    budget = 3 * max(most, *(len(item.ids) for item in items))
    reading = prepare(model, examples(12), ReadingSection(token_budget=budget))
    batches = [batch for piece in reading.plan.pieces for batch in piece]
    assert len(batches) > 2
    assert sorted(i for batch in batches for i in batch) == list(range(12))
    for batch in batches:
        held = [items[i % 4] for i in batch]
        assert len(batch) * max(item.patches for item in held) <= budget
        assert len(batch) * max(len(item.ids) for item in held) <= budget


def test_images_and_tokens_are_budgets_of_their_own_and_texts_fill_the_rest():
    lengths, patches = [4, 4, 4, 4, 4], [0, 10, 0, 2, 0]
    assert plan_batches(lengths, 20) == [[0, 1, 2, 3, 4]]
    # Padded to the largest image, 10 patches each: two of them are 20.
    assert plan_batches(lengths, 20, patches=patches) == [[0, 1], [2, 3, 4]]
    assert plan_batches([30, 3], 20, patches=[0, 50]) == [[0], [1]]
    assert plan_batches(lengths, 20, patches=[0] * 5) == plan_batches(lengths, 20)
