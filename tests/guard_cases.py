"""Guards of every kind, fitted by scikit-learn on what the model computes by itself.

The rows they are fitted on are made the naive way: transformers' own forward pass over one text at
a time, hidden states in float64, pooled in NumPy. No code of the guards is in it.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import tiny_models
from saefty import fsio
from saefty.guards.files import save_guard
from saefty.guards.spec import GuardFacts, GuardModel, GuardSpec
from saefty.linear import Linear
from saefty.metrics.intervals import Interval
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig, SparseAutoencoder
from saefty.words import bag_of_words

SITE, K, D_SAE = Site(1), 4, 64
POOLS = {"mean": np.mean, "max": np.max, "last": lambda rows, axis: rows[-1]}
KINDS = ("words", "dense", "latents")
TEXTS = tuple(
    f"{start} {thing}, {end}."
    for start in ("How do I bake", "Write a story about", "The quick brown fox hates")
    for thing in ("bread", "a robot", "the lazy dog", "water and yeast")
    for end in ("please", "now", "I cannot wait any longer for it")
)
HARMFUL = np.array(["robot" in text or "dog" in text for text in TEXTS])


@cache
def raw_model() -> tuple[object, object]:
    """Return transformers' model and tokenizer, as anyone would load them."""
    folder = tiny_models.folder_of("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@cache
def states(text: str) -> np.ndarray:
    """Return the hidden states behind block 1 at the tokens that are not special, one a row."""
    model, tokenizer = raw_model()
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    kept = [i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    return hidden[SITE.layer + 1][0, kept].double().numpy()


def make_sae(seed: int = 0) -> SparseAutoencoder:
    """Return a random top-k SAE that reads block 1."""
    torch.manual_seed(seed)
    sae = SaeConfig("topk", d_in=tiny_models.D_MODEL, d_sae=D_SAE, k=K).build()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    sae.site = SITE
    return sae.requires_grad_(False).eval()


def codes(text: str, sae: SparseAutoencoder) -> np.ndarray:
    """Return the latents of each token by hand: the k largest positive pre-activations."""
    weights = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    before = states(text) @ weights["W_enc"] + weights["b_enc"]
    least = np.sort(before, axis=1)[:, [-K]]
    return np.where((before >= least) & (before > 0), before, 0.0)


def naive_rows(kind: str, pooling: str, sae: SparseAutoencoder | None, texts=TEXTS) -> np.ndarray:
    """Return one row a text, dense, in float64."""
    pool = POOLS[pooling]
    return np.array(
        [pool(states(one) if kind == "dense" else codes(one, sae), axis=0) for one in texts]
    )


def fit(rows: np.ndarray, *, centred: bool) -> Linear:
    """Return scikit-learn's logistic regression on columns that vary, as a `Linear`."""
    spread = rows.std(axis=0)
    columns = np.flatnonzero(spread > 1e-9)
    center = rows.mean(axis=0)[columns] if centred else np.zeros(len(columns))
    scaled = (rows[:, columns] - center) / spread[columns]
    model = LogisticRegression(C=1.0, max_iter=2000).fit(scaled, HARMFUL)
    return Linear(
        columns, center, spread[columns], model.coef_[0], float(model.intercept_[0]), rows.shape[1]
    )


def facts(**changes: object) -> GuardFacts:
    """Return what is known of a guard that was fitted on the texts."""
    known = {
        "probe": "a probe of the tests",
        "examples": len(TEXTS),
        "harmful": int(HARMFUL.sum()),
        "tested": 40,
        "tested_harmful": 21,
        "auroc": Interval(0.91, 0.84, 0.97, "bootstrap over 40 clusters", 40),
        "recall_at_1pct_fpr": Interval(0.5, 0.3, 0.7, "bootstrap over 40 clusters", 40),
        "rates": {
            "default": {
                "recall": Interval(0.8, 0.6, 0.9, "Wilson over 21 examples", 21),
                "false_positive_rate": Interval(0.1, 0.05, 0.3, "Wilson over 19 examples", 19),
            }
        },
        "left_out_by": ("another probe",),
        "sources": {"forum": 50, "wiki": 26},
        "left_out": {"forum": Interval(0.7, 0.6, 0.8, "bootstrap over 50 clusters", 50)},
    }
    return GuardFacts(**{**known, **changes})


def spec_of(kind: str, pooling: str = "mean", **changes: object) -> GuardSpec:
    """Return the spec of a guard on bare texts."""
    if kind == "words":
        words = sorted({word for text in TEXTS for word in bag_of_words(text)})
        return GuardSpec("words", vocabulary=tuple(words), raw=True, **changes)
    return GuardSpec(
        kind,
        threshold_1pct=1.5,
        model=GuardModel.of(tiny_models.load("llama")),
        site=SITE,
        pooling=pooling,
        **{"raw": True, **changes},
    )


def examples_of(texts) -> list[Example]:
    """Return examples of running text."""
    return [Example(str(i), text, raw=True) for i, text in enumerate(texts)]


def make_guard(folder: Path, kind: str, pooling: str = "mean", **changes: object) -> Path:
    """Fit a guard and save it; return its folder."""
    sae = make_sae() if kind == "latents" else None
    spec = spec_of(kind, pooling, **changes)
    if kind == "words":
        counter = CountVectorizer(analyzer=bag_of_words, vocabulary=list(spec.vocabulary))
        rows = counter.transform(TEXTS).toarray().astype(float)
    else:
        rows = naive_rows(kind, pooling, sae)
    linear = fit(rows, centred=kind == "dense")
    return save_guard(folder, spec, linear, facts(), sae, examples_of(TEXTS))


def rewrite(folder, change) -> None:
    """Change a guard's record and seal it again, as a stranger could."""
    record = fsio.read_sealed(folder / "guard.json")
    change(record)
    fsio.commit_sealed(folder / "guard.json", record)
