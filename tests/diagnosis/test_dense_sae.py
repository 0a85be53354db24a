"""A dense SAE made on purpose: what its plots, its table and its diagnosis say of it."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dense_saes
import zoo
from analyze.dumps import in_this_process
from saefty import cli, feature_dump, fsio
from saefty.analysis_report import NAMES
from saefty.config import build_config
from saefty.plots.base import save_plot
from saefty.stages.doctor import DoctorConfig, check

FIGURES = list(NAMES)[:7]
"""The seven plots that the figures were read off."""


@pytest.fixture(autouse=True)
def without_a_child_process(monkeypatch):
    monkeypatch.setattr(feature_dump, "to_safetensors", in_this_process)


def two_drawn(plot, data, path, **keys):
    """Draw two of the pictures, which takes a second each; say of the others that they came."""
    if plot in {"active_per_token", "code_pca"}:
        save_plot(plot, data, path, **keys)
    else:
        fsio.commit_bytes(path, b"drawn by tests/contracts")


def examined(patient, **keys):
    section = {"sae": str(patient.sae), "store": str(patient.store), "dump": str(patient.dump)}
    return check(build_config(DoctorConfig, {"doctor": {**section, "rows": 4096, **keys}}))


def codes(patient):
    chunks = [torch.load(path)["sae_feats"] for path in sorted(patient.dump.glob("*.pt"))]
    return torch.cat(chunks).double().numpy()


def findings(report):
    return {one.name: one for one in report.findings}


@pytest.mark.parametrize("kind", dense_saes.KINDS)
def test_the_diagnosis_says_what_the_plots_say_and_which_hypothesis_holds(kind, zoo_home):
    patient = dense_saes.build(kind, zoo_home)
    z = codes(patient)
    l0 = (z > 0).sum(axis=1)
    assert (z > 0).mean() == pytest.approx(dense_saes.ACTIVE, abs=0.03)
    report = examined(patient)
    said = findings(report)
    # The codes are not sparse: on all tokens alike, and not by outliers.
    assert said["dense"].severity == "sick"
    assert said["dense"].numbers["l0"] == pytest.approx(l0.mean())
    assert said["dense"].numbers["median"] == np.median(l0)
    assert said["dense"].numbers["p99"] == pytest.approx(np.percentile(l0, 99))
    # It is no matter of the threshold.
    moot = said["threshold_moot"].numbers
    assert moot["l0_above"] > 0.9 * moot["l0"]
    # They are codes, and of these rows.
    assert said["these_codes"].severity == "info"
    assert report.cause in patient.accepted, report.text()
    holds = {row["hypothesis"][:2]: row["holds"] for row in report.hypotheses()}
    wanted = "H1" if kind == "weak sparsity" else "H2"
    assert {key for key, value in holds.items() if value == "yes"} == {wanted}


def test_only_an_offset_gives_the_histogram_two_ends(zoo_home):
    ends = {}
    for kind in dense_saes.KINDS:
        rate = (codes(dense_saes.build(kind, zoo_home)) > 0).mean(axis=0)
        ends[kind] = min((rate < 0.1).mean(), (rate > 0.9).mean())
    assert ends["input offset"] > 0.1
    assert ends["weak sparsity"] == ends["encoder bias"] == 0


def test_the_table_and_the_plots_come_from_the_dump_alone(zoo_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saefty.analysis_report.save_plot", two_drawn)
    patient = dense_saes.build("encoder bias", zoo_home)
    z = codes(patient)
    words = ["analyze", "--dump_dir", str(patient.dump), "--sample_tokens", "3000", "run.dir=run"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert f"X.shape = [3000, {zoo.WIDTH}]" in done.stdout
    layer = fsio.read_json(tmp_path / "run" / "summary.json")["layers"]["1"]
    assert layer["all_tokens"]["L0_mean"] == pytest.approx((z > 0).sum(axis=1).mean())
    assert layer["all_tokens"]["active_share"] == pytest.approx(dense_saes.ACTIVE, abs=0.001)
    active = {one["eps"]: one["frac"] for one in layer["sample"]["active"]}
    assert active[0.1] > 0.99 * active[0.0]
    drawn = tmp_path / "run" / "layer_1" / "activation_report"
    assert all((drawn / name).is_file() for name in FIGURES)
    # The codes alone tell that they are not sparse, and that the SAE is needed to tell why.
    done = CliRunner().invoke(cli.app, ["doctor", "--dump_dir", str(patient.dump)])
    assert done.exit_code == 9
    assert "The codes are not sparse." in done.stdout
    assert "give the SAE and activations too" in done.output
