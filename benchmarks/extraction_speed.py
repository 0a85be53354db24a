"""Activations of two blocks of a random Llama: saefty's whole path beside plainer ways to get them.

Usage: python benchmarks/extraction_speed.py [--rounds 3] [--prompts 256] [--write] [--tiny]

The model is 512 wide with 8 blocks of 8 heads, 8,192 tokens, float32; the prompts have 8 to 256
tokens, log-normal with a mean of 82. All ways alternate in one process and end with arrays of the
same rows: the residual stream behind blocks 3 and 5, for each token, in the order of the prompts.
Exits with 1 if one of them differs from reading the prompts one by one by more than 1e-5 of the
largest activation; what bfloat16 gives is shown, and not judged.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional

import page
from measure import take_turns
from saefty.models.base import load_model
from saefty.models.batching import plan_batches
from saefty.pieces import PieceReader, PieceTask
from saefty.reading import prepare
from saefty.records import Example, Site
from saefty.runs import RunSection
from saefty.stages import extract
from saefty.stores.activations import ActivationStore

BLOCKS, BUDGET, PADDED = (3, 5), 1024, 8
IN_BFLOAT16 = ", bfloat16"
QUIET = 0.85
SIZES = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "intermediate_size": 1376, "max_position_embeddings": 512,
}  # fmt: skip
SMALL = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
COLUMNS = {
    "way": "way",
    "median": "tokens/s, median",
    "best": "tokens/s, best",
    "ratio": "× one by one",
    "gap": "largest difference",
}


def make_model(folder: Path, tiny: bool) -> Path:
    """Write a random Llama and a tokenizer whose tokens are the words w0, w1, …"""
    sizes = {**SIZES, **(SMALL if tiny else {})}
    names = ["<end>", *(f"w{i}" for i in range(sizes["vocab_size"] - 1))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_prompts(number: int, vocabulary: int) -> list[Example]:
    """Return prompts of 8 to 256 words, log-normal: median 64, mean 82."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(64), 0.704, number), 8, 256).astype(int)
    words = [rng.integers(0, vocabulary - 1, length) for length in lengths]
    texts = [" ".join(f"w{i}" for i in chosen) for chosen in words]
    return [Example(str(i), text, raw=True) for i, text in enumerate(texts)]


class Silent:
    """Hears how a piece advances."""

    def begin(self, step) -> None:
        pass

    def advance(self, amount) -> None:
        pass


class Ways:
    """The ways to the same rows; each returns one array a block."""

    def __init__(
        self, folder: Path, examples: list[Example], root: Path, dtype: str = "float32"
    ) -> None:
        self.adapter = load_model(str(folder), dtype=dtype, device="cpu")
        self.model, self.tokenizer = self.adapter.model, self.adapter.tokenizer
        self.folder, self.examples, self.root, self.dtype = folder, examples, root, dtype
        self.runs = 0

    def config(self) -> extract.ExtractConfig:
        self.runs += 1
        return extract.ExtractConfig(
            model={"name": str(self.folder), "dtype": self.dtype, "device": "cpu"},
            extract={"layers": BLOCKS},
            run=RunSection(dir=str(self.root / f"{self.dtype}{self.runs}")),
        )

    def saefty(self) -> list[np.ndarray]:
        """`saefty extract` but for loading the model: tokenise, plan, read, write, commit."""
        outcome = extract.run(self.config(), model=self.adapter, examples=self.examples)
        store = ActivationStore.open(outcome.folder)
        shards = range(len(store.pieces))
        return [torch.cat([store.shard(b, i) for i in shards]).float().numpy() for b in BLOCKS]

    def saefty_unwritten(self) -> list[np.ndarray]:
        """The same without a store."""
        section, sites = self.config().extract, [Site(block) for block in BLOCKS]
        reading = prepare(self.adapter, self.examples, section, len(sites))
        reader, found = PieceReader(self.adapter, sites, section), []
        for index, batches in enumerate(reading.plan.pieces):
            items = reading.items([i for batch in batches for i in batch])
            piece = reader.read(PieceTask(index, batches, batches, items), Silent())
            found.append([piece.activations[site].numpy() for site in sites])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    @torch.no_grad()
    def bare(self) -> list[np.ndarray]:
        """Six blocks in plain torch over the same sorted batches: what all else is measured by."""
        encoded = self.tokenizer([example.prompt for example in self.examples])["input_ids"]
        lengths = [len(ids) for ids in encoded]
        found: list[list] = [[None] * len(encoded) for _ in BLOCKS]
        for batch in plan_batches(lengths, BUDGET):
            ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : lengths[i]] = torch.tensor(encoded[i])
            for part, x in zip(found, plain_llama(self.model.model, ids), strict=True):
                for row, i in enumerate(batch):
                    part[i] = x[row, : lengths[i]].numpy()
        return [np.concatenate(part) for part in found]

    @torch.no_grad()
    def one_by_one(self) -> list[np.ndarray]:
        """One prompt at a time with output_hidden_states, as one would first write it."""
        found = []
        for example in self.examples:
            inputs = self.tokenizer(example.prompt, return_tensors="pt")
            states = self.model(**inputs, output_hidden_states=True).hidden_states
            found.append([states[block + 1][0].float().numpy() for block in BLOCKS])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    @torch.no_grad()
    def padded(self) -> list[np.ndarray]:
        """Eight prompts at a time in order, padded, with hooks."""
        found: list[list[np.ndarray]] = [[] for _ in BLOCKS]
        seen: dict[int, torch.Tensor] = {}
        handles = [
            self.model.model.layers[block].register_forward_hook(
                lambda module, inputs, out, block=block: seen.update({block: out})
            )
            for block in BLOCKS
        ]
        for start in range(0, len(self.examples), PADDED):
            texts = [example.prompt for example in self.examples[start : start + PADDED]]
            inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
            self.model(**inputs)
            for part, block in zip(found, BLOCKS, strict=True):
                part.append(seen[block][inputs["attention_mask"].bool()].numpy())
        for handle in handles:
            handle.remove()
        return [np.concatenate(part) for part in found]


def plain_llama(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the residual stream behind BLOCKS; padding on the right needs no mask of its own."""
    x, heads = model.embed_tokens(ids), model.config.num_attention_heads
    places = torch.arange(ids.shape[1])[None]
    cos, sin = (part[:, None] for part in model.rotary_emb(x, places))
    found = []
    for block in model.layers[: max(BLOCKS) + 1]:
        read = normalised(x, block.input_layernorm)
        attention = block.self_attn
        q, k, v = (
            functional.linear(read, part.weight).view(*ids.shape, heads, -1).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (part * cos + turned(part) * sin for part in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.linear(mixed.transpose(1, 2).flatten(2), attention.o_proj.weight)
        read, mlp = normalised(x, block.post_attention_layernorm), block.mlp
        gate = functional.silu(functional.linear(read, mlp.gate_proj.weight))
        gate *= functional.linear(read, mlp.up_proj.weight)
        x = x + functional.linear(gate, mlp.down_proj.weight)
        found.append(x)
    return [found[block] for block in BLOCKS]


def normalised(x: torch.Tensor, norm) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def compare(ways: Ways, half: Ways, rounds: int, quiet: float) -> tuple[list[dict], float]:
    """Return one row of text for each way, and the best rate of the product beside them."""
    named = {
        "saefty extract, written to disk": ways.saefty,
        f"saefty extract{IN_BFLOAT16}, written to disk": half.saefty,
        "saefty, not written": ways.saefty_unwritten,
        "bare truncated forward, sorted batches": ways.bare,
        "eight at a time in order, hooks": ways.padded,
        "one by one, output_hidden_states": ways.one_by_one,
        f"one by one, output_hidden_states{IN_BFLOAT16}": half.one_by_one,
    }
    true = ways.one_by_one()
    scale = max(float(np.abs(x).max()) for x in true)
    gaps = {
        name: max(float(np.abs(a - b).max()) for a, b in zip(way(), true, strict=True)) / scale
        for name, way in named.items()
    }
    kept, best = take_turns(named, rounds, quiet)
    return page.rates(kept, len(true[0]), "one by one, output_hidden_states", gaps), best


def main() -> int:
    """Measure, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="Small sizes, to try the script.")
    parser.add_argument("--write", action="store_true", help="Update docs/performance.md.")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", given.tiny)
        vocabulary = SMALL["vocab_size"] if given.tiny else SIZES["vocab_size"]
        examples = make_prompts(given.prompts, vocabulary)
        ways = Ways(model, examples, Path(folder))
        half = Ways(model, examples, Path(folder), "bfloat16")
        rows, best = compare(ways, half, given.rounds, 0.0 if given.tiny else QUIET)
    print(page.table(COLUMNS, rows))
    if given.write:
        note = f" The best 2048 × 2048 product in float32 ran at {best:.0f} GFLOP/s."
        options = f"--rounds {given.rounds} --prompts {given.prompts}"
        command = f"python benchmarks/extraction_speed.py {options} --write"
        page.put("extraction", command, COLUMNS, rows, note)
    return int(any(float(row["gap"]) > 1e-5 for row in rows if IN_BFLOAT16 not in row["way"]))


if __name__ == "__main__":
    sys.exit(main())
