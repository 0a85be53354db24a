"""The plan of steered replies: names that stay in the run, and files that are looked at."""

import pytest
import torch

import tiny_models
from saefty.errors import ConfigError, IntegrityError, NumericError
from saefty.interventions.vectors import SteeringVector
from saefty.records import Example, Site
from saefty.steering import (
    PLAIN,
    Arm,
    Dose,
    Sampling,
    check_names,
    check_places,
    replies_under,
)

PROMPTS = [Example("a", "the lazy dog", raw=True), Example("b", "the model reads", raw=True)]
ALPHAS = [0.0, 1.0, 2.0]


def arm(name):
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    return Arm(name, SteeringVector(3 * values, Site(1), "test"))


@pytest.mark.parametrize("name", ["caa", "SAE-TS, 2.1", "way 3", "ответ", "a" * 150])
def test_names_that_a_file_may_have_will_do(name):
    check_names([name, "other"])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["../../x"], "'../../x' cannot name"),
        (["a/b"], "cannot name"),
        ([""], "cannot name"),
        ([".hidden"], "cannot name"),
        (["a\n"], "cannot name"),
        (["a\\b"], "cannot name"),
        (["a" * 151], "cannot name"),
        (["unsteered"], "'unsteered' .* the model as it is"),
        (["Unsteered"], "'Unsteered' .* the model as it is"),
        (["CAA", "caa"], r"'caa' .* that of another \(CAA\)"),
        (["a", "a"], "that of another"),
    ],
)
def test_names_that_leave_the_run_or_meet_others_are_refused(names, words):
    with pytest.raises(ConfigError, match=words):
        check_names(names)


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


def make(model, folder, name="one"):
    return replies_under(model, PROMPTS, [arm(name)], ALPHAS, Sampling(3, batch_size=4), folder)


def test_an_arm_whose_name_leaves_the_folder_writes_nothing(model, tmp_path):
    with pytest.raises(ConfigError, match="cannot name"):
        make(model, tmp_path / "run" / "replies", "../x")
    assert not list(tmp_path.iterdir())


def spoilt(lines, how):
    return {
        "short": lines[:-1],
        "swapped": [lines[1], lines[0], *lines[2:]],
        "other arm": [line.replace('"one"', '"two"') for line in lines],
        "other alpha": [line.replace("1.0", "1.5") for line in lines],
        "no reply": [line.replace('"reply"', '"answer"') for line in lines],
    }[how]


@pytest.mark.parametrize("how", ["short", "swapped", "other arm", "other alpha", "no reply"])
def test_a_file_that_does_not_hold_its_replies_is_refused(model, tmp_path, how):
    first = make(model, tmp_path)
    assert set(first.replies) == {PLAIN, Dose("one", 1.0), Dose("one", 2.0)}
    assert make(model, tmp_path) == first
    path = tmp_path / "one" / "00000.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(spoilt(lines, how)), encoding="utf-8")
    with pytest.raises(IntegrityError, match="00000.jsonl does not hold the 4 replies") as error:
        make(model, tmp_path)
    assert "Remove it and run the same command again" in error.value.then
    path.unlink()
    assert make(model, tmp_path) == first


def test_a_dose_that_breaks_on_one_prompt_is_broken_on_all_and_the_others_are_whole(
    model, tmp_path, monkeypatch
):
    """It breaks in the second of two batches: what it replied in the first does not count."""
    generated = model.generate
    prompts = [*PROMPTS, Example("c", "Mix flour", raw=True), Example("d", "a robot", raw=True)]
    last = min(prompts, key=lambda one: len(model.tokenize([one])[0].ids)).id

    def generate(examples, **options):
        alphas = [edit.describe(n) for _, edit in model._edits for n in range(len(examples))]
        for one, told in zip(examples, alphas, strict=False):
            if one.id == last and told.endswith("= 2"):
                raise NumericError(f"the logits are NaN at step 3, under {told}.")
        return generated(examples, **options)

    given = (model, prompts, [arm("one")], ALPHAS, Sampling(3, batch_size=4))
    whole = replies_under(*given, tmp_path / "whole")
    monkeypatch.setattr(model, "generate", generate)
    found = replies_under(*given, tmp_path / "run")
    assert found.broken == {Dose("one", 2.0): "the logits are NaN at step 3, under method 1 with "
                            "alpha = 2."}  # fmt: skip
    assert found.replies == {
        dose: texts for dose, texts in whole.replies.items() if dose.alpha != 2.0
    }
    monkeypatch.setattr(model, "generate", None)  # all is on disk
    assert replies_under(*given, tmp_path / "run") == found


def test_places_at_which_nothing_could_be_steered_are_refused(model):
    """A reply of 3 tokens is read again but for its last: two places behind the longest prompt."""
    longest = max(len(item.ids) for item in model.tokenize(PROMPTS))
    check_places((longest + 1,), model, PROMPTS, 3)
    check_places("both", model, PROMPTS, 3)
    told = rf"place {longest + 2}: .* {longest} tokens and a reply up to 3, .* 0\.\.{longest + 1}"
    with pytest.raises(ConfigError, match=told):
        check_places((1, longest + 2), model, PROMPTS, 3)
    with pytest.raises(ConfigError, match="all tokens at places 0 are special"):
        check_places((0,), model, PROMPTS, 3)
    check_places((0,), model, PROMPTS, 3, skip=False)
