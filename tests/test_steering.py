"""The plan of steered replies: names that stay in the run, and files that are looked at."""

import pytest
import torch

import tiny_models
from saefty.errors import ConfigError, IntegrityError
from saefty.interventions.vectors import SteeringVector
from saefty.records import Example, Site
from saefty.steering import PLAIN, Arm, Dose, Sampling, check_names, replies_under

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
    assert set(first) == {PLAIN, Dose("one", 1.0), Dose("one", 2.0)}
    assert make(model, tmp_path) == first
    path = tmp_path / "one" / "00000.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(spoilt(lines, how)), encoding="utf-8")
    with pytest.raises(IntegrityError, match="00000.jsonl does not hold the 4 replies") as error:
        make(model, tmp_path)
    assert "Remove it and run the same command again" in error.value.then
    path.unlink()
    assert make(model, tmp_path) == first
