"""Checksums of images, and the copies of those that are not files."""

import io

import numpy as np
import pytest
from PIL import Image

from saefty.images import (
    BadImageError,
    digest_or_none,
    image_digest,
    image_facts,
    keep_image,
    load_image,
)


def noise(*channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (16, 24, *channels), dtype=np.uint8)


def encoded(image, form, **more):
    out = io.BytesIO()
    image.save(out, format=form, **more)
    return out.getvalue()


PLAIN = Image.fromarray(noise(3))


@pytest.fixture
def file(tmp_path):
    def write(data, name="a.png"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def bad(path):
    with pytest.raises(BadImageError) as error:
        load_image(path)
    return error.value


def test_a_checksum_is_of_the_bytes_and_follows_the_file(file):
    path = file(encoded(PLAIN, "PNG"))
    first = image_digest(path)
    assert image_digest(path) == first
    assert image_digest(file(encoded(PLAIN, "PNG"), "b.png")) == first
    path.write_bytes(encoded(Image.fromarray(noise(3, seed=1)), "PNG"))
    assert image_digest(path) != first


def test_a_file_that_is_not_there_has_no_checksum(tmp_path):
    with pytest.raises(BadImageError, match="there is no such file"):
        image_digest(tmp_path / "none.png")
    assert digest_or_none(tmp_path / "none.png") is None
    assert digest_or_none(tmp_path) is None
    assert digest_or_none("https://example.org/a.png") is None


def test_a_file_that_did_not_change_is_read_once(file, monkeypatch):
    path = file(encoded(PLAIN, "PNG"))
    first = image_digest(path)

    def refuse(*_):
        raise AssertionError("it was read again")

    monkeypatch.setattr("saefty.fsio.digest", refuse)
    assert image_digest(path) == first


def test_bytes_are_kept_once_under_their_checksum(tmp_path):
    data = encoded(PLAIN, "JPEG")
    path = keep_image(data, tmp_path)
    assert path == str(tmp_path / image_digest(path))
    assert keep_image(data, tmp_path) == path
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [data]
    assert image_facts(path).format == "JPEG"


def test_bad_bytes_are_kept_too_and_refused_when_they_are_read(tmp_path):
    assert bad(keep_image(b"", tmp_path)).kind == "is empty"
    assert bad(keep_image(b"text", tmp_path)).kind == "is not an image of a known kind"


def test_a_pillow_image_is_kept_as_the_picture_a_file_of_it_would_give(file, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = encoded(Image.fromarray(noise(4)), "PNG", exif=exif.tobytes())
    for data in (rgba, encoded(Image.fromarray(noise(4), mode="CMYK"), "TIFF")):
        path = file(data)
        with Image.open(path) as image:
            kept = keep_image(image, tmp_path / "kept")
        np.testing.assert_array_equal(load_image(kept), load_image(path))


def test_a_pillow_image_that_cannot_be_decoded_says_why(file, tmp_path):
    with (
        Image.open(file(encoded(PLAIN, "PNG")[:200])) as image,
        pytest.raises(BadImageError, match=r"a\.png: is cut off"),
    ):
        keep_image(image, tmp_path)


def test_copies_lie_in_the_hubs_folder_of_assets(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    assert keep_image(b"x").startswith(str(tmp_path / "assets" / "saefty" / "images"))
