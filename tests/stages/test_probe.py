"""probe on planted features: latent 0 tracks harm; what a person may get wrong is said."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from saefty import fsio, functions, probe_command
from saefty.config import load_config
from saefty.errors import ConfigError, InputError, MismatchError, NumericError
from saefty.evaluation_inputs import recorded_reading
from saefty.guards.scoring import load_guard
from saefty.runs import FINISHED, METADATA
from saefty.stages.base import Outcome
from saefty.stages.probe import ProbeConfig, run
from saefty.stores.base import EXAMPLES
from stages.test_eval import D_SAE, TRUTH, N, planted
from stores import planted_store

ALONE = ("probe.baselines=false", "probe.one_vs_rest=false", "probe.leave_one_source_out=false",
         "probe.boots=100", "probe.permutations=100", "probe.poolings=[mean]")  # fmt: skip
FAST = (*ALONE, "probe.k=1")
WHOLE = ("probe.one_vs_rest=true", "probe.leave_one_source_out=true", "probe.poolings=[max,mean]")
WORDS = "probe.save_detector=bag of words"


def probed(tmp_path, *words):
    given = (f"probe.features={tmp_path / 'f'}", f"run.dir={tmp_path / 'r'}", *FAST, *words)
    return run(load_config(ProbeConfig, None, given))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def probe_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    named = {"change": lambda i: {"source": "ab"[i // 2 % 2], "category": f"c{i // 4 % 2}"}}
    planted(folder / "f", TRUTH, **named)
    return folder, probed(folder, *WHOLE, f"probe.save={folder / 'guard'}", WORDS)


def test_the_planted_latent_is_found_by_one_latent_and_suffices(probe_run):
    figures = probe_run[1].figures
    areas = {one["detector"]: one["auroc"]["estimate"] for one in figures["detectors"]["all"]}
    assert areas["1 latent"] > 0.8
    assert "1 latent of 12 suffices" in figures["sentence"]
    assert "not compared with a dense probe" in figures["sentence"]


def test_summary_json_holds_the_figures_and_no_nan(probe_run):
    folder, outcome = probe_run

    def refuse(word):
        raise AssertionError(word)

    text = (folder / "r" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == outcome.figures


def test_the_report_begins_with_the_sentence_and_its_pictures_exist(probe_run):
    folder, outcome = probe_run
    text = (folder / "r" / "summary.md").read_text()
    assert text.split("\n\n")[1] == outcome.figures["sentence"]
    for name in ("detectors", "reliability", "by_source", "by_category"):
        assert f"figures/{name}.png" in text
        assert (folder / "r" / "figures" / f"{name}.png").stat().st_size > 5000


def test_the_scores_of_every_test_example_give_the_reported_auroc(probe_run):
    from sklearn.metrics import roc_auc_score

    folder, outcome = probe_run
    rows = table(folder / "r" / "scores.csv")
    assert len(rows) == outcome.figures["test_examples"]
    y = [row["harmful"] == "true" for row in rows]
    for one in outcome.figures["detectors"]["all"]:
        area = roc_auc_score(y, [float(row[one["detector"]]) for row in rows])
        assert area == pytest.approx(one["auroc"]["estimate"], abs=1e-9)


def test_every_pooling_stands_in_the_table_and_one_of_each_kind_is_chosen(probe_run):
    rows = table(probe_run[0] / "r" / "detectors.csv")
    latents = [row for row in rows if row["detector"] == "SAE latents"]
    assert {row["pooling"] for row in latents} == {"max", "mean"}
    (chosen,) = [row for row in latents if row["chosen"] == "true"]
    least = min(latents, key=lambda row: float(row["fold_log_loss"]))
    assert chosen["pooling"] == least["pooling"]


def test_sources_and_categories_have_their_tables(probe_run):
    sources = {row["source"] for row in table(probe_run[0] / "r" / "by_source.csv")}
    assert sources == {"a", "b", "mean of 2"}
    categories = {row["category"] for row in table(probe_run[0] / "r" / "by_category.csv")}
    assert categories == {"c0"}  # c1 is the rest of it
    assert outcome_left_out(probe_run) == ["c1"]


def outcome_left_out(probe_run):
    return [one["category"] for one in probe_run[1].figures["categories_left_out"]]


def test_the_saved_guard_gives_texts_the_probabilities_of_the_report(probe_run):
    folder, outcome = probe_run
    assert outcome.figures["saved"] == "bag of words"
    rows = table(folder / "r" / "scores.csv")
    prompts = {
        record["example_id"]: record["prompt"]
        for record in map(json.loads, (folder / "f" / EXAMPLES).read_text().splitlines())
    }
    scores = load_guard(folder / "guard").score([prompts[row["example_id"]] for row in rows])
    np.testing.assert_allclose(scores, [float(row["bag of words"]) for row in rows], atol=1e-12)


def test_a_complete_comparison_is_not_done_again(probe_run):
    folder, outcome = probe_run
    before = (folder / "r" / "summary.md").stat().st_mtime_ns
    words = (*WHOLE, f"probe.save={folder / 'guard'}", WORDS)
    assert probed(folder, *words).figures == outcome.figures
    assert (folder / "r" / "summary.md").stat().st_mtime_ns == before


def test_a_guard_can_be_saved_from_a_complete_comparison(probe_run, tmp_path, caplog):
    folder = probe_run[0]
    before = (folder / "r" / "summary.md").stat().st_mtime_ns
    words = (*WHOLE, f"probe.save={tmp_path / 'late'}", WORDS)
    found = probed(folder, *words)
    assert found.figures["saved"] == "bag of words"
    assert (folder / "r" / "summary.md").stat().st_mtime_ns == before
    text = "the thief took the money"
    late, early = (load_guard(one).score([text]) for one in (tmp_path / "late", folder / "guard"))
    np.testing.assert_allclose(late, early, atol=1e-12)
    with caplog.at_level("INFO"):
        probed(folder, *words)
    assert "the guard of bag of words is in" in caplog.text


def test_the_guard_of_another_detector_is_not_taken_for_the_one_asked_for(probe_run):
    words = (*WHOLE, f"probe.save={probe_run[0] / 'guard'}", "probe.save_detector=SAE latents")
    with pytest.raises(ConfigError, match="holds the guard of bag of words already, not of SAE"):
        probed(probe_run[0], *words)


def test_a_detector_that_comes_out_otherwise_than_measured_is_not_saved(probe_run, tmp_path):
    run_made = probe_run[0] / "r"
    copy = tmp_path / "r"
    shutil.copytree(run_made, copy)
    shutil.copytree(probe_run[0] / "f", tmp_path / "f")
    path = copy / "detectors.csv"
    rows = path.read_text().splitlines()
    rows = [
        row.replace("true", "true").replace(row.split(",")[10], "0.001", 1)
        if row.startswith("all,bag of words")
        else row
        for row in rows
    ]
    path.write_text("\n".join(rows) + "\n")
    words = (f"probe.save={tmp_path / 'g'}", "probe.save_detector=bag of words",
             f"probe.features={probe_run[0] / 'f'}", f"run.dir={copy}", *FAST, *WHOLE)  # fmt: skip
    with pytest.raises(MismatchError, match="bag of words, fitted again, is not what"):
        run(load_config(ProbeConfig, None, words))
    assert not (tmp_path / "g").exists()


def test_a_guard_in_the_runs_own_folder_is_refused_before_anything_is_written(store):
    with pytest.raises(ConfigError, match="probe.save and run.dir are the same folder"):
        probed(store, f"probe.save={store / 'r'}")
    assert not (store / "r").exists()


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("saefty.stages.probe.open_model", refuse)
    planted(tmp_path / "f", [True] * N)
    words = (f"probe.features={tmp_path / 'f'}", f"run.dir={tmp_path / 'r'}", "model.name=m")
    with pytest.raises(InputError, match="all 200 labelled examples are harmful"):
        run(load_config(ProbeConfig, None, words))
    assert not (tmp_path / "r").exists()


def test_a_test_share_that_is_too_small_is_named(store):
    with pytest.raises(InputError, match="parts need at least 2 each") as error:
        probed(store, "probe.test_share=0.001")
    assert "Set probe.test_share to a larger share" in str(error.value)


def test_the_function_takes_a_folder_for_a_store(store):
    with pytest.raises(InputError, match="parts need at least 2 each"):
        functions.probe(store / "f", store / "r", baselines=False, test_share=0.001)


def test_nearly_balanced_examples_get_no_balanced_subset(tmp_path):
    planted(tmp_path / "f", [i % 2 == 0 or i == 1 for i in range(N)])
    figures = probed(tmp_path).figures
    assert set(figures["detectors"]) == {"all"}
    assert "(nearly) balanced already" in (tmp_path / "r" / "summary.md").read_text()


def test_other_settings_in_the_same_folder_are_refused(probe_run):
    with pytest.raises(MismatchError, match="seed"):
        probed(probe_run[0], *WHOLE, "probe.seed=5")


@pytest.fixture
def store(tmp_path):
    planted(tmp_path / "f", TRUTH)
    return tmp_path


def test_labels_all_alike_are_refused(tmp_path):
    planted(tmp_path / "f", [True] * N)
    with pytest.raises(InputError, match="all 200 labelled examples are harmful; a detector needs"):
        probed(tmp_path)


def test_missing_labels_are_refused_or_left_out(tmp_path):
    planted(tmp_path / "f", [*TRUTH[:-10], *[None] * 10])
    with pytest.raises(InputError, match="10 of 200 examples have no label") as error:
        probed(tmp_path)
    assert "probe.drop_missing_labels=true" in str(error.value)


def test_too_few_groups_of_a_label_are_refused(tmp_path):
    planted(tmp_path / "f", [i < 4 for i in range(N)])
    with pytest.raises(InputError, match="4 independent groups with harmful examples"):
        probed(tmp_path)


def test_more_latents_than_there_are_are_refused(store):
    with pytest.raises(ConfigError, match=f"64 latents, but the SAE of layer 1 has {D_SAE}"):
        probed(store, "probe.k=64")


def test_without_a_choice_only_possible_numbers_of_latents_are_taken(store):
    words = (f"probe.features={store / 'f'}", f"run.dir={store / 'r'}", *ALONE,
             "probe.leave_one_source_out=true")  # fmt: skip
    figures = run(load_config(ProbeConfig, None, words)).figures
    names = {one["detector"] for one in figures["detectors"]["all"]}
    assert names == {"SAE latents", "1 latent", "2 latents", "5 latents", "bag of words"}
    assert "All examples come from one source" in figures["sentence"]
    assert "Set data.source" in (store / "r" / "summary.md").read_text()


def test_a_layer_that_is_not_there_is_refused(store):
    with pytest.raises(MismatchError, match=r"holds layers \[1\], not 7"):
        probed(store, "probe.layers=7")


def test_activations_of_other_examples_are_refused(store):
    planted_store.make(store / "x", layers=(1,))
    with pytest.raises(MismatchError, match="features hold .* the activations"):
        probed(store, f"probe.store={store / 'x'}")


def test_latents_that_are_not_numbers_are_refused(store, monkeypatch):
    from saefty.stores.features import FeatureStore

    pooled = FeatureStore.pooled

    def broken(self, *args):
        z = pooled(self, *args)
        z.data[3] = np.nan
        return z

    monkeypatch.setattr(FeatureStore, "pooled", broken)
    with pytest.raises(NumericError, match="1 of .* pooled latents are NaN"):
        probed(store)


def test_a_detector_that_is_not_there_is_refused_before_any_is_fitted(store, monkeypatch):
    monkeypatch.setattr("saefty.detection.job.compare", None)
    for name, why in (("best one", "there is no detector 'best one'"), ("random SAE", "a control")):
        words = (f"probe.save={store / 'g'}", f"probe.save_detector={name}")
        with pytest.raises(ConfigError, match=why):
            probed(store, *words)


def test_features_whose_activations_are_gone_are_not_read_again_in_another_way(tmp_path):
    for name in ("f", "x"):
        planted(tmp_path / name, TRUTH)
    said = {
        "f": {"encode": {"store": str(tmp_path / "x")}},
        "x": {"extract": {"tokens": "prompt_end"}},
    }
    for name, config in said.items():
        facts = {"stage": "", "status": "complete", "config": config, "inputs": {}}
        fsio.commit_sealed(tmp_path / name / METADATA, facts)
        fsio.commit_sealed(tmp_path / name / FINISHED, {})
    assert recorded_reading(tmp_path / "f").tokens == "prompt_end"
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(ConfigError, match=f"activations in {tmp_path / 'x'}, where there is no"):
        recorded_reading(tmp_path / "f")
    with pytest.raises(ConfigError, match="where there is no"):
        probed(tmp_path, "probe.baselines=true", "model.name=m")
    assert not (tmp_path / "r").exists()
    assert probed(tmp_path).figures["detectors"]["all"]  # what runs no model needs no reading


@pytest.mark.parametrize("name", ["g #1", "[g]", "null", "2024-01-31", "~", "a: b", "🐺 'x'"])
def test_the_folder_of_the_flag_is_taken_as_it_is_written(name, monkeypatch):
    given = []

    def noting(cfg):
        given.append(cfg)
        return Outcome("probe", Path("r"), {"sentence": ""})

    monkeypatch.setattr("saefty.stages.probe.run", noting)
    probe_command.probe(["probe.features=f", "probe.save_detector=words"], Path(name))
    assert given[0].probe.save == Path(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("probe.features=f", "probe.sae=s"), "set either probe.features"),
        (("probe.sae=s",), "set either probe.features"),
        (("probe.store=x",), "set either probe.features"),
        (("probe.features=f", "probe.save_detector=words"), "needs probe.save"),
        (("probe.features=f", "probe.poolings=[]"), "names no pooling"),
        (("probe.features=f", "probe.test_share=1"), "test_share"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ProbeConfig, None, words)


def test_an_unbalanced_training_side_has_a_balanced_subset_beside_it(tmp_path):
    planted(tmp_path / "f", [i % 2 == 0 and i % 3 > 0 for i in range(N)])
    figures = probed(tmp_path).figures
    assert set(figures["detectors"]) == {"all", "balanced"}
    assert "balanced subset of" in figures["sentence"]
