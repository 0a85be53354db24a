"""Sweeps over alpha: the same replies as by hand, resumed to the byte, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from saefty import steering_report
from saefty.errors import (
    ExternalError,
    MismatchError,
)
from saefty.interventions.steer import steer
from saefty.interventions.vectors import SteeringVector
from saefty.judges.rating import Rating
from saefty.judges.rules import Lexicon
from saefty.plots.base import save_plot
from saefty.saes.native import save_sae
from steer_sweeps import FOUR, PROMPTS, SITE, WORDS, replies_of, rows, sae_of, sweep, write_data


@pytest.fixture(scope="module")
def done(model, vector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering_report, "save_plot", write_data)
        return sweep(model, vector, folder, anchors=[2.0]).folder


def by_hand(model, vector, alpha, method):
    """Each prompt alone, under one intervention."""
    from saefty.interventions.vectors import load_vector

    with model.intervene(SITE, steer(load_vector(vector), alpha, method=method)):
        return [model.generate([one], max_new_tokens=6)[0] for one in PROMPTS]


def test_every_reply_is_that_of_its_prompt_and_alpha_alone(model, vector, done):
    found = replies_of(done)
    plain = [model.generate([one], max_new_tokens=6)[0] for one in PROMPTS]
    assert [one[3] for one in found if one[1] == 0] == plain
    for method in (1, 2):
        for alpha in (-3.0, 1.5, 2.0, 3.0):
            own = [one for one in found if one[:2] == (f"method_{method}", alpha)]
            assert [one[2] for one in own] == [prompt.id for prompt in PROMPTS]
            assert [one[3] for one in own] == by_hand(model, vector, alpha, method)
    assert len({one[3] for one in found}) > 2 * len(PROMPTS)


def test_0_and_the_anchors_are_in_the_grid_of_both_methods(done):
    for method in "12":
        own = [float(row["alpha"]) for row in rows(done) if row["method"] == method]
        assert own == [-3.0, 0.0, 1.5, 2.0, 3.0]


def test_means_are_those_of_the_replies_on_both_scales(done):
    judge = Lexicon(WORDS)
    found = replies_of(done)
    for row in rows(done):
        alpha = float(row["alpha"])
        arm = "unsteered" if alpha == 0 else f"method_{row['method']}"
        texts = [one[3] for one in found if one[:2] == (arm, alpha)]
        scores = judge.score([""] * len(texts), texts)
        there = scores[~np.isnan(scores)]
        assert int(row["behaviour_n"]) == len(there)
        assert int(row["behaviour_missing"]) == len(texts) - len(there)
        if len(there):
            assert float(row["behaviour"]) == pytest.approx(there.mean())
            assert float(row["behaviour_1_10"]) == pytest.approx(1 + 9 * there.mean())
            product = there.mean() * float(row["fluency"])
            assert float(row["product"]) == pytest.approx(product)


def test_the_four_pictures_and_the_report_are_there(model, vector, tmp_path, monkeypatch):
    monkeypatch.setattr(steering_report, "save_plot", save_plot)
    done = sweep(model, vector, tmp_path / "run", anchors=[2.0]).folder
    summary = json.loads((done / "summary.json").read_text(encoding="utf-8"))
    assert summary["plots"] == FOUR
    assert sorted(path.name for path in (done / "assets").iterdir()) == sorted(FOUR)
    assert all((done / "assets" / name).read_bytes().startswith(b"\x89PNG") for name in FOUR)
    text = (done / "summary.md").read_text(encoding="utf-8")
    assert all(f"assets/{name}" in text for name in FOUR)


def test_a_complete_sweep_is_not_done_again(model, vector, done, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert sweep(model, vector, done, anchors=[2.0]).folder == done


class Killed(BaseException):
    """The process ends, as by kill -9: nothing is cleaned up."""


def contents(folder: Path) -> dict[str, bytes]:
    changing = {"metadata.json", "journal.jsonl", ".lock"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in changing
    }


@pytest.mark.parametrize("calls", [1, 6])
def test_a_killed_sweep_ends_with_the_same_bytes(model, vector, done, tmp_path, monkeypatch, calls):
    own, made = model.generate, []

    def generate(*given, **keys):
        if len(made) == calls:
            raise Killed
        made.append(1)
        return own(*given, **keys)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model, "generate", generate)
        sweep(model, vector, folder, anchors=[2.0])
    kept = contents(folder)
    assert len([name for name in kept if name.startswith("replies/")]) == calls
    sweep(model, vector, folder, anchors=[2.0])
    assert contents(folder) == contents(done)


def test_a_sweep_that_was_killed_while_judging_judges_the_rest(
    model, vector, done, tmp_path, monkeypatch
):
    own, made = Lexicon.score, []

    def score(self, *given):
        made.append(1)
        if len(made) == 4:
            raise Killed
        return own(self, *given)

    folder = tmp_path / "run"
    monkeypatch.setattr(Lexicon, "score", score)
    with pytest.raises(Killed):
        sweep(model, vector, folder, anchors=[2.0])
    sweep(model, vector, folder, anchors=[2.0])
    assert len(made) == 4 + 9 - 3, "nine doses, of which three were judged before"
    assert contents(folder) == contents(done)


def test_sampled_replies_draw_the_same_numbers_under_every_dose(model, vector, tmp_path):
    """A steer that is too weak to change anything gives the unsteered samples."""
    where = sweep(model, vector, tmp_path / "run", alphas=[1e-7, -1e-7], temperature=1.0).folder
    found = replies_of(where)
    plain = [one[3] for one in found if one[0] == "unsteered"]
    for arm in ("method_1", "method_2"):
        for alpha in (1e-7, -1e-7):
            assert [one[3] for one in found if one[:2] == (arm, alpha)] == plain
    greedy = sweep(model, vector, tmp_path / "greedy").folder
    assert [one[3] for one in replies_of(greedy) if one[0] == "unsteered"] != plain


def test_a_judge_that_was_away_is_asked_for_what_is_missing(model, vector, tmp_path, monkeypatch):
    away, asked = [True], []

    def score(self, prompts, replies):
        asked.append(replies)
        status = "failed" if away[0] else "scored"
        self.ratings = tuple(Rating(status, 0.5 if status == "scored" else np.nan) for _ in replies)
        return np.array([one.score for one in self.ratings])

    monkeypatch.setattr(Lexicon, "score", score)
    with pytest.raises(ExternalError, match="no answer for 28 of 28 replies, in 7 of 7 doses"):
        sweep(model, vector, tmp_path / "run")
    assert not (tmp_path / "run" / "finished.json").exists()
    away[0] = False
    found = sweep(model, vector, tmp_path / "run")
    assert len(asked) == 14
    assert found.figures["missing"]["behaviour"] == {}


def test_a_word_list_that_changed_makes_it_another_sweep(model, vector, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("the\n")
    options = {"file": str(words)}
    where = sweep(model, vector, tmp_path / "run", judge_options=options).folder
    (where / "finished.json").unlink()
    words.write_text("dog\n")
    with pytest.raises(MismatchError, match="judges.behaviour.files.file"):
        sweep(model, vector, tmp_path / "run", judge_options=options)


class Half:
    """Scores every second reply, and can say nothing of the others."""

    def score(self, prompts, replies):
        return np.array([0.5 if n % 2 else np.nan for n in range(len(replies))])


def test_below_the_coverage_there_is_no_picture_and_the_report_says_why(
    model, vector, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Lexicon, "score", Half.score)
    where = sweep(model, vector, tmp_path / "run", coverage=0.95).folder
    summary = json.loads((where / "summary.json").read_text(encoding="utf-8"))
    left_out = summary["plots_left_out"]
    assert "50.0% of the replies have a score, less than 95%" in left_out[FOUR[0]]
    assert not (where / "assets" / FOUR[0]).exists()
    assert "50.0% of the replies have a score" in (where / "summary.md").read_text("utf-8")
    assert any("is not drawn" in record.message for record in caplog.records)
    assert {row["behaviour_missing"] for row in rows(where)} == {"2"}
    assert {row["behaviour"] for row in rows(where)} == {"0.5"}
    assert sum(summary["missing"]["behaviour"].values()) == 2 * 7, "seven doses"


def test_the_vector_of_a_latent_is_its_decoder_row(model, tmp_path):
    sae = sae_of(tiny_models.D_MODEL)
    folder = tmp_path / "sae"
    save_sae(sae, folder)
    where = sweep(model, None, tmp_path / "run", sae=str(folder), latent=5).folder
    vector = SteeringVector(sae.W_dec[5].detach(), SITE, "decoder").save(tmp_path / "v")
    other = sweep(model, vector, tmp_path / "other").folder
    assert replies_of(where) == replies_of(other)


def test_alpha_in_residual_norms_is_that_many_of_them_in_activation_units(model, vector, tmp_path):
    from saefty.interventions.vectors import load_vector

    norms = []
    for prompt in PROMPTS:
        batch = model.collate(model.tokenize([prompt]))
        x = model.capture(batch, [SITE])[SITE][0].double().numpy()
        kept = (batch.mask & ~batch.special)[0].numpy()
        norms += np.sqrt((x[kept] ** 2).sum(-1)).tolist()
    length = float(np.mean(norms)) / load_vector(vector).norm
    saved = load_vector(vector).with_norms(residual=0.01).save(tmp_path / "v")
    one = sweep(model, saved, tmp_path / "a", alphas=[1.0, -2.0], unit="residual").folder
    figures = json.loads((one / "summary.json").read_text(encoding="utf-8"))
    assert figures["vector"]["norms"]["residual"] == pytest.approx(np.mean(norms)), "not its own"
    same = sweep(model, vector, tmp_path / "b", alphas=[length, -2 * length]).folder
    assert [row[3] for row in replies_of(one)] == [
        row[3] for row in sorted(replies_of(same), key=lambda row: row[0] != "unsteered")
    ]


def test_beside_an_alpha_that_breaks_the_model_the_others_have_their_scores(
    model, vector, done, tmp_path, monkeypatch
):
    """Whole and broken doses share batches; killed and resumed, the bytes are the same."""
    keys = {"alphas": [-3.0, 1.5, 3.0, 1e39], "anchors": [2.0]}
    found = sweep(model, vector, tmp_path / "run", **keys).folder
    broken = "method_1_1e+39", "method_2_1e+39"
    own = {(row["method"], row["alpha"]): row for row in rows(found)}
    for row in rows(done):
        assert own.pop((row["method"], row["alpha"])) == row
    assert {row["note"] for row in own.values()} == {"broke the model"}
    assert {row["behaviour"] for row in own.values()} == {""}
    summary = json.loads((found / "summary.json").read_text(encoding="utf-8"))
    assert tuple(summary["broken"]) == broken
    assert all("alpha = 1e+39" in why and "step 1" in why for why in summary["broken"].values())
    assert summary["plots"] == FOUR, "a dose without replies is no reply without a score"
    ledger = json.loads((found / "finished.json").read_text())["ledger"]
    assert ledger["failed"] == {"broke the model": 2 * len(PROMPTS)}
    assert ledger["in"] == 11 * len(PROMPTS)
    generated, calls = model.generate, []

    def generate(*given, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return generated(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model, "generate", generate)
        sweep(model, vector, tmp_path / "again", **keys)
    sweep(model, vector, tmp_path / "again", **keys)
    assert contents(tmp_path / "again") == contents(found)
