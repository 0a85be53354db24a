"""Every image that can be bad is refused with its reason; every other one is the same picture."""

import io
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from saefty.images import (
    FORMATS,
    MAX_PIXELS,
    BadImageError,
    image_facts,
    load_image,
)

WIDTH, HEIGHT = 24, 16
LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")


def noise(*channels, seed=0):
    shape = (HEIGHT, WIDTH, *channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, form, **more):
    out = io.BytesIO()
    lossless = {"lossless": True} if form == "WEBP" else {}
    image.save(out, format=form, **lossless, **more)
    return out.getvalue()


def chunk(name, data):
    whole = name + data
    return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))


def png_of_size(width, height):
    """A few bytes that announce an image of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.fixture
def file(tmp_path):
    def write(data, name="a.png"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


PLAIN = Image.fromarray(noise(3))


def bad(path):
    with pytest.raises(BadImageError) as error:
        load_image(path)
    return error.value


# What is refused


def test_a_missing_file(tmp_path):
    error = bad(tmp_path / "none.png")
    assert error.message == f"{tmp_path / 'none.png'}: there is no such file"
    assert error.kind == "there is no such file"


def test_a_folder(tmp_path):
    assert bad(tmp_path).kind == "is a folder"


def test_zero_bytes(file):
    assert bad(file(b"")).message.endswith("a.png: is empty (0 bytes)")


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere_is_refused_or_whole(file, form):
    data = encoded(PLAIN, form)
    whole = load_image(file(data)).tobytes()
    kinds = set()
    for end in range(1, len(data), 17):
        try:
            picture = load_image(file(data[:end]))
        except BadImageError as error:
            kinds.add(error.kind)
        else:  # only what stands behind the pixels is missing
            assert picture.tobytes() == whole
            assert end > len(data) - 32
    assert kinds <= {"is cut off", "is damaged", "is not an image of a known kind"}
    assert kinds & {"is cut off", "is damaged"}


def test_a_cut_jpeg_says_so(file):
    data = encoded(PLAIN, "JPEG")
    error = bad(file(data[:-100], "a.jpg"))
    assert error.kind == "is cut off"
    assert "truncated" in error.message


def test_damage_in_the_middle(file):
    data = bytearray(encoded(PLAIN, "PNG"))
    data[data.index(b"IDAT") + 20 :][:40] = b""
    data[data.index(b"IDAT") + 20] ^= 0xFF
    assert bad(file(bytes(data))).kind in ("is damaged", "is cut off")


def test_bytes_flipped_at_random_are_a_picture_or_a_reason_never_another_error(file):
    draw = np.random.default_rng(0)
    for form in FORMATS:
        data = encoded(PLAIN, form)
        for _ in range(40):
            changed = bytearray(data)
            for at in draw.integers(0, len(data), 3):
                changed[at] = draw.integers(0, 256)
            try:
                picture = load_image(file(bytes(changed)))
            except BadImageError:
                continue
            assert picture.mode == "RGB"


def test_a_text_called_png(file):
    error = bad(file(b"not an image at all"))
    assert error.kind == "is not an image of a known kind"
    assert "b'not an image'" in error.message
    assert "PNG, JPEG" in error.message


def test_postscript_which_would_run_a_program(file):
    assert bad(file(encoded(PLAIN, "EPS"), "a.eps")).kind == "is not an image of a known kind"


@pytest.mark.parametrize(
    "address",
    ["https://example.org/a.png", "hf://datasets/a/b.png", "data:image/png;base64,AAAA"],
)
def test_an_address_is_never_fetched(monkeypatch, address):
    def refuse(*_, **__):
        raise AssertionError("a connection was made")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert "is an address, and images are read from files only" in bad(address).message


def test_a_name_that_no_file_can_have(tmp_path):
    assert bad(f"{tmp_path}/{'x' * 5000}").kind == "cannot be read"
    assert bad(f"{tmp_path}/a\0b").kind == "cannot be read"
    assert len(bad(f"{tmp_path}/{'x' * 5000}").message) < 250


def test_a_pipe_which_would_never_end(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert bad(tmp_path / "a.png").kind == "is not a regular file"


def test_a_file_nobody_may_read(file, monkeypatch):
    path = file(encoded(PLAIN, "PNG"))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert bad(path).message.endswith("cannot be read (Permission denied)")


@pytest.mark.parametrize("size", [(8193, 8192), (20000, 10000), (50000, 50000), (1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(file, size):
    error = bad(file(png_of_size(*size)))
    assert error.kind == "is too large"
    assert f"{size[0] * size[1]:,} pixels, at most {MAX_PIXELS:,}" in error.message


def test_the_limit_is_ours_whatever_pillows_is(file, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert bad(file(png_of_size(50000, 50000))).kind == "is too large"
    monkeypatch.setattr("saefty.images.MAX_PIXELS", WIDTH * HEIGHT)
    path = file(encoded(PLAIN, "PNG"))
    assert load_image(path).size == (WIDTH, HEIGHT)
    monkeypatch.setattr("saefty.images.MAX_PIXELS", WIDTH * HEIGHT - 1)
    assert bad(path).kind == "is too large"


def test_a_bomb_is_refused_before_its_memory_is_taken(file):
    gif = encoded(PLAIN, "GIF")
    gif = gif[:6] + struct.pack("<HH", 11000, 11000) + gif[10:]
    paths = [file(png_of_size(11000, 11000)), file(gif, "a.gif")]
    code = """
import resource, sys
import numpy
from saefty.images import BadImageError, load_image
import PIL.GifImagePlugin, PIL.PngImagePlugin
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        load_image(path)
    except BadImageError as error:
        print(error.kind)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["is too large"] * 2, done.stderr


def test_a_file_of_too_many_bytes(file, monkeypatch):
    path = file(encoded(PLAIN, "PNG"))
    monkeypatch.setattr("saefty.images.MAX_BYTES", 100)
    assert "bytes, at most 100" in bad(path).message


def test_pixels_of_32_bits_have_no_agreed_white(file):
    deep = Image.fromarray(np.ones((4, 4), dtype=np.float32))
    assert bad(file(encoded(deep, "TIFF"))).kind == "has pixels of 32 bits"


# What is read, and as what


@pytest.mark.parametrize("form", LOSSLESS)
def test_content_decides_not_the_name(file, form):
    data = encoded(PLAIN, form)
    for name in ("a.png", "a.jpg", "a", "a.txt"):
        np.testing.assert_array_equal(np.asarray(load_image(file(data, name))), noise(3))
    assert image_facts(file(data)).format == form


def test_cmyk_becomes_rgb(file):
    ink = noise(4).astype(float)
    image = Image.fromarray(noise(4), mode="CMYK")
    found = np.asarray(load_image(file(encoded(image, "TIFF")))).astype(float)
    wanted = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    assert np.abs(found - wanted).max() <= 1
    facts = image_facts(file(encoded(image, "JPEG", quality=100), "a.jpg"))
    assert (facts.format, facts.mode) == ("JPEG", "CMYK")
    jpeg = load_image(file(encoded(image, "JPEG", quality=100), "a.jpg"))
    assert np.abs(np.asarray(jpeg).astype(float) - wanted).mean() < 8  # not inverted


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(file, form):
    rgba = noise(4)
    rgba[0] = (0, 0, 0, 0)
    found = np.asarray(load_image(file(encoded(Image.fromarray(rgba), form, exact=True))))
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    assert np.abs(found - (alpha * colour + (1 - alpha) * 255)).max() <= 1
    assert (found[0] == 255).all()


def test_grey_with_transparency(file):
    data = noise(2)
    found = np.asarray(load_image(file(encoded(Image.fromarray(data, mode="LA"), "PNG"))))
    grey, alpha = data[..., 0].astype(float), data[..., 1] / 255
    wanted = alpha * grey + (1 - alpha) * 255
    assert np.abs(found - wanted[..., None]).max() <= 1


def test_a_palette_with_a_transparent_colour(file):
    indices = noise() % 4
    palette = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200)]
    image = Image.fromarray(indices, mode="P")
    image.putpalette([value for colour in palette for value in colour])
    plain = np.asarray(load_image(file(encoded(image, "PNG"))))
    np.testing.assert_array_equal(plain, np.array(palette)[indices])
    clear = np.asarray(load_image(file(encoded(image, "PNG", transparency=1))))
    palette[1] = (255, 255, 255)
    np.testing.assert_array_equal(clear, np.array(palette)[indices])


def test_one_bit_and_a_transparent_colour_of_rgb(file):
    bits = noise() > 127
    found = np.asarray(load_image(file(encoded(Image.fromarray(bits), "PNG"))))
    np.testing.assert_array_equal(found, np.where(bits, 255, 0)[..., None].repeat(3, 2))
    rgb = noise(3)
    rgb[:4] = (1, 2, 3)
    keyed = load_image(file(encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3))))
    assert (np.asarray(keyed)[:4] == 255).all()
    np.testing.assert_array_equal(np.asarray(keyed)[4:], rgb[4:])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_high_byte_and_do_not_turn_white(file, form):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (HEIGHT, WIDTH)).astype(np.uint16)
    found = np.asarray(load_image(file(encoded(Image.fromarray(deep), form))))
    np.testing.assert_array_equal(found, (deep // 256)[..., None].repeat(3, 2))


def test_of_an_animation_the_first_frame_is_read(file):
    frames = [Image.fromarray(noise(seed=i)).convert("P") for i in range(3)]
    more = {"save_all": True, "append_images": frames[1:], "duration": 100}
    for form in ("GIF", "PNG"):
        path = file(encoded(frames[0], form, **more))
        assert image_facts(path).animated
        np.testing.assert_array_equal(load_image(path), frames[0].convert("RGB"))
    assert not image_facts(file(encoded(frames[0], "GIF"))).animated


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_exif_says_which_way_up_and_only_once(file, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = file(encoded(PLAIN, form, exif=exif.tobytes()))
    found = load_image(path)
    with Image.open(path) as stored:
        wanted = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(found, wanted)
    assert found.size == ((HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))
    # What turns pictures by their EXIF as well finds nothing to turn.
    np.testing.assert_array_equal(ImageOps.exif_transpose(found), wanted)
    assert not found.info


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_an_exif_that_cannot_be_read_leaves_the_picture(file, exif):
    found = load_image(file(encoded(PLAIN, "WEBP", exif=exif)))
    np.testing.assert_array_equal(found, noise(3))


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused(file):
    info = PngInfo()
    info.add_text("a", "\0" * (20 << 20), zip=True)
    assert bad(file(encoded(PLAIN, "PNG", pnginfo=info))).kind == "is damaged"


def test_a_small_picture_takes_little_memory_however_often_it_is_read(file):
    path = file(encoded(PLAIN.resize((1000, 1000)), "BMP"))
    for _ in range(3):
        load_image(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        load_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
