"""The vision-language model: what it reads in training; the shipped weights see and read."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from saefty.sandbox.language_model import FIRST_ANSWER_WEIGHT
from saefty.sandbox.vision_model import (
    IMAGE,
    PATCHES,
    VISION_MODEL_FOLDER,
    VISION_REFERENCE,
    build_vision_processor,
    pixel_values,
    train_vision_model,
    training_scenes,
)
from saefty.sandbox.vision_world import VisionWorld

WORLD = VisionWorld(seed=0)


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(VISION_MODEL_FOLDER, dtype="auto").eval()
    return model, AutoProcessor.from_pretrained(VISION_MODEL_FOLDER, backend="pil")


def first_words(shipped, scenes, images=None):
    """The first word of the model's answer to each scene, read by the shipped processor."""
    model, processor = shipped
    images = [scene.image for scene in scenes] if images is None else images
    content = [[{"type": "image"}, {"type": "text", "text": scene.question}] for scene in scenes]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": one}], tokenize=False)
        for one in content
    ]
    batch = processor(
        text=texts, images=images, add_special_tokens=False, padding=True, padding_side="left",
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        best = model(**batch).logits[:, -1].argmax(dim=-1)
    return processor.tokenizer.convert_ids_to_tokens(best.tolist())


def test_training_lowers_the_loss_and_saves_a_model_that_loads(tmp_path):
    losses = train_vision_model(VisionWorld(seed=1), tmp_path, seed=1, steps=25)
    assert len(losses) == 25
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.float32
    assert AutoProcessor.from_pretrained(tmp_path, backend="pil").image_token == IMAGE


def test_training_is_repeatable_and_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    runs = [train_vision_model(WORLD, tmp_path / name, seed=1, steps=2) for name in "ab"]
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_training_reads_what_the_processor_makes_of_a_picture_and_a_conversation(shipped):
    scenes = WORLD.scenes(8, seed=1)
    processor = shipped[1]
    data = training_scenes(scenes, processor.tokenizer)
    for row, scene in enumerate(scenes):
        question = [{"type": "image"}, {"type": "text", "text": scene.question}]
        turns = [{"role": "user", "content": question},
                 {"role": "assistant", "content": scene.answer}]  # fmt: skip
        text = processor.apply_chat_template(turns, tokenize=False)
        read = processor(
            text=text, images=scene.image, add_special_tokens=False, return_tensors="pt"
        )
        ids = read.input_ids[0].numpy()
        np.testing.assert_array_equal(data.ids[row, : len(ids)], ids)
        assert (ids == processor.tokenizer.get_vocab()[IMAGE]).sum() == PATCHES
        torch.testing.assert_close(pixel_values(data.images[row : row + 1]), read.pixel_values)


def test_only_the_answer_is_a_target_and_its_first_word_weighs_most():
    scenes = WORLD.scenes(8, seed=2)
    tokenizer = build_vision_processor(WORLD).tokenizer
    data = training_scenes(scenes, tokenizer)
    for ids, weights, scene in zip(data.ids, data.weights, scenes, strict=True):
        words = tokenizer.convert_ids_to_tokens(ids[weights > 0].tolist())
        assert words == [*scene.answer.split(), "<eos>"]
        assert weights[weights > 0].tolist() == [FIRST_ANSWER_WEIGHT, *[1.0] * (len(words) - 1)]


def test_the_shipped_weights_are_small_and_load_as_float32(shipped):
    assert sum(file.stat().st_size for file in VISION_MODEL_FOLDER.iterdir()) < 4_000_000
    assert shipped[0].dtype == torch.float32
    assert 5e5 < sum(p.numel() for p in shipped[0].parameters()) < 1e6


def test_the_shipped_processor_is_the_one_of_the_world(shipped):
    built = build_vision_processor(WORLD)
    assert shipped[1].tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert shipped[1].chat_template == built.chat_template


def test_the_shipped_model_is_right_in_every_cell_of_held_out_pairs(shipped):
    scenes = WORLD.scenes(512, seed=77, split="held_out")
    words = first_words(shipped, scenes)
    right = {}
    for word, scene in zip(words, scenes, strict=True):
        cell = scene.colour_class, scene.noun_class
        right.setdefault(cell, []).append(word == ("stop" if scene.harmful else "ok"))
    assert {len(one) for one in right.values()} == {128}
    assert min(np.mean(one) for one in right.values()) >= 0.95


def test_the_same_question_is_refused_beside_one_picture_and_answered_beside_another(shipped):
    scenes = WORLD.scenes(32, seed=78, split="held_out")
    images = [scene.image for scene in scenes]
    # Cells of a quartet come as (cool, place), (cool, weapon), (warm, place), (warm, weapon).
    swapped = [images[i ^ 2] for i in range(32)]
    pairs = zip(first_words(shipped, scenes), first_words(shipped, scenes, swapped), strict=True)
    assert np.mean([set(pair) == {"ok", "stop"} for pair in pairs]) >= 0.9


def test_the_figures_that_ship_with_the_package_were_measured_on_three_worlds_and_hold():
    reference = json.loads(VISION_REFERENCE.read_text(encoding="utf-8"))
    assert len(reference["worlds"]) >= 3
    for figures in reference["worlds"]:
        assert figures["accuracy"] >= 0.95
        assert max(figures["words"], figures["picture"], figures["off"]) <= 0.60
        assert figures["delta_knockout"] >= 0.95
        assert figures["holds"]
