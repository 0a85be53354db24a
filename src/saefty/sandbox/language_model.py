"""The sandbox's language model: how it is trained, and where the shipped weights lie.

A Llama of four blocks, 128 wide, that learns to continue a world's documents. It is saved as any
Hugging Face model is, in a folder with its tokenizer, and is loaded by that folder's path. The
shipped weights are rebuilt by `python -m saefty.sandbox.language_model --out FOLDER`.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saefty.sandbox.documents import Document
from saefty.sandbox.teaching import PEAK_RATE, schedule, teach, weighted_loss
from saefty.sandbox.tokenizer import BOS, EOS, ROLE_TOKENS, build_tokenizer
from saefty.sandbox.world import World

MODEL_FOLDER = Path(__file__).parent / "model"
REFERENCE = Path(__file__).parent / "reference.json"  # what was measured, on several worlds

STEPS = 2500
BATCH = 32
INITIAL_SCALE = 0.01
# In the last part of training, noise of up to NOISE_SIZE times its length is added to the state of
# some tokens. It keeps the model readable when something is taken out of a state: without it, the
# state that remains says nothing at all, not even that a reply begins.
NOISE_FROM = 0.6
NOISE_SIZE = 1.0
NOISE_SHARE = 0.6
NOISE_RATE = 1.2e-3
# The first word of an answer says whether it is a refusal; it is one word in twenty.
FIRST_ANSWER_WEIGHT = 8.0
PLAIN_SHARE = 0.2  # conversations shown without role tokens, so that plain text works too


@dataclass(frozen=True)
class TrainingText:
    """Token ids of documents, padded on the right, and the weight of each as a target."""

    ids: Int[np.ndarray, "documents length"]
    weights: Float[np.ndarray, "documents length"]


def training_text(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> TrainingText:
    """Return documents as the model reads them.

    Args:
        documents: What the world wrote.
        tokenizer: The tokenizer of the same world.
        seed: Chooses which conversations are shown without role tokens.
    """
    vocabulary = tokenizer.get_vocab()
    rng = np.random.default_rng([seed, 4])
    rows: list[list[int]] = []
    answers: list[int] = []
    for document in documents:
        with_roles = rng.random() >= PLAIN_SHARE
        row, answer = [vocabulary[BOS]], 0
        for turn in document.turns:
            if with_roles and turn.role in ROLE_TOKENS:
                row.append(vocabulary[ROLE_TOKENS[turn.role]])
            if turn.role == "assistant":
                answer = len(row)
            row += [vocabulary[word.text] for word in turn.words]
        rows.append([*row, vocabulary[EOS]])
        answers.append(answer)
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), tokenizer.pad_token_id, dtype=np.int64)
    weights = np.zeros((len(rows), length), dtype=np.float32)
    for n, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[n, : len(row)] = row
        weights[n, 1 : len(row)] = 1.0
        if answer:
            weights[n, answer] = FIRST_ANSWER_WEIGHT
    return TrainingText(ids, weights)


def batches(text: TrainingText, *, seed: int) -> list[Int[np.ndarray, "batch"]]:
    """Return the documents of each batch, of like length so that little is padding.

    Documents are sorted by length within windows of 16 batches, and the batches of a window then
    come in random order.
    """
    rng = np.random.default_rng([seed, 5])
    lengths = (text.weights > 0).sum(axis=1)
    window = 16 * BATCH
    found: list[Int[np.ndarray, "batch"]] = []
    for start in range(0, len(lengths), window):
        rows = start + np.argsort(lengths[start : start + window], kind="stable")
        pieces = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        found += [pieces[i] for i in rng.permutation(len(pieces))]
    return found


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Return an untrained model for the vocabulary of a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=128,
                initializer_range=INITIAL_SCALE,
                tie_word_embeddings=False,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def train_language_model(
    world: World,
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a language model on a world's documents and save it with its tokenizer.

    Args:
        world: Writes the training text; pairs that it holds out are not in it.
        folder: Where the model goes: weights in bfloat16, config, tokenizer.
        seed: Of the documents and of the weights.
        steps: Batches of 32 documents.
        on_step: Called with the number of steps done and the loss.

    Returns:
        The loss of each step, in nats a token, first answer words counted 8 times.
    """
    tokenizer = build_tokenizer(world)
    text = training_text(world.documents(steps * BATCH, seed=seed), tokenizer, seed=seed)
    model = new_model(tokenizer, seed=seed)
    order = batches(text, seed=seed)
    noise = _Noise(model, seed=seed)

    def loss_of(step: int) -> Float[Tensor, ""]:
        rows = order[step]
        longest = int((text.weights[rows] > 0).sum(axis=1).max()) + 1
        noise.active = step >= round(NOISE_FROM * steps)
        ids, weights = text.ids[rows, :longest], text.weights[rows, :longest]
        return weighted_loss(model, torch.from_numpy(ids), torch.from_numpy(weights))

    losses = teach(
        model, len(order), loss_of, lambda step: _rate(step, steps), "language model", on_step
    )
    noise.remove()
    save_model(model, tokenizer, folder)
    return losses


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model's weights in bfloat16, its config and its tokenizer.

    The config says float32, so that `dtype="auto"` computes in float32 on any machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.bfloat16()
    model.save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Noise:
    """Adds noise to the output of all blocks but the last, at some tokens, while active."""

    def __init__(self, model: LlamaForCausalLM, *, seed: int) -> None:
        self.active = False
        self._generator = torch.Generator().manual_seed(seed)
        self._handles = [
            block.register_forward_hook(self._add) for block in model.model.layers[:-1]
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _add(
        self, block: nn.Module, inputs: tuple[Tensor, ...], x: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        if not self.active:
            return x
        chance = torch.rand((2, *x.shape[:2], 1), generator=self._generator)
        size = NOISE_SIZE * chance[0] * (chance[1] < NOISE_SHARE)
        direction = torch.randn(x.shape, generator=self._generator)
        unit = direction / direction.norm(dim=-1, keepdim=True)
        return x + size * x.detach().norm(dim=-1, keepdim=True) * unit


def _rate(step: int, steps: int) -> float:
    """Return the learning rate: one rise and fall without noise, and a lower one with it."""
    quiet = round(NOISE_FROM * steps)
    if step < quiet:
        return PEAK_RATE * schedule(step, quiet)
    return NOISE_RATE * schedule(step - quiet, steps - quiet)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the shipped weights, or those of another world."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_language_model(World(options.seed), options.out, seed=options.seed, steps=options.steps)


if __name__ == "__main__":
    main()
