"""Contrasts kept apart from plain activations, and contrasts that hold nothing, as typed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.vision import N, rows_of, store_of
from saefty import fsio
from saefty.errors import MismatchError
from saefty.models.base import load_model
from saefty.stores.features import FeatureStore


@pytest.fixture(scope="module")
def trained(memes) -> Path:
    folder = memes.folder / "trained"
    memes.run(
        "train", f"train.store={memes.extracted}", "sae.k=4", "train.max_steps=30",
        "train.layers=[2]", f"run.dir={folder}",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def plain(memes) -> Path:
    folder = memes.folder / "plain"
    memes.run(*memes.extract(folder, "extract.contrast.method=none"))
    return folder


def test_an_sae_of_contrasts_is_refused_wherever_plain_activations_are_read(memes, trained, plain):
    sae = trained / "layer_2"
    encode = ["encode", f"encode.sae={trained}"]
    prompts = memes.folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is it?"}\n')
    model = str(memes.folder / "llava")
    commands = [
        [*encode, f"encode.store={plain}"],
        [*encode, *memes.data],
        ["eval", f"eval.sae={trained}", f"eval.store={plain}", "intervention.enabled=false"],
        ["analyze", f"analyze.sae={trained}", f"analyze.store={plain}"],
        ["sae", "verify", sae, "--store", plain],
        ["doctor", sae, "--store", plain],
        [
            "steer",
            "generate",
            "--model",
            model,
            "--sae",
            sae,
            "--latent",
            "0",
            "--alpha",
            "1",
            "Hi",
        ],
    ]
    for number, command in enumerate(commands):
        folder = memes.folder / f"mixed_{number}"
        where = [] if command[0] in ("sae", "doctor", "steer") else [f"run.dir={folder}"]
        result = memes.saefty(*command, *where)
        assert result.code != 0, command
        assert "contrasts h_on - h_off (zero_attention, per_layer)" in result.err, result.err
        assert "plain activations" in result.err
        assert "Traceback" not in result.err
        assert not folder.exists() or not list(folder.rglob("*.safetensors"))


def test_an_sae_of_plain_activations_reads_no_contrasts(memes, plain):
    folder = memes.folder / "trained_plain"
    memes.run(
        "train", f"train.store={plain}", "sae.k=4", "train.max_steps=10", "train.layers=[2]",
        "train.loss_recovered_examples=0", f"run.dir={folder}",
    )  # fmt: skip
    result = memes.saefty("encode", f"encode.sae={folder}", f"encode.store={memes.extracted}")
    assert result.code != 0
    assert "was trained on plain activations" in result.err


def test_contrasts_are_encoded_from_the_model_as_from_their_store(memes, trained):
    words = ["encode", f"encode.sae={trained}"]
    of_store, of_model = memes.folder / "codes_of_store", memes.folder / "codes_of_model"
    memes.run(*words, f"encode.store={memes.extracted}", f"run.dir={of_store}")
    memes.run(
        *words, *memes.data, "encode.contrast.method=zero_attention", "encode.save.shard_size=6",
        "encode.pooling.name=text_only_mean", f"run.dir={of_model}",
    )  # fmt: skip
    one, other = (FeatureStore(folder) for folder in (of_store, of_model))
    assert one.manifest["contrast"] == other.manifest["contrast"]
    codes = one.csr(2), other.csr(2)
    assert codes[0].nnz == 4 * N
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(*(getattr(code, name) for code in codes))


def test_rows_of_plain_activations_differ_from_their_contrast(memes, plain):
    assert store_of(plain).contrast is None
    one, other = (rows_of(store_of(folder), 0) for folder in (plain, memes.extracted))
    assert np.linalg.norm(one - other) > 0.1 * np.linalg.norm(other)


def test_an_intervention_without_effect_stops_before_the_work_and_names_the_layer(memes):
    still = memes.folder / "still"
    shutil.copytree(memes.folder / "llava", still)
    model = load_model(str(still), dtype="float32", device="cpu")
    with torch.no_grad():
        model.blocks[2].self_attn.o_proj.weight.zero_()
    model.model.save_pretrained(still)
    folder = memes.folder / "no_effect"
    command = memes.extract(folder, f"model.name={still}")
    for _ in range(2):  # a second start says the same
        result = memes.saefty(*command)
        assert result.code == MismatchError.exit_code
        assert "the intervention had no effect at layer 2" in result.err
        assert "Traceback" not in result.err
        assert not folder.exists()  # so that the next command may be another one


def test_a_contrast_that_the_family_does_not_have_leaves_nothing_behind(memes):
    folder = memes.folder / "cross"
    result = memes.saefty(*memes.extract(folder, "extract.contrast.method=cross_attn_off"))
    assert result.code == MismatchError.exit_code
    assert "has no cross-attention layers to turn off" in result.err
    assert "extract.contrast.method=knockout" in result.err
    assert not folder.exists()


def test_no_guard_is_saved_of_contrasts(memes, trained):
    codes, guard = memes.folder / "codes_for_a_guard", memes.folder / "guard"
    memes.run(
        "encode", f"encode.sae={trained}", f"encode.store={memes.extracted}", f"run.dir={codes}"
    )
    words = ["probe", f"probe.features={codes}", "--save", guard]
    result = memes.saefty(*words, f"run.dir={memes.folder / 'probe'}")
    assert result.code != 0
    assert "was made of contrasts h_on - h_off (zero_attention, per_layer)" in result.err
    assert "leave probe.save out" in result.err
    assert not guard.exists()


def test_an_sae_of_contrasts_is_verified_on_their_store(memes, trained):
    said = memes.run("sae", "verify", trained / "layer_2", "--store", memes.extracted)
    assert "Healthy: L0 4 (recorded 4)" in said


def test_what_no_kept_token_can_see_stops_the_run_and_says_which_tokens_can(memes):
    folder = memes.folder / "before_the_image"
    result = memes.saefty(
        *memes.extract(
            folder, "extract.contrast.method=knockout", "extract.pooling.name=span_mean",
            "extract.pooling.span=[0,1]",
        )
    )  # fmt: skip
    assert result.code != 0
    assert "the intervention had no effect at layer 0" in result.err
    assert "what lies before an image, or farther behind it than" in result.err


def test_an_example_without_an_image_has_no_share_of_one_and_is_counted(memes):
    rows = [json.loads(line) for line in (memes.folder / "memes.jsonl").read_text().splitlines()]
    rows[5]["image_path"] = None
    table = memes.folder / "one_without.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    knockout = "extract.contrast.method=knockout"
    folder = memes.folder / "without"
    memes.run(*memes.extract(folder, knockout, f"data.path={table}"))
    assert fsio.read_json(folder / "finished.json")["ledger"]["skipped"] == {"no_image": 1}
    assert store_of(folder).n_rows == N - 1
    result = memes.saefty(*memes.extract(memes.folder / "none", knockout, "data.image=null"))
    assert result.code != 0
    assert f"no_image {N}" in result.err
    assert "set data.image to the column of images" in result.err
