"""What a sweep over alpha refuses, and what becomes of one in which strengths break the model."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from saefty import fsio
from saefty.config import load_config
from saefty.errors import (
    ConfigError,
    InputError,
    MismatchError,
    NumericError,
    UnknownNameError,
)
from saefty.interventions.vectors import SteeringVector
from saefty.judges.rules import Lexicon
from saefty.models.base import load_model
from saefty.records import Example, Site
from saefty.saes.native import save_sae
from saefty.stages.steer_sweep import SweepConfig
from saefty.steering_inputs import Given
from saefty.steering_settings import alpha_grid
from steer_sweeps import PROMPTS, SITE, sae_of, settings, sweep


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"alphas": None, "alpha_from": 5, "alpha_to": 5}, ConfigError, "no spread: 20 from 5 to"),
        ({"alphas": None, "alpha_count": 1}, ConfigError, "no spread: 1 from -300 to 300"),
        ({"alphas": [0.0]}, ConfigError, r"no spread: steer.alphas is \[0.0\]"),
        ({"alphas": []}, ConfigError, r"no spread: steer.alphas is \[\]"),
        ({"judge": "lexicom"}, UnknownNameError, "lexicom.*lexicon"),
        ({"judge": "perplexity", "judge_options": {}}, ConfigError, "fluency and not behaviour"),
        ({"judge_options": {}}, ConfigError, "cannot be made with the settings"),
        ({"layer": 7}, ConfigError, "layer 7 was asked for.*0..2"),
        ({"vector": "nowhere"}, ConfigError, "there is no vector at nowhere"),
        ({"unit": "latent"}, ConfigError, "nothing of the latent's maximum"),
        ({"where": [-1]}, ConfigError, "steer.where: places are counted from 0"),
        ({"where": []}, ConfigError, "steer.where: places .* there is at least one"),
        ({"where": "tail"}, ConfigError, "steer.where"),
        ({"where": [99]}, ConfigError, r"no token lies at place 99: .* places run 0\.\."),
        ({"methods": []}, ConfigError, "steer.methods"),
        ({"latent_max": 5.0}, ConfigError, "latent_max=5 .* unit is activation and the vector"),
        ({"latent_max": 5.0, "unit": "latent"}, ConfigError, "is latent and the vector is one"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_leaves_no_run(
    model, vector, tmp_path, keys, kind, words
):
    with pytest.raises(kind, match=words):
        sweep(model, vector, tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists()


def test_an_alpha_that_breaks_the_model_is_named_and_the_plain_replies_are_kept(
    model, vector, tmp_path
):
    for _ in range(2):  # a resumed run says the same, from what is on disk
        with pytest.raises(NumericError, match=r"alpha = 1e\+39 at blocks.1") as error:
            sweep(model, vector, tmp_path / "run", alphas=[1e39])
        assert "at step 1 of generation" in error.value.message
    left = list(fsio.read_lines(tmp_path / "run" / "replies" / "unsteered" / "00000.jsonl"))
    assert [one["reply"] for one in left] == [
        model.generate([prompt], max_new_tokens=6)[0]
        for prompt in sorted(PROMPTS, key=lambda one: [p["example_id"] for p in left].index(one.id))
    ]


def test_a_sweep_of_which_no_reply_could_be_scored_is_refused(model, vector, tmp_path, monkeypatch):
    monkeypatch.setattr(Lexicon, "score", lambda self, prompts, _: np.full(len(prompts), np.nan))
    with pytest.raises(InputError, match="none of the 28 replies has a score of behaviour: "):
        sweep(model, vector, tmp_path / "run")
    assert not (tmp_path / "run" / "finished.json").exists()


def test_a_bare_vector_is_told_by_the_key_that_places_it(model, vector, tmp_path):
    from saefty.interventions.vectors import load_vector

    np.save(tmp_path / "bare.npy", load_vector(vector).values.numpy())
    with pytest.raises(ConfigError, match="bare.npy is a bare vector") as error:
        sweep(model, tmp_path / "bare.npy", tmp_path / "run")
    assert "steer.layer=20" in error.value.then
    assert "--layer" not in error.value.then


def test_a_vector_of_another_model_is_told(model, vector, tmp_path, caplog):
    sweep(model, vector, tmp_path / "run")
    assert "the test vector was made on tiny and steers" in caplog.text


def test_the_lengths_of_a_vector_do_not_go_with_it_to_another_block(vector, tmp_path):
    from saefty.interventions.vectors import load_vector

    saved = load_vector(vector).with_norms(residual=3.0, latent=2.0).save(tmp_path / "v")
    own = Given(settings(saved, tmp_path / "run").steer).vector
    assert dict(own.norms) == {"residual": 3.0, "latent": 2.0}
    moved = Given(settings(saved, tmp_path / "run", layer=2).steer).vector
    assert moved.site == Site(2)
    assert dict(moved.norms) == {}


def test_of_several_saes_the_layer_names_one(tmp_path):
    for layer in (0, 1):
        sae = sae_of(tiny_models.D_MODEL)
        sae.site = Site(layer)
        with torch.no_grad():
            sae.W_dec *= layer + 1
        save_sae(sae, tmp_path / "sae" / f"layer_{layer}")
    keys = {"sae": str(tmp_path / "sae"), "latent": 3}
    with pytest.raises(ConfigError, match="holds 2 SAEs"):
        Given(settings(None, tmp_path, **keys).steer)
    for layer in (0, 1):
        found = Given(settings(None, tmp_path, **keys, layer=layer).steer).vector
        assert found.site == Site(layer)
        expected = (layer + 1) * sae_of(tiny_models.D_MODEL).W_dec[3].detach()
        torch.testing.assert_close(found.values, expected)


def test_a_vector_or_an_sae_of_another_width_is_refused(model, tmp_path):
    vector = SteeringVector(torch.ones(7), SITE, "test").save(tmp_path / "v")
    with pytest.raises(MismatchError, match="vector is 7 wide.*are 32 wide"):
        sweep(model, vector, tmp_path / "run")
    save_sae(sae_of(16), tmp_path / "sae")
    with pytest.raises(MismatchError, match="16 wide.*32 wide"):
        sweep(model, None, tmp_path / "run", sae=str(tmp_path / "sae"), latent=1)


def test_a_latent_out_of_range_is_refused_with_the_range(model, tmp_path):
    save_sae(sae_of(tiny_models.D_MODEL), tmp_path / "sae")
    with pytest.raises(ConfigError, match=r"latent 12332 does not exist.*64 latents, 0\.\.63"):
        sweep(model, None, tmp_path / "run", sae=str(tmp_path / "sae"), latent=12332)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused_by_its_id(model, vector, tmp_path, text):
    prompts = [*PROMPTS, Example("e", text)]
    with pytest.raises(InputError, match="1 of 5 prompts are empty: e"):
        sweep(model, vector, tmp_path / "run", prompts)


def test_a_model_that_cannot_reply_is_refused(vector, tmp_path):
    encoder = load_model(str(tiny_models.folder_of("bert")))
    with pytest.raises(MismatchError, match="predicts no next token, so it has no replies"):
        sweep(encoder, vector, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", [{"vector": "v", "sae": "s", "latent": 1}, {"sae": "s"}, {}])
def test_one_vector_is_wanted(keys, tmp_path):
    with pytest.raises(ConfigError, match="a vector is either vector .*, or sae and latent"):
        settings(None, tmp_path, **keys)


def test_the_shipped_configuration_has_the_even_grid_0_and_the_anchor():
    path = Path(__file__).parents[2] / "configs" / "steer.yaml"
    cfg = load_config(SweepConfig, path)
    assert (cfg.steer.latent, cfg.steer.methods) == (12332, (1, 2))
    even = np.linspace(-300, 300, 20).tolist()
    assert list(alpha_grid(cfg.steer)) == sorted([*even, 0.0, 122.0])
