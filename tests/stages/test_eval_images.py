"""eval of δ of pictures with instructions: prompts are read and replied to with their images."""

import pytest

import tiny_vlms
from saefty import fsio
from saefty.config import load_config
from saefty.errors import MismatchError
from saefty.judges.base import judge_record
from saefty.runs import read_metadata
from saefty.stages import extract, train
from saefty.stages.eval import EvalConfig, run
from vision_data import write_memes

N = 24
FAST = ("eval.permutations=100", "eval.boots=100", "eval.baselines=false",
        "intervention.counts=[1]", "intervention.latents=[2]", "intervention.prompts=4",
        "intervention.max_new_tokens=2", "intervention.judge=refusal")  # fmt: skip


def made(folder, method="zero_attention", scope="per_layer", layers="[1]"):
    """Extract a contrast of memes into x, train an SAE on it into s; return the model."""
    memes, model = write_memes(folder, N), tiny_vlms.load("llava")
    words = (
        f"model.name={tiny_vlms.folder_of('llava')}", f"data.path={memes}", "data.id=id",
        "data.prompt=instruction", "data.image=image_path", "data.label=sentiment",
        "data.harmful=[negative]", f"extract.layers={layers}", "extract.hook_point=post_attn_resid",
        f"extract.contrast.method={method}", f"extract.contrast.scope={scope}",
        "extract.pooling.name=text_only_mean", f"run.dir={folder / 'x'}",
    )  # fmt: skip
    extract.run(load_config(extract.ExtractConfig, None, words), model=model)
    words = (f"train.store={folder / 'x'}", "sae.k=4", "train.max_steps=20", "train.batch_size=8",
             f"run.dir={folder / 's'}")  # fmt: skip
    train.run(load_config(train.TrainConfig, None, words))
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, made(folder)


def evaluate(folder, out, model, *words):
    given = (f"eval.sae={folder / 's'}", f"eval.store={folder / 'x'}", f"run.dir={out}")
    return run(load_config(EvalConfig, None, (*given, *FAST, *words)), model=model)


@pytest.fixture(scope="module")
def evaluated(world):
    folder, model = world
    asked, generate = [], model.generate

    def watched(examples, **settings):
        asked.append(list(examples))
        return generate(examples, **settings)

    model.generate = watched
    try:
        outcome = evaluate(folder, folder / "r", model)
    finally:
        model.generate = generate
    return folder, model, outcome, asked


def test_prompts_of_both_labels_are_replied_to_with_their_images(evaluated):
    folder, model, _, asked = evaluated
    assert len(asked) >= 2
    for examples in asked:
        assert {example.label for example in examples} == {True, False}
        assert all(example.image and example.image.endswith(".png") for example in examples)
    lines = fsio.read_lines(folder / "r" / "intervention" / "layer_1" / "ungated.jsonl")
    assert [line["reply"] for line in lines] == model.generate(asked[0], max_new_tokens=2)


def test_the_report_says_how_well_the_sae_fits_single_tokens_and_warns(evaluated):
    folder, _, outcome, _ = evaluated
    gating = outcome.figures["layers"]["1"]["gating"]
    fit = gating["token_fit"]
    assert gating["site"] == "blocks.1.hook_post_attn_resid"
    trained = fsio.read_json(folder / "s" / "layer_1" / "metrics.json")["fvu"]
    assert fit["training_fvu"] == trained
    assert fit["far"] == (fit["fvu"] > 2 * trained or fit["fvu"] > trained + 0.2)
    text = (folder / "r" / "summary.md").read_text()
    assert f"variance unexplained of {fit['fvu']:.3f} (in training: {trained:.3f})" in text
    assert ("**Weak**" in text) == fit["far"]


def test_a_judge_whose_file_has_changed_is_another_run(world, tmp_path):
    folder, model = world
    words = tmp_path / "words.txt"
    words.write_text("no\n")
    judge = ("intervention.judge=lexicon", f"intervention.judge_options={{file: {words}}}")
    evaluate(folder, tmp_path / "r", model, *judge)
    recorded = read_metadata(tmp_path / "r")["inputs"]["judges"]
    assert recorded["behaviour"] == judge_record("lexicon", {"file": str(words)})
    words.write_text("no\nnever\n")
    with pytest.raises(MismatchError, match="judges"):
        evaluate(folder, tmp_path / "r", model, *judge)


def test_pictures_that_changed_since_the_extraction_are_not_replied_to(world, tmp_path):
    folder, model = world
    pictures = sorted((folder / "pictures").glob("*.png"))
    kept = {path: path.read_bytes() for path in pictures}
    try:
        for path, other in zip(pictures, reversed(pictures), strict=True):
            path.write_bytes(kept[other])
        with pytest.raises(MismatchError, match="examples have other images than when they were"):
            evaluate(folder, tmp_path / "r", model)
        with pytest.raises(MismatchError, match="examples have other images than when they were"):
            evaluate(folder, tmp_path / "s", model, "eval.baselines=true",
                     "intervention.enabled=false")  # fmt: skip
    finally:
        for path, held in kept.items():
            path.write_bytes(held)
