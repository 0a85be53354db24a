"""The demo on pictures, in a small form: what it stores the model computes; its claims hold."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from saefty import cli
from saefty.metrics.intervals import Interval
from saefty.metrics.splits import split_clusters
from saefty.probes import STRENGTHS
from saefty.sandbox import vision_demo
from saefty.sandbox.vision_measures import Row, checks, patch_means
from saefty.sandbox.vision_model import (
    PATCHES,
    VISION_MODEL_FOLDER,
    build_vision_processor,
    pixel_values,
    training_scenes,
)
from saefty.sandbox.vision_world import VisionWorld
from saefty.stores.activations import ActivationStore

TINY = vision_demo.Size(pictures=64, questions=256, train_steps=40, replies=16)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_demo, "FULL", TINY)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return vision_demo.run(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def by_hand():
    """What plain transformers compute of the same questions' words in layer 0."""
    world = VisionWorld(0)
    scenes = world.scenes(256, seed=vision_demo.QUESTIONS_SEED, split="held_out")
    tokenizer = build_vision_processor(world).tokenizer
    data = training_scenes(scenes, tokenizer)
    model = AutoModelForImageTextToText.from_pretrained(VISION_MODEL_FOLDER, dtype="auto").eval()
    block, kept = model.model.language_model.layers[0], {}
    block.register_forward_pre_hook(lambda _, x: kept.update(before=x[0]))
    block.self_attn.register_forward_hook(lambda _, x, out: kept.update(attention=out[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(data.ids), pixel_values=pixel_values(data.images))
    words = [
        slice(PATCHES + 2, PATCHES + 2 + len(scene.question.split())) for scene in scenes
    ]  # behind <bos>, <user> and the picture
    return scenes, {
        name: [row[place].numpy() for row, place in zip(x, words, strict=True)]
        for name, x in kept.items()
    }


def rows_of(folder: Path, layer: int = 0):
    store = ActivationStore(folder)
    return store.take(layer, np.arange(store.n_rows)).numpy()


def found(outcome, kind, name):
    rows = {(row["kind"], row["name"]): row["auroc"] for row in outcome.figures["rows"]}
    return rows[kind, name]


def test_delta_and_off_are_what_plain_transformers_computes_with_attention_left_out(done, by_hand):
    _, states = by_hand
    delta = rows_of(done.folder / "zero_attention" / "questions")
    on = rows_of(done.folder / "on")
    np.testing.assert_allclose(delta, np.concatenate(states["attention"]), atol=2e-5)
    np.testing.assert_allclose(on - delta, np.concatenate(states["before"]), atol=2e-5)


def test_the_dense_figure_is_what_scikit_learn_finds_at_one_of_the_strengths(done, by_hand):
    scenes, states = by_hand
    harmful = np.array([scene.harmful for scene in scenes])
    quartets = np.unique([scene.quartet for scene in scenes], return_inverse=True)[1]
    train, test = split_clusters(harmful, quartets, seed=0)
    assert not set(quartets[train]) & set(quartets[test])
    means = np.stack([one.mean(axis=0) for one in states["attention"]])
    areas = []
    for strength in STRENGTHS:
        learner = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        learner.fit(means[train], harmful[train])
        areas.append(roc_auc_score(harmful[test], learner.decision_function(means[test])))
    reported = found(done, "delta", "what attention adds")["estimate"]
    assert min(abs(area - reported) for area in areas) < 1e-3
    assert done.figures["examples"]["tested"] == test.sum()


def test_only_the_contrast_tells_harm(done):
    for row in done.figures["rows"]:
        for how in ("auroc", "last"):
            if row[how] and row["kind"] in {"alone", "off"}:
                assert 0.3 < row[how]["estimate"] < 0.7, row
        if row["kind"] == "delta":
            assert row["auroc"]["estimate"] >= 0.85
            assert row["auroc"]["low"] > 0.75
    assert done.figures["accuracy"]["all"] >= 0.9


def test_sparse_probes_are_reported_for_one_two_and_five_latents_of_each_contrast(done):
    shown = [
        (row["group"], row["name"]) for row in done.figures["rows"] if row["kind"] == "latents"
    ]
    assert shown == [
        (f"SAE on δ, {contrast}", name)
        for contrast in ("what attention adds", "the image's share")
        for name in ("1 latent", "2 latents", "5 latents")
    ]


def test_all_is_written_and_the_picture_shows_it(done):
    assert json.loads((done.folder / "vision.json").read_text("utf-8")) == done.figures
    with Image.open(done.folder / "vision.png") as image:
        assert min(image.size) > 600
    text = vision_demo.table(done)
    for row in done.figures["rows"]:
        assert f"{row['auroc']['estimate']:.3f} [{row['auroc']['low']:.3f}" in text
    assert (done.folder / "model" / "model.safetensors").exists()


def test_the_command_finds_what_is_there_and_prints_the_table(done, monkeypatch):
    runs = [done.folder / "zero_attention" / part for part in ("sae", "training", "eval")]
    files = [file for run in runs for file in sorted(run.rglob("*.safetensors"))]
    before = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setattr("saefty.log.set_up", lambda **_: None)
    result = CliRunner().invoke(cli.app, ["demo", "--vision", "--out", str(done.folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout == vision_demo.table(done) + "\n"
    assert len(files) > 3
    assert [file.stat().st_mtime_ns for file in files] == before


def row(kind, value, name="n"):
    return Row(kind, "g", name, Interval(value, value, value, "", 9))


def test_a_claim_that_does_not_hold_is_said(done):
    share = "the image's share"
    rows = [row("alone", 0.5), row("off", 0.5), row("on", 1.0), row("delta", 1.0, share)]
    assert all(checks(rows, 0.99).values())
    for place, worse in ((0, 0.7), (1, 0.61), (3, 0.94)):
        changed = [*rows]
        changed[place] = row(rows[place].kind, worse, rows[place].name)
        held = checks(changed, 0.99)
        assert sum(held.values()) == len(held) - 1
        text = vision_demo.table(replace(done, figures={**done.figures, "holds": held}))
        assert "do not bear out" in text
        assert "It follows" not in text
    assert not all(checks(rows, 0.94).values())


def test_patch_means_are_the_mean_colours_of_the_models_patches(tmp_path):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[8:, 16:] = (255, 51, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = np.zeros((2, 3, 3))
    wanted[1, 2] = (1.0, 0.2, 0.0)
    np.testing.assert_allclose(patch_means(tmp_path / "a.png"), wanted.ravel())
