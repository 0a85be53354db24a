"""A stand-in for a language model whose steering effects are known exactly.

Whatever vector x a text was written under, reading that text again gives activations h₀ + x G at
each of its tokens. With an SAE of linear latents (biases keep them above 0) the effects of x are
x G W_enc: the true effect matrix, up to the length at which x was added.
"""

from contextlib import contextmanager

import numpy as np
import torch

from saefty.models.base import ModelAdapter, Positions, TokenBatch, TokenizedExample
from saefty.models.batching import pad_together
from saefty.models.checkpoint import ModelInfo
from saefty.records import ROLES, Example, Site
from saefty.saes.base import SaeConfig

USER, RESPONSE = ROLES.index("user"), ROLES.index("response")
TOKENS = 3


class LinearModel(ModelAdapter):
    """The model; `map` is G.

    Args:
        map: [d_model, d_model].
    """

    def __init__(self, map):
        self.map, self.dtype, self.device = map, torch.float32, torch.device("cpu")
        self.info = ModelInfo("linear", None, "linear", "Linear", 2, len(map), 64, 1000)
        self.provenance = {"kind": "linear"}
        self._edits, self._written = [], []

    @staticmethod
    def claims(config):
        return False

    @classmethod
    def load(cls, section, info):
        raise NotImplementedError

    def tokenize(self, examples, *, truncate="never"):
        return [self._item(example) for example in examples]

    def _item(self, example):
        n = TOKENS if example.response else 0
        ids = np.zeros(1 + n, dtype=np.int32)
        if example.response:
            ids[1:] = int(example.response.removeprefix("w"))
        return TokenizedExample(
            example, example.prompt, ids, np.zeros((1 + n, 2), dtype=np.int32),
            np.array([USER] + [RESPONSE] * n, dtype=np.int8), np.zeros(1 + n, dtype=bool),
            1 if n else None, False, False, "ok",
        )  # fmt: skip

    def collate(self, items, side="right") -> TokenBatch:
        return pad_together(items, 0, side, self.device)

    def capture(self, batch, sites, rows=None):
        assert not self._edits, "texts are read without steering"
        base = torch.linspace(-1, 1, len(self.map))
        written = torch.stack([torch.zeros(len(self.map)), *self._written])
        # Token 0 stands for the prompt; text n was written under vector n - 1.
        x = base + written[batch.ids] @ self.map
        return {sites[0]: x[rows]}

    def logits(self, batch):
        raise NotImplementedError

    def loss(self, batch):
        """A loss of ½‖x‖² per token: the rise is known for every length."""
        zeros = torch.zeros(*batch.ids.shape, len(self.map))
        mask = batch.mask
        positions = Positions(mask, batch.position_ids, ~mask, ~mask & mask, is_prefill=True)
        for _, edit in self._edits:
            zeros = edit(zeros, positions)
        return 1.0 + 0.5 * zeros.square().sum(dim=-1)[:, 1:]

    @contextmanager
    def intervene(self, site, edit):
        self._edits.append((site, edit))
        try:
            yield
        finally:
            self._edits.pop()

    def generate(
        self, examples, *, max_new_tokens, seed=0, temperature=0.0, batch_size=32, cache=True
    ):
        mask = torch.ones(len(examples), 1, dtype=torch.bool)
        positions = Positions(mask, mask.long() * 0, ~mask, ~mask, is_prefill=True)
        x = torch.zeros(len(examples), 1, len(self.map))
        for _, edit in self._edits:
            x = edit(x, positions)
        first = len(self._written) + 1
        self._written += list(x[:, 0])
        return [f"w{first + n}" for n in range(len(examples))]


def linear_sae(weights):
    """Return an SAE whose latents are 50 + h W, above 0 for the activations met here."""
    d_in, d_sae = weights.shape
    sae = SaeConfig(arch="relu", d_in=d_in, d_sae=d_sae, k=0).build()
    with torch.no_grad():
        sae.W_enc.copy_(weights)
        sae.b_enc.fill_(50.0)
        sae.W_dec.copy_(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(3)))
    sae.site = Site(0)
    return sae


PROMPTS = [Example(f"p{n}", "stub") for n in range(3)]
