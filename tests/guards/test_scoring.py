"""Guards against the naive path, on texts that have no score, and on other models."""

import copy
import json
import shutil

import numpy as np
import pytest

import guard_cases
import tiny_models
from guard_cases import HARMFUL, KINDS, TEXTS, make_guard, make_sae, naive_rows, spec_of
from planted_model import NAN, planted
from saefty import fsio
from saefty.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    MismatchError,
)
from saefty.guards.files import read_guard, save_guard
from saefty.guards.inputs import as_examples
from saefty.guards.scoring import load_guard
from saefty.records import Example, Message
from saefty.saes.native import save_sae

FEW = TEXTS[::6]
"""Six texts of unlike lengths."""
POOLED = [(kind, how) for kind in ("dense", "latents") for how in guard_cases.POOLS]


# What it scores


@pytest.mark.parametrize(("kind", "how"), POOLED)
def test_scores_are_those_of_a_naive_forward_pass(kind, how, model, tmp_path):
    guard = load_guard(make_guard(tmp_path / "guard", kind, how), model)
    rows = naive_rows(kind, how, make_sae() if kind == "latents" else None)
    by_hand = guard.linear
    expected = (rows[:, by_hand.columns] - by_hand.center) / by_hand.scale @ by_hand.weights
    assert guard.log_odds(TEXTS) == pytest.approx(expected + by_hand.bias, rel=1e-4, abs=1e-4)
    assert ((guard.score(TEXTS) > 0.5) == HARMFUL).mean() > 0.8  # it has learnt something


def test_scores_of_words_are_scikit_learns(saved):
    guard = load_guard(saved["words"])
    counts = np.zeros((len(TEXTS), len(guard.spec.vocabulary)))
    for row, text in enumerate(TEXTS):
        for word in text.lower().replace(",", " ").replace(".", " ").split():
            counts[row, guard.spec.vocabulary.index(word)] += 1
    assert guard.log_odds(TEXTS) == pytest.approx(guard.linear.score(counts), abs=1e-12)
    assert guard.score(["A ROBOT!"])[0] > 0.5 > guard.score(["bread"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_loaded_twice_gives_the_same_bytes(kind, saved, model):
    first, second = (load_guard(saved[kind], model).score(FEW) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_was_moved_needs_nothing_of_its_old_place(kind, tmp_path, model):
    here = make_guard(tmp_path / "here", kind)
    expected = load_guard(here, model).score(FEW)
    there = tmp_path / "elsewhere" / "another name"
    there.parent.mkdir()
    shutil.move(here, there)
    assert load_guard(there, model).score(FEW).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_order_do_not_matter(kind, saved, model):
    together = load_guard(saved[kind], model).log_odds(FEW)
    small = load_guard(saved[kind], model, token_budget=1)
    order = np.random.default_rng(0).permutation(len(FEW))
    mixed = small.log_odds([FEW[i] for i in order])
    assert mixed == pytest.approx(together[order], rel=1e-4, abs=1e-4)
    alone = [small.log_odds([text])[0] for text in FEW]
    assert alone == pytest.approx(together.tolist(), rel=1e-4, abs=1e-4)


def test_a_guard_loads_the_model_of_its_record(saved, model):
    assert load_guard(saved["dense"]).score(TEXTS[:3]) == pytest.approx(
        load_guard(saved["dense"], model).score(TEXTS[:3]), rel=1e-6
    )


def test_a_guard_of_words_loads_no_model(saved, monkeypatch):
    monkeypatch.setattr("saefty.guards.scoring.open_guard_model", None)
    assert np.isfinite(load_guard(saved["words"]).score(TEXTS)).all()


def test_texts_are_read_in_the_template_where_the_training_texts_were(tmp_path, model):
    guard = load_guard(make_guard(tmp_path / "guard", "dense", raw=False), model)
    bare = guard.log_odds(TEXTS[:4])
    examples = [Example(str(i), text) for i, text in enumerate(TEXTS[:4])]
    assert bare.tobytes() == guard.log_odds(examples).tobytes()
    raw = [Example(one.id, one.prompt, raw=True) for one in examples]
    assert (np.abs(bare - guard.log_odds(raw)) > 1e-3).all()


def test_only_the_tokens_of_training_are_read(tmp_path, model):
    spec = spec_of("dense", "last", tokens="prompt_end")
    plain = read_guard(make_guard(tmp_path / "plain", "dense", "last"))
    guard = load_guard(save_guard(tmp_path / "end", spec, plain.linear, plain.facts), model)
    texts = TEXTS[:6]
    asked = [Example(str(i), text, response=" Sure!", raw=True) for i, text in enumerate(texts)]
    expected = load_guard(tmp_path / "plain", model).log_odds(texts)
    assert guard.log_odds(asked) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_model_stops_behind_the_guards_site(saved, model, monkeypatch):
    seen = []
    capture = type(model).capture

    def watched(self, batch, sites, rows=None):
        seen.append(tuple(sites))
        return capture(self, batch, sites, rows)

    monkeypatch.setattr(type(model), "capture", watched)
    monkeypatch.setattr(type(model), "logits", None)
    load_guard(saved["latents"], model).score(TEXTS)
    assert set(seen) == {(guard_cases.SITE,)}


# Texts without a score


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_cannot_be_read_has_a_status_and_no_score(kind, saved, model):
    guard = load_guard(saved[kind], model)
    found = guard.judge(["", TEXTS[0], " \n", "half \ud83d", TEXTS[1]])
    assert found.statuses == ("empty", "ok", "empty", "not_text", "ok")
    assert np.isnan(found.probability[[0, 2, 3]]).all()
    assert found.log_odds[[1, 4]] == pytest.approx(guard.log_odds(TEXTS[:2]), rel=1e-4, abs=1e-4)


def test_a_text_that_is_too_long_has_no_score_unless_it_is_cut(saved, model):
    long = TEXTS[0] * 40
    assert load_guard(saved["dense"], model).judge([long]).statuses == ("too_long",)
    for side in ("left", "right"):
        cut = load_guard(saved["dense"], model, truncate=side).judge([long])
        assert cut.statuses == ("ok",)
    with pytest.raises(ConfigError, match="never, left, right, not 'end'"):
        load_guard(saved["dense"], model, truncate="end")


def test_a_conversation_that_the_template_refuses_spares_the_others(saved, model):
    talk = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    odd = Example("odd", "", messages=talk, raw=True)
    found = load_guard(saved["dense"], model).judge([TEXTS[0], odd, TEXTS[1]])
    assert found.statuses == ("ok", "refused", "ok")
    assert "3 turns" in found.reasons[1]


def test_activations_that_are_no_numbers_give_no_score(saved, model):
    broken = planted(model, [(1, "1", 3, NAN)])
    guard = load_guard(saved["dense"], broken)
    found = guard.judge(TEXTS[:4])
    assert found.statuses == ("ok", "nonfinite", "ok", "ok")
    expected = load_guard(saved["dense"], model).log_odds(TEXTS[:4])
    assert found.log_odds[[0, 2, 3]] == pytest.approx(expected[[0, 2, 3]], rel=1e-5)


def test_a_text_that_fails_in_the_forward_pass_spares_the_others(saved, model):
    twin = copy.copy(model)

    def capture(batch, sites, rows=None):
        if any(item.example.id == "2" for item in batch.items):
            raise RuntimeError("planted")
        return model.capture(batch, sites, rows=rows)

    twin.capture = capture
    found = load_guard(saved["latents"], twin).judge(TEXTS[:5])
    assert found.statuses == ("ok", "ok", "failed", "ok", "ok")
    assert found.reasons == {2: "RuntimeError: planted"}


def test_flags_are_refused_for_texts_without_a_score(saved):
    guard = load_guard(saved["words"])
    assert guard.flag(["a robot", "bread"]).tolist() == [True, False]
    with pytest.raises(InputError, match="1 of 2 texts cannot be read, first number 1"):
        guard.flag(["a robot", ""])


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_have_no_scores(kind, saved, model):
    assert load_guard(saved[kind], model).score([]).shape == (0,)


def test_one_bare_text_is_not_read_letter_by_letter(saved):
    assert load_guard(saved["words"]).score("a robot").shape == (1,)


def test_an_item_that_is_no_text_is_named():
    with pytest.raises(InputError, match=r"text 1 \(from 0\) is of the type NoneType"):
        as_examples(["a robot", None], raw=True)


def test_the_share_of_words_that_a_guard_does_not_know_is_told(saved):
    found = load_guard(saved["words"]).judge(["a robot", "a zeppelin", "Цеппелин летит", ""])
    assert found.unknown[:3].tolist() == [0.0, 0.5, 1.0]
    assert np.isnan(found.unknown[3])


# Thresholds


def test_a_threshold_is_a_probability_or_a_name(saved, model):
    guard = load_guard(saved["dense"], model)
    odds = guard.log_odds(TEXTS)
    assert (guard.flag(TEXTS) == (odds >= 0)).all()
    assert (guard.flag(TEXTS, "fpr_1pct") == (odds >= 1.5)).all()
    assert (guard.flag(TEXTS, 0.9) == (guard.score(TEXTS) >= 0.9)).all()
    assert guard.threshold == 0.5


@pytest.mark.parametrize("bad", ["high", "1.5", 0, 1, float("nan"), "-1"])
def test_a_threshold_that_is_none_is_refused_with_those_there_are(bad, saved):
    with pytest.raises(ConfigError, match=r"fpr_1pct \(0.8176\)"):
        read_guard(saved["dense"]).spec.threshold_of(bad)


# Models and SAEs that are not the guard's


def test_a_model_of_another_width_is_refused_with_both_widths(saved, tmp_path):
    wide = tiny_models.build("llama", tmp_path / "wide", hidden_size=48, head_dim=12)
    with pytest.raises(MismatchError, match=r"wide is 48 wide, but .*llama-float32, 32 wide"):
        load_guard(saved["dense"], str(wide)).score(TEXTS)


def test_a_model_of_other_weights_is_refused(saved, tmp_path):
    other = tiny_models.build("llama", tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"fitted on, .*: model.safetensors differs"):
        load_guard(saved["latents"], str(other)).score(TEXTS)


def test_a_model_that_is_gone_is_named_with_the_way_out(saved, tmp_path):
    record = json.loads((saved["dense"] / "guard.json").read_text())
    del record[fsio.SEAL]
    record["model"]["name"] = str(tmp_path / "gone")
    folder = shutil.copytree(saved["dense"], tmp_path / "guard")
    fsio.commit_sealed(folder / "guard.json", record)
    with pytest.raises(InputError, match="which cannot be had here") as caught:
        load_guard(folder).score(TEXTS)
    assert "--model FOLDER" in caught.value.then
    moved = str(tiny_models.folder_of("llama"))
    assert np.isfinite(load_guard(folder, moved).score(TEXTS)).all()


def test_an_sae_of_other_weights_is_refused_by_its_checksum(copied, model):
    folder = copied("latents")
    shutil.rmtree(folder / "sae")
    save_sae(make_sae(seed=1), folder / "sae")
    with pytest.raises(MismatchError, match="is not the one that this guard was fitted on"):
        load_guard(folder, model).score(TEXTS)


def test_an_sae_whose_bytes_changed_is_refused(copied, model):
    folder = copied("latents")
    path = folder / "sae" / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="does not have the bytes"):
        load_guard(folder, model).score(TEXTS)


def test_an_sae_of_the_hub_is_named_by_its_commit_and_not_copied(tmp_path, model, monkeypatch):
    sae = make_sae()
    sae.folder = tmp_path / "models--o--r" / "snapshots" / "abc123" / "layer_1"
    whole = read_guard(make_guard(tmp_path / "whole", "latents"))
    folder = save_guard(tmp_path / "guard", whole.spec, whole.linear, whole.facts, sae)
    assert not (folder / "sae").exists()
    asked = []

    def fetched(*place, **options):
        asked.append((*place, options))
        return make_sae(seed=len(asked) - 1)

    monkeypatch.setattr("saefty.guards.files.load_sae", fetched)
    expected = load_guard(tmp_path / "whole", model).score(TEXTS)
    assert load_guard(folder, model).score(TEXTS).tobytes() == expected.tobytes()
    assert asked == [("o/r", "layer_1", {"revision": "abc123"})]
    with pytest.raises(MismatchError, match="o/r is not the one"):
        load_guard(folder, model).score(TEXTS)
