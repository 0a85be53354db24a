"""Contrasts of a vision-language model through the command line: extract, train, eval, as typed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import tiny_vlms
from pipeline.forkserver import CHILDREN
from pipeline.test_faults import bytes_of
from pipeline.vision import CONFIGS, LAYERS, N, rows_of, store_of
from saefty import fsio
from saefty.config import load_config
from saefty.models.base import load_model
from saefty.models.hooks import first_tensor
from saefty.records import ROLES, Example
from saefty.saes.native import load_sae
from saefty.stages.eval import EvalConfig
from saefty.stages.extract import ExtractConfig
from saefty.stages.train import TrainConfig
from vision_data import write_memes


def without_attention(model, item, layer):
    """Return the residual behind a layer's attention, by a forward pass that zeroes it, and not."""
    found = []
    block = model.blocks[layer]
    for zeroed in (False, True):
        held = {}

        def empty(_, __, output):
            first = first_tensor(output)
            return (torch.zeros_like(first), *output[1:])

        def keep(_, args, held=held):
            held["x"] = args[0].detach()

        hooks = [block.post_attention_layernorm.register_forward_pre_hook(keep)]
        if zeroed:
            hooks.append(block.self_attn.register_forward_hook(empty))
        model.logits(model.collate([item]))
        for hook in hooks:
            hook.remove()
        found.append(held["x"][0].double().numpy())
    return found


def test_a_row_is_the_mean_over_the_text_of_what_the_layers_attention_adds(memes):
    store = store_of(memes.extracted)
    model = load_model(str(memes.folder / "llava"), dtype="float32", device="cpu")
    for i in (0, 7, N - 1):
        record = store.examples()[i]
        image = str(memes.folder / "pictures" / f"{i}.png")
        (item,) = model.tokenize([Example(f"m{i}", record["prompt"], image=image)])
        behind = np.flatnonzero(item.roles == ROLES.index("image"))[-1] + 1
        text = [t for t in range(behind, len(item.ids)) if not item.special[t]]
        assert record["pooled_tokens"] == [text[0], text[-1] + 1]
        for layer in LAYERS:
            on, off = without_attention(model, item, layer)
            wanted = (on - off)[text].mean(axis=0)
            np.testing.assert_allclose(rows_of(store, layer)[i], wanted, rtol=1e-4, atol=1e-5)


def test_the_store_says_what_it_holds_and_where_each_row_comes_from(memes):
    store = store_of(memes.extracted)
    assert store.contrast == {"method": "zero_attention", "scope": "per_layer"}
    assert (store.dtype, store.n_rows) == ("float32", N)
    assert {store.site(layer).part for layer in LAYERS} == {"post_attn_resid"}
    assert store.shard(0, 0).dtype == torch.float32
    for i, record in enumerate(store.examples()):
        picture = memes.folder / "pictures" / f"{i}.png"
        assert record["image_hash"] == fsio.digest(picture)
        assert record["prompt_hash"] == fsio.digest_bytes(record["text"].encode())
        assert (record["example_id"], record["label"]) == (f"m{i}", i % 2 == 0)
    facts = fsio.read_json(memes.extracted / "metadata.json")
    assert facts["config"]["extract"]["contrast"]["method"] == "zero_attention"
    assert facts["inputs"]["data"].keys() == {"examples", "xxh3_128", "images_xxh3_128"}
    assert {"versions", "git_sha"} <= facts.keys()
    listed = memes.run("store", "list", memes.extracted)
    assert "contrast zero_attention, per_layer" in listed


def test_the_documents_three_commands_work_as_they_are_written(memes):
    root = f"run.root={memes.folder / 'artifacts'}"
    memes.run(
        "extract", "-c", CONFIGS / "extract_vlm.yaml", *memes.data, root, "extract.layers=[0,2]",
        "extract.pooling.name=text_only_mean", "extract.limit_examples=40",
    )  # fmt: skip
    memes.run(
        "train", "-c", CONFIGS / "train_vlm.yaml", root, "layers=[0,2]", "sae.latent_ratio=4.0",
        "sae.topk=8", "train.max_steps=120", "train.log_every=20", "train.eval_every=40",
    )  # fmt: skip
    memes.run(
        "eval", "-c", CONFIGS / "eval_vlm.yaml", root, "eval.layers=[0,2]", "eval.topk_latents=50",
        "intervention.enabled=true", "intervention.counts=[1,2]", "intervention.max_new_tokens=4",
        "eval.permutations=100", "eval.boots=100", "intervention.prompts=8", "eval.baselines=false",
    )  # fmt: skip
    (extracted,) = (memes.folder / "artifacts/extract").iterdir()
    assert store_of(extracted).n_rows == 40
    (trained,) = (memes.folder / "artifacts/sae").iterdir()
    for layer in LAYERS:
        check_trained(trained / f"layer_{layer}", store_of(extracted), layer)
    (judged,) = (memes.folder / "artifacts/eval").iterdir()
    summary = fsio.read_json(judged / "summary.json")
    assert set(summary["layers"]) == {"0", "2"}
    assert (judged / "summary.md").read_text().strip()
    for layer in LAYERS:
        head, *lines = (judged / f"layer_{layer}.csv").read_text().splitlines()
        assert {"dfreq", "dmag", "auroc", "kl", "consensus"} <= set(head.split(","))
        assert lines
    assert any((judged / "intervention").iterdir())


def check_trained(folder, store, layer):
    """Check an SAE's files against its rows: scaler, log and metrics."""
    sae = load_sae(folder)
    assert (sae.d_in, sae.d_sae) == (store.d_in, 4 * store.d_in)
    assert sae.metadata["contrast"] == store.contrast
    scaler = fsio.read_json(folder / "scaler.json")
    assert scaler["normalize"] == "per_dimension"
    assert scaler["n_rows"] == 38  # 5 % of 40 examples are held out
    steps = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] <= 120
    metrics = fsio.read_json(folder / "metrics.json")
    wanted = {"fvu", "explained_variance", "l0_mean", "dead_share", "always_on_share"}
    assert wanted <= metrics.keys()
    assert (
        "contrasts h_on - h_off (zero_attention, per_layer)" in metrics["loss_recovered_left_out"]
    )
    x = torch.from_numpy(rows_of(store, layer))
    assert (sae.encode(x) > 0).sum(dim=1).max() <= 8


@pytest.mark.slow
def test_a_contrast_in_worker_processes_has_the_same_bytes(memes):
    folder = memes.folder / "by_two"
    memes.run(*memes.extract(folder, "engine.workers=2"))
    assert bytes_of(folder) == bytes_of(memes.extracted)


def test_a_contrast_killed_again_and_again_ends_with_the_same_bytes(memes):
    folder = memes.folder / "killed"
    kills = 0
    while memes.saefty(*memes.extract(folder), die_at=23).code != 0:
        kills += 1
        assert kills < 30
    assert kills >= 3
    assert bytes_of(folder) == bytes_of(memes.extracted)


def test_a_resume_with_a_changed_picture_is_refused_and_with_it_put_back_goes_on(memes):
    folder, copy = memes.folder / "changed", memes.folder / "pictures" / "3.png"
    assert memes.saefty(*memes.extract(folder), die_at=23).code != 0
    before = copy.read_bytes()
    copy.write_bytes((memes.folder / "pictures" / "4.png").read_bytes())
    result = memes.saefty(*memes.extract(folder))
    copy.write_bytes(before)
    assert result.code != 0
    assert "images_xxh3_128" in result.err
    memes.run(*memes.extract(folder))
    assert bytes_of(folder) == bytes_of(memes.extracted)


def test_npz_files_are_named_as_the_document_has_them_and_come_back(memes):
    out, back = memes.folder / "npz", memes.folder / "back"
    memes.run("store", "export", memes.extracted, "--format", "npz", "--out", out)
    assert sorted(path.name for path in out.iterdir())[:2] == [
        "layer_0_shard_00000.npz", "layer_0_shard_00001.npz",
    ]  # fmt: skip
    with np.load(out / "layer_2_shard_00000.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["delta"], rows_of(store_of(memes.extracted), 2)[:6])
        assert file["example_id"].tolist() == [f"m{i}" for i in range(6)]
    memes.run("store", "import", out, "--out", back, "--hook-point", "post_attn_resid")
    assert store_of(back).contrast == store_of(memes.extracted).contrast
    for layer in LAYERS:
        one, other = (rows_of(store_of(folder), layer) for folder in (memes.extracted, back))
        np.testing.assert_array_equal(one, other)


PEAK = """
import sys
from saefty.cli import main
sys.argv[0] = "saefty"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_kb(command):
    """Return the peak memory of a process that runs a command and nothing else."""
    words = [sys.executable, "-c", PEAK, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=CHILDREN)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_times_the_memes_take_no_more_memory(tmp_path, monkeypatch):
    # Pictures as large as real ones are read: 0.6 MB each in float32, were they kept.
    monkeypatch.setattr(tiny_vlms, "SIDE", 224)
    monkeypatch.setattr(tiny_vlms, "PATCH", 56)
    monkeypatch.setitem(tiny_vlms.VISION, "image_size", 224)
    monkeypatch.setitem(tiny_vlms.VISION, "patch_size", 56)
    model = tiny_vlms.build("llava", tmp_path / "llava")
    peaks = []
    for n in (90, 900):
        table = write_memes(tmp_path / str(n), n, side=224)
        peaks.append(
            peak_kb(
                ["extract", f"model.name={model}", "model.dtype=float32", "model.device=cpu",
                 f"data.path={table}", "data.prompt=instruction", "data.image=image_path",
                 "extract.layers=[0,2]", "extract.hook_point=post_attn_resid",
                 "extract.contrast.method=knockout", "extract.pooling.name=text_only_mean",
                 "extract.token_budget=512", "extract.save.shard_size=30",
                 f"run.dir={tmp_path / f'x{n}'}"]
            )
        )  # fmt: skip
    assert peaks[1] <= 1.05 * peaks[0], peaks


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("extract_vlm", ExtractConfig),
        ("extract_vlm_sandbox", ExtractConfig),
        ("train_vlm", TrainConfig),
        ("eval_vlm", EvalConfig),
    ],
)
def test_every_shipped_configuration_of_pictures_loads(name, config):
    loaded = load_config(config, CONFIGS / f"{name}.yaml")
    assert loaded.run.dir is None  # below artifacts/, as its last line says
    if config is ExtractConfig:
        assert loaded.extract.hook_point == "post_attn_resid"
        assert loaded.extract.pooling.name == "text_only_mean"
