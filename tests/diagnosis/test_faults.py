"""A planted fault is named, a healthy SAE is left alone, and what cannot be told is not claimed."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import planted_faults
import saefty as sf
from saefty import cli, fsio
from saefty.config import build_config
from saefty.diagnosis.base import Rows
from saefty.diagnosis.causes import AS_IT_IS, READ, reading_trial
from saefty.diagnosis.readings import ModelReadings, outliers
from saefty.diagnosis.record import find_record
from saefty.diagnosis.verdict import judge, run_trials
from saefty.errors import ConfigError, MismatchError
from saefty.records import Site
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.stages.verify import VerifyConfig, check


def verified(sae, model=None, examples=None, **settings):
    given = {"verify": {"sae": str(sae), **settings}}
    if model is not None:
        given["model"] = {"name": str(model)}
    return check(build_config(VerifyConfig, given), examples=examples)


def saefty(*words):
    return CliRunner().invoke(cli.app, ["sae", "verify", *map(str, words)])


# benchmarks/verify_faults.py plants each of the ten both ways.
ON_OWN_TEXTS = (
    "norm factor missing", "layer - 1", "BOS missing", "BOS doubled", "input uncentred",
)  # fmt: skip


@pytest.mark.parametrize("fault", [f for f in planted_faults.FAULTS if f not in ON_OWN_TEXTS])
def test_a_planted_fault_is_named_on_texts_that_the_record_was_not_taken_on(
    fault, trained, other_texts, tmp_path
):
    sae, model = planted_faults.plant(fault, trained, tmp_path / "case")
    verdict = verified(sae, model, other_texts, rows=3000).verdict
    assert not verdict.healthy
    assert verdict.cause == fault, verdict.sentence


@pytest.mark.parametrize("fault", ON_OWN_TEXTS)
def test_a_planted_fault_is_named_on_the_records_own_texts(fault, trained, tmp_path):
    sae, model = planted_faults.plant(fault, trained, tmp_path / "case")
    report = verified(sae, model)
    assert not report.verdict.healthy
    assert report.verdict.cause == fault, report.verdict.sentence
    assert "the very rows of the record" in report.text()


@pytest.mark.parametrize("arch", planted_faults.ARCHITECTURES)
def test_a_healthy_sae_gives_no_false_alarm_on_20_random_sets_of_texts(
    arch, trained, sandbox, other_texts
):
    sae = sf.load_sae(trained / arch / "layer_1")
    record = find_record(sae)
    rows = ModelReadings(sandbox, other_texts, Site(1), 10**6)[READ]
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = rng.choice(rows.text[-1] + 1, size=rng.integers(60, 250), replace=False)
        part = rows.only(np.isin(rows.text, chosen))
        result = run_trials(sae, {READ: part}, [AS_IT_IS], record)[0]
        assert judge(result, [], record).healthy, judge(result, [], record).sentence


@pytest.mark.parametrize("arch", ["jumprelu", "gated", "topk_abs"])
def test_the_figures_of_training_are_found_again_on_their_own_rows(arch, trained):
    metrics = fsio.read_json(trained / arch / "layer_1" / "metrics.json")
    report = verified(trained / arch / "layer_1", store=str(trained / "acts"))
    found = report.verdict.results[0].figures
    assert report.verdict.healthy
    assert found.n_rows == metrics["n_rows"]
    assert found.l0.value == pytest.approx(metrics["l0_mean"], rel=1e-4)
    assert found.fvu.value == pytest.approx(metrics["fvu"], rel=1e-4)
    assert found.silent_share.value == metrics["silent_share"]
    assert found.always_on_share.value == metrics["always_on_share"]


def test_a_store_of_all_blocks_tells_a_block_too_far_and_one_of_a_block_says_what_it_lacks(
    trained, tmp_path
):
    sae, _ = planted_faults.plant("layer + 1", trained, tmp_path / "case")
    report = verified(sae, store=str(trained / "acts"))
    assert report.verdict.cause == "layer + 1"
    assert "set encode.layers=[1]" in report.verdict.then
    assert "metadata.hook_name" in report.verdict.then
    asked = verified(trained / "jumprelu" / "layer_1", store=str(trained / "acts"), layer=2)
    assert asked.verdict.cause == "layer + 1"
    assert "metadata.hook_name" not in asked.verdict.then
    with pytest.raises(MismatchError, match=r"--layer 5 asks for blocks.5.*but the store holds"):
        verified(sae, store=str(trained / "acts"), layer=5)


def test_the_command_prints_the_cause_and_ends_with_9_or_prints_healthy_and_ends_with_0(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    healthy = trained / "topk" / "layer_1"
    done = saefty(healthy, "--store", trained / "acts", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Healthy: ")
    written = fsio.read_json(tmp_path / "out" / "verify.json")
    assert written["healthy"]
    page = (tmp_path / "out" / "verify.md").read_text(encoding="utf-8")
    assert "Healthy: " in page
    assert fsio.read_json(tmp_path / "out" / "finished.json")["stage"] == "verify"

    sae, model = planted_faults.plant("b_dec subtracted wrongly", trained, tmp_path / "case")
    words = (sae, "--model", model, "--out", tmp_path / "off", "--json")
    done = saefty(*words)
    assert done.exit_code == 9, done.output
    figures = json.loads(done.stdout)["figures"]
    assert figures["cause"] == "b_dec subtracted wrongly"
    assert figures == fsio.read_json(tmp_path / "off" / "verify.json")
    tried = {one["cause"] for one in figures["experiments"]}
    assert set(planted_faults.FAULTS) - {"BOS missing", "BOS doubled"} <= tried | {
        "decoder-norm gating omitted", "decoder-norm gating added",
    }  # fmt: skip
    assert saefty(*words).exit_code == 9  # again into the same folder
    error = json.loads(done.stderr.strip().splitlines()[-1])
    assert error["exit_code"] == 9
    assert "apply_b_dec_to_input false" in error["then"]


def test_dtype_and_base_against_chat_are_reported_as_evidence_and_never_as_the_cause(
    trained, tmp_path, other_texts
):
    folder = planted_faults.SaeFolder(trained / "jumprelu" / "layer_1", tmp_path / "sae")
    folder.cfg["metadata"]["model_name"] = "google/gemma-2-2b"
    model = tmp_path / "gemma-2-2b-it"
    model.symlink_to(MODEL_FOLDER)
    report = verified(folder.write(), model, other_texts[:200], try_all=True)
    said = " ".join(report.verdict.remarks)
    assert report.verdict.healthy
    assert "one is the tuned form of the other" in said
    assert said.count("cannot be told by these figures alone") == 2
    evidence = {one.trial.cause for one in report.verdict.results if one.trial.evidence}
    assert evidence == {"dtype bfloat16", "dtype float16"}


def test_what_the_user_expects_wins_over_the_record(trained, other_texts):
    sae = trained / "jumprelu" / "layer_1"
    report = verified(sae, MODEL_FOLDER, other_texts[:200], expected_l0=200.0)
    assert not report.verdict.healthy
    assert report.verdict.cause is None
    assert "No single known cause" in report.verdict.sentence
    assert "given by you" in report.text()
    assert verified(
        sae, MODEL_FOLDER, other_texts[:200], expected_l0=200.0, margin=1.0
    ).verdict.healthy


@pytest.mark.parametrize(("wrong", "moved"), [(0.5, False), (2.0, False), (1.0, True)])
def test_a_threshold_off_by_the_norm_of_all_decoder_rows_is_no_gating_fault(
    wrong, moved, trained, tmp_path, other_texts
):
    folder = planted_faults.SaeFolder(trained / "jumprelu" / "layer_1", tmp_path / "sae")
    folder.latents_times(np.linalg.norm(folder.w["W_dec"], axis=1) / 2)
    np.testing.assert_allclose(np.linalg.norm(folder.w["W_dec"], axis=1), 2)
    folder.w["W_dec"][7] = 0  # a row that contributes nothing makes the others no less even
    folder.w["threshold"] *= wrong
    folder.cfg["rescale_acts_by_decoder_norm"] = moved  # then loading moves the norms
    verdict = verified(folder.write(), MODEL_FOLDER, other_texts[:200], try_all=True).verdict
    assert not verdict.healthy
    assert not any("gating" in one.trial.cause for one in verdict.results)


def test_with_nothing_recorded_only_limits_are_checked_and_a_repair_is_a_hint(
    trained, tmp_path, other_texts
):
    sae, _ = planted_faults.plant("norm factor missing", trained, tmp_path / "case")
    (sae / "metrics.json").unlink()
    report = verified(sae, MODEL_FOLDER, other_texts[:200])
    assert not report.verdict.healthy
    assert report.verdict.cause is None
    assert report.verdict.checked == "limits"
    assert "of all latents fire on a token" in report.verdict.sentence
    assert any("norm factor missing?" in remark for remark in report.verdict.remarks)
    healthy, _ = planted_faults.plant("none", trained, tmp_path / "healthy")
    (healthy / "metrics.json").unlink()
    report = verified(healthy, MODEL_FOLDER, other_texts[:200])
    assert report.verdict.healthy
    assert report.verdict.sentence.startswith("Not known to be unhealthy")


def test_with_l0_alone_the_repair_with_the_lowest_fvu_is_named(trained, tmp_path, other_texts):
    sae, _ = planted_faults.plant("decoder-norm gating omitted", trained, tmp_path / "case")
    l0 = fsio.read_json(sae / "metrics.json")["l0_mean"]
    (sae / "metrics.json").unlink()
    report = verified(sae, MODEL_FOLDER, other_texts[:200], expected_l0=l0)
    assert report.verdict.cause == "decoder-norm gating omitted"


def test_rows_of_a_hundred_times_the_median_norm_are_counted_and_their_effect_is_told(trained):
    sae = sf.load_sae(trained / "jumprelu" / "layer_1")
    x = planted_faults.activations(trained)[:600]
    direction = np.random.default_rng(0).standard_normal((2, x.shape[1]))
    median = np.median(np.linalg.norm(x, axis=1))
    x[[5, 300]] = 100 * median * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    rows = Rows(torch.from_numpy(x).float(), np.arange(600) // 20, np.arange(600) % 20)
    assert np.flatnonzero(outliers(rows)).tolist() == [5, 300]
    record = find_record(sae)
    held = {READ: rows, "without_outliers": rows.only(~outliers(rows))}
    first = run_trials(sae, held, [AS_IT_IS], record)[0]
    others = run_trials(sae, held, [reading_trial("without_outliers")], record)
    assert first.fvu > 0.3
    verdict = judge(first, others, record)
    assert verdict.cause == "outlier rows"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "texts.jsonl"], "--store acts and --data texts.jsonl are both given"),
        (["--dtype", "float16"], "--store acts is measured without a model, and --dtype says"),
        (["--device", "cuda", "--dtype", "float16"], "and --dtype and --device say how to run"),
    ],
)  # fmt: skip
def test_what_a_store_leaves_nothing_to_do_for_is_refused_with_both_named(words, said, monkeypatch):
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    done = saefty("sae", "--store", "acts", *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_a_check_needs_a_model_or_a_store_and_texts(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    done = saefty(trained / "topk" / "layer_1")
    assert done.exit_code == 2
    assert "neither is given" in done.stderr
    alone, _ = planted_faults.plant("none", trained, tmp_path / "case")
    (alone.parent / "metadata.json").unlink()
    with pytest.raises(ConfigError, match="no texts to read"):
        verified(alone, MODEL_FOLDER)
