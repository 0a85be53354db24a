"""eval on planted features: latent 0 tracks harm, the others do not."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from saefty import fsio
from saefty.config import load_config
from saefty.errors import ConfigError, InputError
from saefty.stages.eval import EvalConfig, run
from saefty.stores.activations import ROW_COLUMNS
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import KIND, FeatureStore, commit_features
from saefty.stores.index import build_index

N, D_SAE, TOKENS = 200, 12, 3
WORDS = ("intervention.enabled=false", "eval.baselines=false", "eval.permutations=1000")


def planted(folder, labels, seed=0, change=lambda i: {}):
    """Write features in which latent 0 fires on harmful examples with probability 0.9, else 0.1."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(N) % 2 == 0
    z = rng.random((N * TOKENS, D_SAE)) * (rng.random((N * TOKENS, D_SAE)) < 0.3)
    fires = rng.random(N) < np.where(harmful, 0.9, 0.1)
    z[:, 0] = np.repeat(fires * rng.uniform(1, 2, N), TOKENS)
    order = [np.argsort(-row, kind="stable")[: (row > 0).sum()] for row in z]
    code = {
        "indptr": np.concatenate([[0], np.cumsum([len(ids) for ids in order])]),
        "ids": np.concatenate(order),
        "values": np.concatenate([row[ids] for row, ids in zip(z, order, strict=True)]),
    }
    rows = {name: np.zeros(N * TOKENS, kind) for name, kind in ROW_COLUMNS.items()}
    rows["example"] = np.repeat(np.arange(N), TOKENS)
    writer = StoreWriter(folder, KIND, f"planted {seed}")
    record = commit_features(writer, 0, {1: code}, rows, {"masked": {}})
    records = [
        {
            "example_id": f"e{i}", "prompt": f"text {rng.integers(10**6)}", "response": None,
            "messages": None, "image": None, "label": labels[i],
            "group": None, "source": "planted", "raw": True, "status": "ok",
            "text": f"text {rng.integers(10**6)}", **change(i),
        }
        for i in range(N)
    ]  # fmt: skip
    fsio.commit_text(folder / EXAMPLES, "".join(map(fsio.dump_json_line, records)))
    index = build_index(folder, 1, 1, D_SAE)
    facts = {
        "layers": [1],
        "sites": {"1": "blocks.1.hook_resid_post"},
        "d_sae": {"1": D_SAE},
        "saes": {"1": None},
    }
    writer.finish([record], facts, [EXAMPLES, index])
    return harmful


def evaluate(tmp_path, *words):
    given = (f"eval.features={tmp_path / 'f'}", f"run.dir={tmp_path / 'r'}", *WORDS, *words)
    return run(load_config(EvalConfig, None, given))


TRUTH = [i % 2 == 0 for i in range(N)]


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    planted(folder / "f", TRUTH)
    return folder, evaluate(folder)


def test_the_planted_latent_is_the_finding_and_the_only_one(planted_run):
    latents = planted_run[1].figures["layers"]["1"]["latents"]
    assert [one["latent"] for one in latents if one["found"]] == [0]


def test_the_reported_auroc_equals_scikit_learns_on_the_report_half(planted_run):
    folder, outcome = planted_run
    figures = outcome.figures["layers"]["1"]
    pooled = FeatureStore(folder / "f").pooled(1, "max").toarray()
    from saefty.evaluation import evaluate_latents

    report = evaluate_latents(pooled, np.array(TRUTH), permutations=100).report
    expected = roc_auc_score(np.array(TRUTH)[report], pooled[report, 0])
    found = next(one for one in figures["latents"] if one["latent"] == 0)
    assert found["auroc"]["estimate"] == pytest.approx(expected, abs=1e-12)


def test_the_summary_says_in_its_first_paragraph_what_was_found(planted_run):
    text = (planted_run[0] / "r" / "summary.md").read_text()
    lead = text.split("\n\n")[1]
    assert "1 of the" in lead
    assert "latent 0" in lead
    assert "What does not follow" in lead


def test_summary_json_holds_the_figures_and_no_nan(planted_run):
    folder, outcome = planted_run

    def refuse(word):
        raise AssertionError(word)

    text = (folder / "r" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == outcome.figures


def test_the_csv_has_every_firing_latent_once(planted_run):
    import csv

    with open(planted_run[0] / "r" / "layer_1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["latent"]) for row in rows) == list(range(D_SAE))


def test_a_complete_evaluation_is_not_done_again(planted_run):
    folder, outcome = planted_run
    before = (folder / "r" / "summary.md").stat().st_mtime_ns
    assert evaluate(folder).figures == outcome.figures
    assert (folder / "r" / "summary.md").stat().st_mtime_ns == before


def test_missing_labels_are_counted_and_refused_unless_dropped(tmp_path):
    planted(tmp_path / "f", [None if i < 7 else label for i, label in enumerate(TRUTH)])
    with pytest.raises(InputError, match="7 of 200 examples have no label") as error:
        evaluate(tmp_path)
    assert "eval.drop_missing_labels=true" in str(error.value)
    outcome = evaluate(tmp_path, "eval.drop_missing_labels=true", f"run.dir={tmp_path / 'r2'}")
    assert outcome.figures["examples"] == 193
    ledger = fsio.read_sealed(tmp_path / "r2" / "finished.json")["ledger"]
    assert ledger["skipped"] == {"no_label": 7}
    assert ledger["in"] == 200


@pytest.mark.parametrize(("label", "word"), [(True, "harmful"), (False, "harmless")])
def test_labels_of_one_class_are_refused(tmp_path, label, word):
    planted(tmp_path / "f", [label] * N)
    with pytest.raises(InputError, match=f"all 200 labelled examples are {word}"):
        evaluate(tmp_path)


def test_an_intervention_without_a_model_says_what_to_set(tmp_path):
    planted(tmp_path / "f", TRUTH)
    with pytest.raises(ConfigError, match="does not say which model") as error:
        evaluate(tmp_path, "intervention.enabled=true")
    assert "intervention.enabled=false" in str(error.value)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("intervention.judge=refusl", "refusal"),
        ("intervention.fluency=perplexty", "perplexity"),
        ("eval.ranked_by=consensu", "consensus"),
    ],
)
def test_a_misspelt_name_is_refused_before_any_work(tmp_path, word, nearest):
    planted(tmp_path / "f", TRUTH)
    with pytest.raises(ConfigError, match=f"Did you mean '{nearest}'"):
        evaluate(tmp_path, "intervention.enabled=true", word)
    assert not (tmp_path / "r").exists()


def test_neither_or_both_sources_are_refused():
    for words in ([], ["eval.features=a", "eval.sae=b", "eval.store=c"], ["eval.sae=b"]):
        with pytest.raises(ConfigError, match="set either eval.features, or eval.sae and"):
            load_config(EvalConfig, None, words)
