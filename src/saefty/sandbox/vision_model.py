"""The sandbox's vision-language model: how it is trained, and where the shipped weights lie.

A Llava: a CLIP vision tower of two blocks, a projector, and a Llama of three blocks, that learns to
answer a vision world's questions or to refuse. It is saved as any Hugging Face model is, in a
folder with its processor, and is loaded by that folder's path. The shipped weights are rebuilt by
`python -m saefty.sandbox.vision_model --out FOLDER`.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from saefty.sandbox.language_model import FIRST_ANSWER_WEIGHT
from saefty.sandbox.teaching import PEAK_RATE, schedule, teach, weighted_loss
from saefty.sandbox.tokenizer import BOS, EOS, ROLE_TOKENS, word_tokenizer
from saefty.sandbox.vision_world import SIDE, Scene, VisionWorld

VISION_MODEL_FOLDER = Path(__file__).parent / "vision_model_weights"
VISION_REFERENCE = Path(__file__).parent / "vision_reference.json"  # measured, on several worlds

IMAGE = "<image>"
PATCH = 8
PATCHES = (SIDE // PATCH) ** 2
MEAN, SPREAD = 0.5, 0.25  # of a channel, scaled to 0–1, as the processor standardises it

STEPS = 800
BATCH = 32

# As in the language model's template the answer follows the question without a mark of its own. A
# message's content is a text, or a list of parts of which one may be the image.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set ns = namespace(text='') %}"
    "{% if message['content'] is string %}{% set ns.text = message['content'] %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set ns.text = ns.text + '<image> ' %}"
    "{% else %}{% set ns.text = ns.text + part['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ns.text + ' ' + eos_token + ' ' }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<user> ' + ns.text + ' ' }}"
    "{% else %}"
    "{{ raise_exception('roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class TrainingScenes:
    """Scenes as the model reads them in training, padded on the right."""

    ids: Int[np.ndarray, "scenes length"]
    weights: Float[np.ndarray, "scenes length"]
    """The weight of each token as a target: only answers count."""
    images: UInt8[np.ndarray, "scenes side side 3"]


def build_vision_processor(world: VisionWorld) -> LlavaProcessor:
    """Return the processor of a world: every word one token, a picture 16 of them."""
    tokenizer = word_tokenizer(world.vocabulary, [ROLE_TOKENS["user"], IMAGE], CHAT_TEMPLATE)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[MEAN] * 3,
        image_std=[SPREAD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's own first token, which "default" drops again
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def training_scenes(scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast) -> TrainingScenes:
    """Return scenes as the model reads them: picture, question, answer."""
    vocabulary = tokenizer.get_vocab()
    rows, answers = [], []
    for scene in scenes:
        row = [vocabulary[BOS], vocabulary[ROLE_TOKENS["user"]], *[vocabulary[IMAGE]] * PATCHES]
        row += [vocabulary[word] for word in scene.question.split()]
        answers.append(len(row))
        rows.append([*row, *(vocabulary[word] for word in scene.answer.split()), vocabulary[EOS]])
    length = max(map(len, rows))
    ids = np.full((len(rows), length), tokenizer.pad_token_id, dtype=np.int64)
    weights = np.zeros((len(rows), length), dtype=np.float32)
    for n, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[n, : len(row)] = row
        weights[n, answer : len(row)] = 1.0
        weights[n, answer] = FIRST_ANSWER_WEIGHT
    return TrainingScenes(ids, weights, np.stack([scene.image for scene in scenes]))


def pixel_values(
    images: UInt8[np.ndarray, "batch side side 3"],
) -> Float[Tensor, "batch 3 side side"]:
    """Return pictures of the right size as the processor makes them."""
    scaled = (torch.from_numpy(images).float() / 255 - MEAN) / SPREAD
    return scaled.permute(0, 3, 1, 2).contiguous()


def new_vision_model(processor: LlavaProcessor, *, seed: int) -> LlavaForConditionalGeneration:
    """Return an untrained model for the vocabulary of a processor."""
    tokenizer: Any = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def train_vision_model(
    world: VisionWorld,
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a vision-language model on a world's pictures and save it with its processor.

    Args:
        world: Draws the pictures; pairs that it holds out are not among them.
        folder: Where the model goes: weights in bfloat16, config, processor, tokenizer.
        seed: Of the pictures and of the weights.
        steps: Batches of 32 pictures.
        on_step: Called with the number of steps done and the loss.

    Returns:
        The loss of each step, in nats a token of the answers, first words counted 8 times.
    """
    processor = build_vision_processor(world)
    scenes = world.scenes(steps * BATCH, seed=seed, balanced=False)
    data = training_scenes(scenes, processor.tokenizer)
    model = new_vision_model(processor, seed=seed)

    def loss_of(step: int) -> Float[Tensor, ""]:
        rows = slice(step * BATCH, (step + 1) * BATCH)
        ids, weights = torch.from_numpy(data.ids[rows]), torch.from_numpy(data.weights[rows])
        pixels = pixel_values(data.images[rows])
        return weighted_loss(model, ids, weights, pixel_values=pixels)

    losses = teach(
        model,
        steps,
        loss_of,
        lambda step: PEAK_RATE * schedule(step, steps),
        "vision-language model",
        on_step,
    )
    save_vision_model(model, processor, folder)
    return losses


def save_vision_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Save a model's weights in bfloat16, its config and its processor.

    The config says float32, so that `dtype="auto"` computes in float32 on any machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.bfloat16()
    model.save_pretrained(folder)
    parts: list[Any] = [model.config, model.config.text_config, model.config.vision_config]
    for config in parts:
        config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the shipped weights, or those of another world."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=VISION_MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = VisionWorld(options.seed)
    train_vision_model(world, options.out, seed=options.seed, steps=options.steps)


if __name__ == "__main__":
    main()
