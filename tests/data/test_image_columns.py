"""Columns of images: by path beside the data file, as bytes, as the hub's feature, as objects."""

import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import saefty as sf
from data.published_rows import as_csv, as_jsonl, as_parquet
from saefty.data.base import DATASETS, DataSection, Row, load_examples
from saefty.errors import InputError
from saefty.images import BadImageError, load_image

COLOURS = ("red", "lime", "blue")


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Where images that are no files are kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "saefty" / "images"


@pytest.fixture
def pictures(tmp_path):
    """Three images in a folder beside the data file."""
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (8, 4), colour).save(tmp_path / "pictures" / f"{colour}.png")
    return tmp_path / "pictures"


def rows_of(cells):
    return [{"prompt": f"p{i}", "image": cell} for i, cell in enumerate(cells)]


def shown(example):
    """Return the one colour of an example's image."""
    (colour,) = {tuple(pixel) for row in np.asarray(load_image(example.image)) for pixel in row}
    return {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}[colour]


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", as_jsonl), ("a.csv", as_csv), ("a.parquet", as_parquet)],
)
def test_paths_lie_beside_the_data_file_wherever_one_stands(
    tmp_path, pictures, monkeypatch, name, write
):
    write(tmp_path / name, rows_of(f"pictures/{colour}.png" for colour in COLOURS))
    for path in (tmp_path / name, name):
        monkeypatch.chdir(tmp_path if path == name else "/")
        found = load_examples(DataSection(path=str(path), prompt="prompt", image="image"))
        monkeypatch.chdir("/")
        assert [shown(one) for one in found] == list(COLOURS)
        assert [one.prompt for one in found] == ["p0", "p1", "p2"]


def test_the_python_call_takes_the_column_too(tmp_path, pictures):
    as_jsonl(tmp_path / "a.jsonl", rows_of(["pictures/red.png"]))
    (found,) = sf.dataset(str(tmp_path / "a.jsonl"), prompt="prompt", image="image")
    assert shown(found) == "red"


def test_files_of_two_folders_have_their_images_beside_them(tmp_path):
    for folder, colour in (("x", "red"), ("y", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 4), colour).save(tmp_path / folder / "same.png")
        as_jsonl(tmp_path / folder / "a.jsonl", rows_of(["same.png"]))
    files = tuple(str(tmp_path / folder / "a.jsonl") for folder in "xy")
    found = load_examples(DataSection(files=files, image="image"))
    assert [shown(one) for one in found] == ["red", "blue"]


def test_a_mixtures_parts_keep_their_images(tmp_path, pictures):
    as_jsonl(tmp_path / "a.jsonl", rows_of(["pictures/red.png", None]))
    as_jsonl(tmp_path / "b.jsonl", [{"text": "no image"}])
    parts = [
        {"path": str(tmp_path / "a.jsonl"), "image": "image", "part": "with"},
        {"path": str(tmp_path / "b.jsonl"), "part": "without"},
    ]
    found = load_examples(DataSection(name="mixture", mixture={"parts": parts}))
    with_image = [one for one in found if one.image]
    assert len(found) == 3
    assert [(one.id, shown(one)) for one in with_image] == [("with/0", "red")]


def test_an_absolute_path_an_empty_cell_and_a_missing_file_stay_what_they_are(tmp_path, pictures):
    cells = [str(pictures / "red.png"), None, "", "none.png", "https://example.org/a.png"]
    as_jsonl(tmp_path / "a.jsonl", rows_of(cells))
    found = [one.image for one in load_examples(DataSection(path=str(tmp_path / "a.jsonl"),
                                                            image="image"))]  # fmt: skip
    assert found == [cells[0], None, None, str(tmp_path / "none.png"), cells[4]]


def test_bytes_in_parquet_are_kept_as_files_once(tmp_path, pictures, kept):
    data = [(pictures / f"{colour}.png").read_bytes() for colour in (*COLOURS, "red")]
    as_parquet(tmp_path / "a.parquet", rows_of(data))
    found = load_examples(DataSection(path=str(tmp_path / "a.parquet"), image="image"))
    assert [shown(one) for one in found] == [*COLOURS, "red"]
    assert sorted(path.read_bytes() for path in kept.iterdir()) == sorted(set(data))


def test_the_hubs_feature_is_read_without_decoding_so_that_a_bad_one_stops_nothing(
    tmp_path, pictures
):
    good = (pictures / "red.png").read_bytes()
    cells = [
        {"bytes": good, "path": "red.png"},
        {"bytes": b"broken", "path": "b.png"},
        {"bytes": None, "path": str(pictures / "blue.png")},
        None,
    ]
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    (tmp_path / "repository").mkdir()
    made = datasets.Dataset.from_dict(
        {"prompt": list("abcd"), "image": cells}, features=features.copy()
    )
    pq.write_table(made.data.table, tmp_path / "repository" / "train.parquet")
    for name, path in (("local", "repository/train.parquet"), ("hub", "repository")):
        section = DataSection(name=name, path=str(tmp_path / path), prompt="prompt", image="image")
        found = load_examples(section)
        assert [shown(found[0]), shown(found[2]), found[3].image] == ["red", "blue", None]
        with pytest.raises(BadImageError, match="not an image"):
            load_image(found[1].image)


def test_a_list_of_one_image_is_that_image_and_of_two_an_error(tmp_path, pictures):
    as_jsonl(tmp_path / "a.jsonl", rows_of([["pictures/red.png"], []]))
    found = load_examples(DataSection(path=str(tmp_path / "a.jsonl"), image="image"))
    assert [shown(found[0]), found[1].image] == ["red", None]
    as_jsonl(tmp_path / "a.jsonl", rows_of([["a.png"], ["a.png", "b.png"]]))
    with pytest.raises(InputError, match=r"row 1 .*'image' .*holds 2 images"):
        load_examples(DataSection(path=str(tmp_path / "a.jsonl"), image="image"))


def test_what_is_no_image_names_the_row(tmp_path):
    as_jsonl(tmp_path / "a.jsonl", rows_of(["a.png", 7]))
    with pytest.raises(InputError, match=r"row 1 .*holds a int, not an image") as error:
        load_examples(DataSection(path=str(tmp_path / "a.jsonl"), image="image"))
    assert "bytes" in error.value.then


def test_rows_of_python_may_hold_pillow_images(monkeypatch, kept):
    def rows(_):
        for colour in COLOURS:
            yield Row(prompt=colour, image=Image.new("RGB", (8, 4), colour))

    monkeypatch.setitem(DATASETS._entries, "mine", rows)
    found = load_examples(DataSection(name="mine"))
    assert [shown(one) for one in found] == list(COLOURS)
    assert len(list(kept.iterdir())) == 3


def test_a_relative_path_of_the_hub_says_how_to_get_the_files(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows_of(["images/a.png"]))
    with pytest.raises(InputError, match=r"names the image 'images/a\.png'") as error:
        load_examples(DataSection(name="hub", path="some/one", image="image"))
    assert "--local-dir FOLDER" in error.value.then


def test_images_in_a_column_nobody_named_are_told_of_and_not_held(tmp_path, caplog, kept):
    as_parquet(tmp_path / "a.parquet", rows_of([b"x" * 100] * 3))
    logging.getLogger("saefty").propagate = True  # a command in this process may have cut it off
    with caplog.at_level(logging.WARNING):
        found = load_examples(DataSection(path=str(tmp_path / "a.parquet"), prompt="prompt"))
    assert [one.image for one in found] == [None] * 3
    assert caplog.text.count("data.image=image reads them") == 1
    assert not kept.exists()


def test_a_dataset_of_images_takes_no_more_memory_than_its_paths(tmp_path):
    import tracemalloc

    def peak(times):
        rows = [{"prompt": "p", "image": bytes([i % 256]) * (1 << 18)} for i in range(times)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
        del rows
        tracemalloc.start()
        found = load_examples(DataSection(path=str(tmp_path / "a.parquet"), image="image"))
        assert len(found) == times
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(160) < 24 << 20  # of 40 MiB of images


def test_a_misspelt_column_of_images_names_the_nearest(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "image": "a.png"}) + "\n")
    with pytest.raises(InputError, match=r"'imgae' \(data\.image\).*Did you mean 'image'"):
        load_examples(DataSection(path=str(tmp_path / "a.jsonl"), prompt="prompt", image="imgae"))
