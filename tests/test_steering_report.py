"""The report of a sweep: which alpha is named the best, and what is said of those it cannot be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saefty import fsio, steering_report
from saefty.interventions.vectors import SteeringVector
from saefty.records import Site
from saefty.steering import PLAIN, Arm, Dose
from saefty.steering_report import SweepResult, write_sweep
from saefty.steering_scores import points_of

PROMPTS = 64
ARM = Arm("method_1", SteeringVector(torch.ones(4), Site(1), "test"))


@pytest.fixture
def result():
    """At alpha 1, all is scored and good; at 2, six replies are left, and these are better."""
    few = np.full(PROMPTS, np.nan)
    few[:6] = 0.95
    behaviour = {PLAIN: np.zeros(PROMPTS), Dose(ARM.name, 1.0): np.full(PROMPTS, 0.5)}
    behaviour[Dose(ARM.name, 2.0)] = few
    fluency = {dose: np.where(np.isnan(one), np.nan, 0.9) for dose, one in behaviour.items()}
    return SweepResult(
        arms=(ARM,),
        alphas=(0.0, 1.0, 2.0),
        anchors=(),
        points=tuple(points_of(behaviour, fluency, None, boots=100, seed=0)),
        missing={"behaviour": {"empty": 58}, "fluency": {"empty": 58}},
        behaviour="French",
        judges={"behaviour": "regex", "fluency": "perplexity"},
        prompts=PROMPTS,
        coverage=0.95,
        norms=0.5,
        facts={},
    )


def test_where_no_product_is_above_that_of_not_steering_no_alpha_is_the_best(tmp_path, monkeypatch):
    """All 0: the first of the grid, here -2, would be the largest of equals."""
    monkeypatch.setattr(
        steering_report, "save_plot", lambda name, data, path: fsio.commit_text(path, name)
    )
    doses = [PLAIN, Dose(ARM.name, -2.0), Dose(ARM.name, 1.0)]
    behaviour = dict.fromkeys(doses, np.zeros(PROMPTS))
    fluency = dict.fromkeys(doses, np.ones(PROMPTS))
    result = SweepResult(
        arms=(ARM,),
        alphas=(-2.0, 0.0, 1.0),
        anchors=(),
        points=tuple(points_of(behaviour, fluency, None, boots=100, seed=0, relative=True)),
        missing={"behaviour": {}, "fluency": {}},
        behaviour="French",
        judges={"behaviour": "regex", "fluency": "perplexity"},
        prompts=PROMPTS,
        coverage=0.95,
        norms=0.5,
        facts={},
    )
    assert result.best(ARM).dose == PLAIN
    figures = write_sweep(tmp_path, result)
    assert (figures["best"], figures["no_better"]) == ({ARM.name: None}, [ARM.name])
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "no strength beats not steering" in text
    assert "flatters it" not in text
    assert "fluency 1 by definition (`perplexity` is relative to these replies)" in text
    line = (tmp_path / "sweep.csv").read_text(encoding="utf-8").splitlines()
    table = dict(zip(line[0].split(","), line[2].split(","), strict=True))
    assert (table["alpha"], table["fluency"]) == ("0.0", "1.0")
    assert (table["fluency_low"], table["fluency_high"]) == ("", "")


def test_a_strength_with_few_scores_is_not_the_best(result):
    products = {point.dose.alpha: point.product.estimate for point in result.points}
    assert products[2.0] > products[1.0], "of what is left"
    assert result.best(ARM).dose.alpha == 1.0


def test_the_report_says_which_alphas_could_not_be_chosen(result, tmp_path, monkeypatch):
    monkeypatch.setattr(
        steering_report, "save_plot", lambda name, data, path: fsio.commit_text(path, name)
    )
    figures = write_sweep(tmp_path, result)
    assert figures["best"][ARM.name]["alpha"] == 1.0
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "1 of its 3 alphas could not be chosen: too few scored of their replies" in text
    lines = (tmp_path / "sweep.csv").read_text(encoding="utf-8").splitlines()
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == ["", "", "too few scored"]


def test_the_first_sentence_says_how_few_of_the_unsteered_replies_it_rests_on(
    result, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        steering_report, "save_plot", lambda name, data, path: fsio.commit_text(path, name)
    )
    write_sweep(tmp_path / "all", result)
    assert "over 64 prompts. " in (tmp_path / "all" / "summary.md").read_text(encoding="utf-8")
    behaviour = {point.dose: np.full(PROMPTS, 0.5) for point in result.points}
    behaviour[PLAIN] = np.where(np.arange(PROMPTS) < 3, 0.7, np.nan)
    fluency = dict.fromkeys(behaviour, np.ones(PROMPTS))
    few = points_of(behaviour, fluency, None, boots=100, seed=0)
    write_sweep(tmp_path / "few", replace(result, points=tuple(few)))
    text = (tmp_path / "few" / "summary.md").read_text(encoding="utf-8")
    assert "over 64 prompts, of whose replies only 3 have a score of French." in text


def test_the_report_says_how_long_one_alpha_is_and_passes_a_caution_on(
    result, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        steering_report, "save_plot", lambda name, data, path: fsio.commit_text(path, data.unit)
    )
    result = replace(result, coverage=0.0)
    figures = write_sweep(tmp_path, replace(result, caution="The grid is too weak."))
    assert figures["norms_of_one_alpha"] == 0.5
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "alpha is in activation units (one is 0.5 mean residual norms)" in text
    assert "The grid is too weak." in text
    axis = (tmp_path / "assets" / "fluency_score_vs_alpha_method_1.png").read_text("utf-8")
    assert axis == "in activation units (one is 0.5 mean residual norms)"
    in_norms = replace(ARM, unit="residual")
    write_sweep(tmp_path / "norms", replace(result, arms=(in_norms,)))
    text = (tmp_path / "norms" / "summary.md").read_text(encoding="utf-8")
    assert "alpha is in multiples of the mean residual norm." in text
