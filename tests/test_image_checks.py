"""Bad images on the way into a model: counted with their reasons, and too many are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_models
import tiny_vlms
from saefty.errors import InputError, MismatchError
from saefty.image_checks import check_bad_images, check_same_images
from saefty.reading import ReadingSection, prepare
from saefty.reading_settings import PoolingSection
from saefty.records import Example
from saefty.stages import extract
from saefty.stages.base import data_inputs

BAD = ("missing", "empty", "cut", "text")


@pytest.fixture(scope="module")
def model():
    return tiny_vlms.load("llava")


@pytest.fixture
def examples(tmp_path):
    """Twelve good images and four bad ones, the bad ones first."""
    draw = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        pixels = draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    (pictures / "empty.png").touch()
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:300])
    (pictures / "text.png").write_text("no image")
    names = (*BAD, *map(str, range(12)))
    return [
        Example(name, "How do I bake bread?", image=str(pictures / f"{name}.png")) for name in names
    ]


def section(**keys):
    return ReadingSection(pooling=PoolingSection(name="text_only_mean"), **keys)


def test_bad_images_are_counted_and_named_with_their_reason(model, examples):
    reading = prepare(model, examples, section(max_bad_images=0.25))
    assert reading.ledger.as_record()["skipped"] == {"bad_image": 4}
    assert reading.ledger.ok == 12
    records = list(reading.records())
    reasons = {one["example_id"]: one["reason"] for one in records if "reason" in one}
    assert reasons.keys() == set(BAD)
    for name, words in zip(
        BAD, ("no such file", "is empty (0 bytes)", "is cut off", "not an image"), strict=True
    ):
        assert words in reasons[name]
    assert [one["status"] for one in records] == ["bad_image"] * 4 + ["ok"] * 12


def test_more_than_the_cap_is_an_error_that_says_how_many_which_and_what_to_do(model, examples):
    with pytest.raises(InputError) as error:
        prepare(model, examples, section())
    message = error.value.message
    assert message.startswith("4 of 16 images cannot be read (25.00%), more than ")
    assert "extract.max_bad_images=0.01 allows: example missing: " in message
    assert message.endswith("; and 1 more.")
    assert "set extract.max_bad_images=0.25 to leave these examples out" in error.value.then
    with pytest.raises(InputError, match="4 of 16"):
        prepare(model, examples, section(max_bad_images=0.24))


def test_markers_that_do_not_fit_are_no_fault_of_the_files_and_it_is_said(model, examples):
    good = examples[4:]
    twice = [replace(one, prompt="<image> or <image>?") for one in good]
    with pytest.raises(InputError) as error:
        prepare(model, twice, section())
    assert error.value.message.startswith("12 of 12 images do not fit their texts (100.00%), more")
    assert "its text has 2 image markers (<image>) for one image" in error.value.message
    assert error.value.then.startswith("The files may be fine. Write the image's marker once")
    assert "Put the files right" not in error.value.then
    with pytest.raises(
        InputError, match=r"3 of 13 images cannot be read or \(2 of them\) do not"
    ) as error:
        prepare(model, [*twice[:2], examples[0], *good[:10]], section())
    assert "Put the files right" in error.value.then
    assert "Write the image's marker once" in error.value.then
    assert error.value.then.endswith("or set extract.max_bad_images=0.2308 to leave these "
                                     "examples out.")  # fmt: skip


def test_a_marker_without_an_image_is_named_where_nothing_can_be_read(model):
    with pytest.raises(InputError, match="none of the 2 examples can be read") as error:
        prepare(model, [Example(str(i), "see <image>") for i in range(2)], section())
    then = error.value.then
    assert "its text has 1 image markers (<image>), the example no image" in then
    assert "out of texts without an image" in then
    assert "what is wrong with the images" not in then


def test_an_image_behind_the_text_leaves_nothing_to_average_and_it_is_said(model, examples):
    last = [replace(one, prompt="How is bread baked? <image>", raw=True) for one in examples[4:]]
    with pytest.raises(InputError, match="no_tokens 12") as error:
        prepare(model, last, section())
    then = error.value.then
    assert then.startswith("The image is last in these texts, and extract.pooling.name=text_only_m")
    assert "Check extract.pooling" not in then
    assert prepare(model, last, ReadingSection(pooling=PoolingSection(name="eos"))).ledger.ok == 12
    first = replace(last[0], prompt="<image> How is bread baked?")
    records = list(prepare(model, [first, *last], section()).records())
    assert [one["status"] for one in records] == ["ok"] + ["no_tokens"] * 12
    assert "reason" not in records[0]
    assert records[1]["reason"] == "its image is last: no text stands behind it"


@pytest.mark.parametrize("images", [7, 100, 999, 30_001])
def test_the_share_that_is_advised_is_enough(images):
    for bad in (1, images // 3, images - 1, images):
        named = {str(i): "gone" for i in range(bad)}
        with pytest.raises(InputError) as error:
            check_bad_images(named, images, section(max_bad_images=0))
        advised = float(error.value.then.split("max_bad_images=")[1].split()[0])
        check_bad_images(named, images, section(max_bad_images=min(advised, 1.0)))
        assert advised < bad / images + 2e-4


def test_the_share_is_of_images_not_of_examples(model, examples):
    texts = [Example(f"t{i}", "Mix flour.") for i in range(100)]
    with pytest.raises(InputError, match="4 of 16 images"):
        prepare(model, [*texts, *examples], section(max_bad_images=0.1))


def test_all_images_bad_is_an_error_even_where_all_may_be(model, examples):
    with pytest.raises(InputError, match="none of the 4 examples can be read") as error:
        prepare(model, examples[:4], section(max_bad_images=1))
    assert "saefty data show" in error.value.then


def test_a_model_of_texts_refuses_images_instead_of_ignoring_them(examples):
    text_model = tiny_models.load("llama")
    with pytest.raises(MismatchError, match="example missing has an image, but .* texts") as error:
        prepare(text_model, examples, section())
    assert "leave data.image out" in error.value.then
    prepare(text_model, [replace(one, image=None) for one in examples], section())


def test_a_dataset_without_images_keeps_the_checksum_it_had():
    given = [Example("a", "x", label=True), Example("b", "y", group="g")]
    assert data_inputs(given) == {
        "examples": 2,
        "xxh3_128": "b26ef973dbaffb918ba81be552a31eaa",
    }


def test_the_checksum_follows_the_images_content_and_not_its_place(examples, tmp_path):
    good = examples[4:]
    first = data_inputs(good)
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "pictures", moved)
    there = [replace(one, image=str(moved / f"{one.id}.png")) for one in good]
    assert data_inputs(there) == first
    pixels = np.asarray(Image.open(there[3].image)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(there[3].image)
    changed = data_inputs(there)
    assert changed["xxh3_128"] == first["xxh3_128"]
    assert changed["images_xxh3_128"] != first["images_xxh3_128"]
    assert data_inputs([replace(good[0], image=None), *good[1:]])["xxh3_128"] != first["xxh3_128"]
    assert data_inputs(good[::-1])["images_xxh3_128"] != first["images_xxh3_128"]


def test_examples_whose_images_changed_since_they_were_read_are_refused(model, examples):
    records = list(prepare(model, examples, section(max_bad_images=0.25)).records())
    check_same_images(records)
    Path(examples[0].image).write_bytes(b"bad before, and bad now")  # was left out
    check_same_images(records)
    Path(examples[4].image).unlink()
    Image.new("RGB", (30, 20), "red").save(examples[5].image)
    with pytest.raises(MismatchError, match="2 examples have other images .* or none: 0: .*; 1: "):
        check_same_images(records)
    check_same_images([{key: one[key] for key in one if key != "image_hash"} for one in records])


def test_a_run_leaves_bad_images_out_and_one_whose_image_changed_is_refused(
    model, examples, tmp_path
):
    def run():
        cfg = extract.ExtractConfig.model_validate(
            {
                "model": {"name": model.name},
                "data": {"name": "python"},
                "extract": {
                    "layers": [1],
                    "pooling": {"name": "text_only_mean"},
                    "max_bad_images": 0.3,
                },
                "run": {"dir": str(tmp_path / "run")},
            }
        )
        return extract.run(cfg, model=model, examples=examples)

    assert run().figures["examples"]["skipped"] == {"bad_image": 4}
    assert run().figures["rows"] == 12
    table = (tmp_path / "run" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("reason" in json.loads(line) for line in table) == 4
    Image.new("RGB", (30, 20), "red").save(examples[-1].image)
    with pytest.raises(MismatchError, match="images_xxh3_128"):
        run()
