"""`saefty steer generate`: plain and steered replies, as by hand, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny_models
from saefty.cli import app
from saefty.interventions.steer import steer
from saefty.interventions.vectors import SteeringVector
from saefty.models.base import load_model
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae

SITE = Site(1)
PROMPTS = ["the lazy dog", "the model reads"]
MODEL = str(tiny_models.folder_of("llama"))


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    made = SteeringVector(values, SITE, "test", {"residual": 3.0}, {"model": MODEL})
    return str(made.save(tmp_path_factory.mktemp("vector") / "v"))


def call(*words):
    return CliRunner().invoke(app, ["steer", "generate", *words, "--max-new-tokens", "6"])


def by_hand(alpha, method=1):
    model = tiny_models.load("llama")
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    replies = []
    for text in PROMPTS:
        with model.intervene(SITE, steer(values, alpha, method=method)):
            replies += model.generate([Example("x", text, raw=True)], max_new_tokens=6)
    return replies


@pytest.mark.parametrize("method", [1, 2])
def test_the_replies_are_those_of_each_prompt_and_alpha_alone(vector, method):
    given = ("--vector", vector, "--alpha", "2", "--alpha", "-3", "--method", str(method))
    result = call("--raw", "--json", *given, *PROMPTS)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["alphas"] == [2.0, -3.0]
    assert found["site"] == SITE.name
    assert [one["prompt"] for one in found["replies"]] == PROMPTS
    assert [one["plain"] for one in found["replies"]] == by_hand(0.0)
    for place, alpha in enumerate((2.0, -3.0)):
        steered = [one["steered"][place] for one in found["replies"]]
        assert steered == by_hand(alpha, method)


def test_the_text_shows_plain_and_steered_beside_each_other(vector):
    result = call("--raw", "--vector", vector, "--alpha", "1", "--unit", "residual", *PROMPTS)
    assert result.exit_code == 0, result.output
    head = next(line for line in result.stdout.splitlines() if "plain" in line)
    assert "alpha = 1" in head
    told = " ".join(result.stdout.split())
    found = re.search(r"mean residual norm is ([\d.]+), measured on these prompts", told)
    assert float(found[1]) == pytest.approx(mean_norm(), rel=1e-3), "not the 3 of the vector"
    assert all(f"> {text}" in result.stdout for text in PROMPTS)


def mean_norm():
    model = tiny_models.load("llama")
    norms = []
    for text in PROMPTS:
        batch = model.collate(model.tokenize([Example("x", text, raw=True)]))
        x = model.capture(batch, [SITE])[SITE][0].double().numpy()
        norms += np.linalg.norm(x[(batch.mask & ~batch.special)[0].numpy()], axis=1).tolist()
    return np.mean(norms)


def test_columns_without_room_stand_one_under_the_other():
    from saefty.stages.steer_generate import shown

    found = {
        "model": "m", "vector": "caa", "site": "s", "method": 1, "unit": "activation",
        "alphas": [1.0, 2.0], "residual": 8.0, "residual_norms": [0.5, 1.0],
        "replies": [{"prompt": "p", "plain": "one", "steered": ["deux", "trois"]}],
    }  # fmt: skip
    wide = [line.split() for line in shown(found, 120).splitlines()]
    assert ["one", "deux", "trois"] in wide
    silent = found | {"replies": [{"prompt": "p", "plain": "one", "steered": ["", " "]}]}
    assert "one (empty reply) (empty reply)" in " ".join(shown(silent, 120).split())
    narrow = [line.split() for line in shown(found, 50).splitlines()]
    assert ["plain", "one"] in narrow
    assert ["alpha", "=", "2", "(1", "norms)", "trois"] in narrow


def test_a_latent_and_a_file_of_prompts_will_do_as_well(vector, tmp_path):
    sae = SaeConfig(arch="topk", d_in=tiny_models.D_MODEL, d_sae=64, k=8).build()
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec[7] = values
    sae.site = SITE
    save_sae(sae, tmp_path / "sae")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    given = ("--sae", str(tmp_path / "sae"), "--latent", "7", "--alpha", "2", "--model", MODEL)
    result = call(*given, "--data", str(file), "--json")
    assert result.exit_code == 0, result.output
    assert [one["steered"][0] for one in json.loads(result.stdout)["replies"]] == by_hand(2.0)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--alpha", "1", ""), 3, "1 of 1 prompts are empty"),
        (("the dog",), 2, "there is no alpha"),
        (("--alpha", "1"), 2, "both missing"),
        (("--alpha", "1", "--where", "tail", "the dog"), 2, "--where: should be both, prefill"),
        (("--alpha", "1", "--where", "99", "the dog"), 2, "no token lies at place 99"),
        (("--alpha", "1", "--where", "0", "the dog"), 2, "all tokens at places 0 are special"),
        (("--alpha", "nan", "the dog"), 2, "--alpha is nan, and no vector can be added nan times"),
        (("--alpha", "1", "--unit", "norm", "the dog"), 2, "--unit: should be activation"),
        (("--alpha", "1", "--latent", "-1", "the dog"), 2, "--latent: should be integer ≥ 0"),
        (("--alpha", "1", "--layer", "9", "the dog"), 2, "layer 9 was asked for"),
        (("--alpha", "1", "--latent-max", "5", "the dog"), 2, "latent_max=5"),
        (("--alpha", "1e39", "the dog"), 9, "alpha = 1e+39"),
        (("--alpha", "1", "--sae", "x", "--latent", "1", "the dog"), 2, "given are vector="),
    ],
)
def test_what_cannot_be_done_is_said(vector, words, code, told):
    result = call("--vector", vector, "--raw", *words)
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bare_vector_is_told_by_the_flag_that_places_it(tmp_path):
    np.save(tmp_path / "bare.npy", np.ones(tiny_models.D_MODEL, np.float32))
    result = call("--vector", str(tmp_path / "bare.npy"), "--alpha", "1", "--model", MODEL, "dog")
    assert result.exit_code == 2
    assert "--layer=20" in result.stderr
    assert "steer.layer" not in result.stderr
    result = call("--vector", str(tmp_path / "bare.npy"), "--alpha", "1", "--layer", "1", "dog")
    assert result.exit_code == 2
    assert "does not say which model it was made on" in result.stderr
    assert "--model FOLDER" in result.stderr


def test_a_model_that_is_not_there_is_told_by_the_flag_that_names_it(vector, tmp_path):
    (tmp_path / "model").mkdir()
    models = {str(tmp_path / "model"): "Set --model to", "no/such": "Check --model;"}
    for model, told in models.items():
        result = call("--vector", vector, "--alpha", "1", "--model", model, "dog")
        assert result.exit_code == 3
        assert told in result.stderr
        assert "model.name" not in result.stderr
        assert "revision" not in result.stderr


def test_alpha_is_told_in_residual_norms_and_a_negligible_one_is_warned_of(vector, caplog):
    """0.01 of the vector, whose length is by hand; 2 of it is no little."""
    given = ("--raw", "--json", "--vector", vector, "--alpha", "0.01", "--alpha", "2", *PROMPTS)
    result = call(*given)
    found = json.loads(result.stdout)
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    one = float(values.double().norm()) / mean_norm()
    assert found["residual"] == pytest.approx(mean_norm(), rel=1e-5)
    assert found["residual_norms"] == pytest.approx([0.01 * one, 2 * one], rel=1e-5)
    assert f"alpha = 0.01 adds {0.01 * one:.2g} of the mean residual norm" in result.stderr
    assert "alpha = 2 adds" not in result.stderr
    told = call(*given[:1], *given[2:]).stdout
    assert f"alpha = 2 ({2 * one:.2g} norms)" in " ".join(told.split())


def test_of_many_prompts_some_are_shown_and_a_file_holds_all(vector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"the dog {n}" for n in range(12)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ("--vector", vector, "--alpha", "2", "--data", str(prompts))
    result = call(*given)
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("> the dog") for line in result.stdout.splitlines()) == 10
    made = list((tmp_path / "artifacts" / "steer_generate").glob("*/replies.jsonl"))
    assert len(made) == 1
    assert "2 more prompts; all are in artifacts" in " ".join(result.stdout.split())
    lines = [json.loads(line) for line in made[0].read_text("utf-8").splitlines()]
    assert [one["prompt"] for one in lines] == texts
    assert lines[3]["alphas"] == [2.0]
    everything = json.loads(call(*given, "--json").stdout)["replies"]
    assert [one["steered"] for one in everything] == [one["steered"] for one in lines]
    assert len(list((tmp_path / "artifacts" / "steer_generate").iterdir())) == 1, "not of --json"
    named = call(*given, "--out", "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_bytes() == made[0].read_bytes()
    assert "all are in mine.jsonl" in named.stdout
    again = call(*given, "--out", "mine.jsonl")
    assert again.exit_code == 2
    assert "mine.jsonl is there already" in again.stderr


def test_places_are_listed_with_commas(vector):
    given = ("--raw", "--json", "--vector", vector, "--alpha", "4", "--where", "1,2", *PROMPTS)
    found = json.loads(call(*given).stdout)
    model = load_model(MODEL)
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    with model.intervene(SITE, steer(values, 4.0, where=(1, 2))):
        replies = [
            model.generate([Example("x", text, raw=True)], max_new_tokens=6)[0] for text in PROMPTS
        ]
    assert [one["steered"][0] for one in found["replies"]] == replies
