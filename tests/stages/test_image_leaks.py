"""Shortcuts in data of pictures: one question about all of them is no duplicate, a picture is."""

import json

import pytest

import tiny_vlms
from saefty.config import load_config
from saefty.stages import eval as evaluating
from saefty.stages import extract, probe, train
from vision_data import write_memes

N = 24
QUICK = ("permutations=100", "boots=100", "baselines=false")


@pytest.mark.parametrize(
    ("pictures", "leaks"), [(N, set()), (2, {"duplicates"})], ids=["all apart", "two of them"]
)
def test_eval_and_probe_compare_texts_together_with_their_images(tmp_path, pictures, leaks):
    memes, model = write_memes(tmp_path, N), tiny_vlms.load("llava")
    rows = [json.loads(line) for line in memes.read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        row["instruction"] = "What is meant?"
        row["image_path"] = f"pictures/{i % pictures}.png"
    memes.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = (
        f"model.name={tiny_vlms.folder_of('llava')}", f"data.path={memes}", "data.id=id",
        "data.prompt=instruction", "data.image=image_path", "data.label=sentiment",
        "data.harmful=[negative]", "extract.layers=[1]", "extract.pooling.name=text_only_mean",
        f"run.dir={tmp_path / 'x'}",
    )  # fmt: skip
    extract.run(load_config(extract.ExtractConfig, None, read), model=model)
    fit = (f"train.store={tmp_path / 'x'}", "sae.k=4", "train.max_steps=20",
           "train.batch_size=8", f"run.dir={tmp_path / 's'}")  # fmt: skip
    train.run(load_config(train.TrainConfig, None, fit))

    def words(stage):
        given = (f"sae={tmp_path / 's'}", f"store={tmp_path / 'x'}", *QUICK)
        return [f"{stage}.{word}" for word in given] + [f"run.dir={tmp_path / stage}"]

    config = load_config(
        evaluating.EvalConfig, None, (*words("eval"), "intervention.enabled=false")
    )
    evaluated = evaluating.run(config).figures["layers"]["1"]["leaks"]
    probed = probe.run(load_config(probe.ProbeConfig, None, words("probe"))).figures["leaks"]
    for found in (evaluated, probed):
        names = {leak["name"] for leak in found} & {"duplicates", "near_duplicates"}
        assert names == leaks
        said = " ".join(leak["message"] for leak in found)
        assert ("texts with their images" in said) == bool(leaks)
