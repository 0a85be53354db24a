"""How long one alpha is, and what is said of a grid that cannot show what a vector does."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty import steering_report
from saefty.config import build_config
from saefty.errors import ConfigError
from saefty.interventions.vectors import SteeringVector
from saefty.records import Example, Site
from saefty.stages.base import GIVEN_IN_PYTHON
from saefty.stages.steer_sweep import SweepConfig, run
from saefty.steering_inputs import norms_of_one, off_scale, tell_requests
from saefty.steering_settings import SweepSection, alpha_grid

SITE = Site(1)
PROMPTS = [Example("a", "the lazy dog", raw=True), Example("b", "the model reads", raw=True)]


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="module")
def vector():
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    return SteeringVector(values, SITE, "test", {"residual": 3.0, "latent": 6.0})


def mean_norm(model):
    """Of the tokens that are steered, one prompt at a time."""
    norms = []
    for prompt in PROMPTS:
        batch = model.collate(model.tokenize([prompt]))
        x = model.capture(batch, [SITE])[SITE][0].double().numpy()
        norms += np.linalg.norm(x[(batch.mask & ~batch.special)[0].numpy()], axis=1).tolist()
    return np.mean(norms)


def test_one_alpha_is_told_in_the_norms_of_these_prompts(model, vector):
    length = float(np.linalg.norm(vector.values.double().numpy()))
    expected = {"activation": length, "latent": 6.0, "residual": mean_norm(model)}
    for unit, one in expected.items():
        found = norms_of_one(vector, unit, model, PROMPTS)
        assert found == pytest.approx(one / mean_norm(model), rel=1e-5), unit


@pytest.mark.parametrize(
    ("alphas", "one", "told"),
    [
        ((-300.0, -100.0, 0.0, 100.0, 300.0), 8.9e-5, "adds 0.0089 to 0.027 mean residual norms"),
        ((60.0, 0.0, 122.0), 0.55, "adds 33 to 67 mean residual norms"),
        ((0.0, 1.0), 1e-4, "adds 0.0001 mean residual norms"),
        ((0.0, 0.01, 50.0), 1.0, "adds 0.01 to 50 mean residual norms"),
        ((0.0, 0.01, -0.5, 50.0), 1.0, ""),
        ((-0.1, 0.0), 1.0, ""),
        ((0.0, 2.0), 1.0, ""),
    ],
)
def test_a_grid_of_which_no_alpha_can_show_the_vector_is_told(alphas, one, told):
    found = off_scale(alphas, one)
    assert bool(found) == bool(told)
    assert told in found


def test_a_sweep_warns_of_such_a_grid_before_it_generates_and_in_its_report(
    model, vector, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(steering_report, "save_plot", lambda *_: None)
    own, warned = model.generate, []

    def generate(*given, **keys):
        warned.append("The grid adds" in caplog.text)
        return own(*given, **keys)

    monkeypatch.setattr(model, "generate", generate)
    saved = vector.save(tmp_path / "v")

    def sweep(name, alphas, prompts=PROMPTS):
        keys = {
            "vector": str(saved),
            "alphas": alphas,
            "judge": "lexicon",
            "judge_options": {"words": ["the", "a", "o", "an", "e"]},
            "max_new_tokens": 4,
            "boots": 100,
        }
        folder = tmp_path / name
        tree = {"data": {"name": GIVEN_IN_PYTHON}, "model": {"name": "tiny"}, "steer": keys}
        cfg = build_config(SweepConfig, {**tree, "run": {"dir": str(folder)}})
        run(cfg, model=model, examples=prompts)
        return (folder / "summary.md").read_text(encoding="utf-8").split("## ")[0]

    one = float(vector.values.double().norm()) / mean_norm(model)
    assert "The grid adds" not in sweep("usual", [1.0 / one])
    assert not any(warned)
    warned.clear()
    told = "The grid adds 0.001 to 0.01 mean residual norms"
    assert told in sweep("weak", [0.001 / one, -0.01 / one])
    assert all(warned)
    assert caplog.text.count(told) == 1


def section(**keys):
    given = {"vector": "v", "judge": "regex", "judge_options": {"pattern": "o"}, **keys}
    return build_config(SweepSection, given)


def test_a_grid_of_more_alphas_than_anyone_looks_at_is_refused():
    assert len(alpha_grid(section(alpha_count=1000))) == 1001
    with pytest.raises(ConfigError, match=r"the grid has 2,000,000 alphas; at most 1,000"):
        alpha_grid(section(alpha_count=2_000_000))


def test_what_an_endpoint_will_be_asked_is_said_before_the_sweep(caplog):
    caplog.set_level("INFO")
    tell_requests(section(), 30, 39, 64)
    assert not caplog.messages, "a pattern costs nothing"
    both = section(judge="openai", fluency="openai")
    tell_requests(both, 30, 39, 64)
    assert "openai will be asked at most 2,340 times (30 prompts, 39 times each" in caplog.text
    assert "about replies of up to 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("judge", "options", "told"),
    [
        ("openai", {"criterion": "speaks of cats"}, "“speaks of cats”"),
        ("regex", {"pattern": "chat"}, "a match of chat"),
        ("language", {"target": "fr"}, "sentences in fr"),
        ("lexicon", {"words": ["a"]}, "share of listed words"),
        ("mine", {}, "what mine looks for"),
    ],
)
def test_a_behaviour_without_a_name_is_called_what_its_judge_looks_for(judge, options, told):
    assert section(judge=judge, judge_options=options).behaviour == told
    assert section(judge=judge, behaviour_name="French").behaviour == "French"
