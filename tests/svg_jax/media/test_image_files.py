"""Image files of every usual format, and those that are none, bombs, damaged, or would wait."""

import io
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import pytest
from diffusers.utils import load_image

from svg_jax.media.image_files import open_image
from svg_jax.media.images import as_image, with_images_read

RNG = np.random.default_rng(0)
PICTURE = PIL.Image.fromarray(RNG.integers(0, 256, (24, 40, 3)).astype(np.uint8))
FORMATS = ["png", "jpeg", "webp", "bmp", "gif", "tiff"]
FORMATS += ["avif"] if PIL.features.check("avif") else []


def png(width, height, data=b"", depth=8, colour=2):
    """A PNG's bytes whose header says one thing and whose content may be another."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def as_bytes(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_files_are_read_as_by_diffusers(name, mode, tmp_path):
    path = tmp_path / "any.name"  # the content tells the format
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    options = {} if name in ("bmp", "gif", "tiff") else {"exif": exif}
    path.write_bytes(as_bytes(PICTURE.convert(mode), name, **options))
    with PIL.Image.open(path) as image:
        expected = np.asarray(load_image(image))
    for found in (
        open_image(path),
        as_image(str(path)),
        with_images_read({"image": path})["image"][0],
    ):
        np.testing.assert_array_equal(np.asarray(found), expected)
    assert expected.shape == ((40, 24, 3) if options else (24, 40, 3))


def test_a_second_eye_in_a_jpeg_is_not_looked_at(tmp_path):
    other = PIL.Image.new("RGB", PICTURE.size)
    PICTURE.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other])
    with PIL.Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(load_image(image))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.jpg")), expected)


def hostile_files():
    jpeg = as_bytes(PICTURE, "jpeg")
    noise = RNG.integers(0, 256, (200, 200, 3)).astype(np.uint8)
    large = as_bytes(PIL.Image.fromarray(noise), "png")
    moving = {"save_all": True, "append_images": [PICTURE.rotate(180)], "duration": 100}
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch hacked) (w) file\n"
    return {
        "a bomb": (png(65535, 65535, bytes(100), 1, 0), "has over 89,478,485 pixels"),
        "a smaller bomb": (png(12000, 9000), "has over 89,478,485 pixels"),
        "a claim": (png(9400, 9400), "cannot be read as an image: "),
        "cut off": (large[:-3000], "cannot be read as an image: "),
        "a cut-off jpeg": (jpeg[: len(jpeg) // 2], "cannot be read as an image: "),
        "a cut-off header": (jpeg[:20], "is no image|cannot be read"),
        "flipped bits": (large[:60] + bytes(40) + large[100:], "cannot be read as an image: "),
        "nothing": (b"", "is empty"),
        "text": (b"\x1b[31mred\x07" * 9, r"is no image \(PNG, JPEG, WEBP"),
        "EPS": (eps, "is no image"),
        "PPM": (as_bytes(PICTURE, "ppm"), "is no image"),
        "PDF": (as_bytes(PICTURE, "pdf"), "is no image"),
        "a moving GIF": (as_bytes(PICTURE, "gif", **moving), "it has several pictures"),
        "a moving PNG": (as_bytes(PICTURE, "png", **moving), "it has several pictures"),
        "a moving WebP": (as_bytes(PICTURE, "webp", **moving), "it has several pictures"),
        "TIFF of pages": (as_bytes(PICTURE, "tiff", **moving), "it has several pictures"),
        "no known range": (as_bytes(PIL.Image.new("F", (4, 4)), "tiff"), "has no known range"),
    }


HOSTILE = hostile_files()


@pytest.mark.parametrize("name", HOSTILE)
def test_other_files_are_one_sentence_and_little_memory(name, tmp_path):
    content, sentence = HOSTILE[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=sentence) as caught:
            open_image(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.removeprefix(str(path))) < 300
    assert message.isprintable()
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    start = time.monotonic()
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match="is no file but a"):
            as_image(path)
    for address in ("https://example.org/cat.png", Path("https://example.org/cat.png")):
        with pytest.raises(FileNotFoundError, match="is an address: download the image first"):
            as_image(address)
    assert time.monotonic() - start < 5


def test_a_large_photograph_is_read(tmp_path):
    """50 million pixels, as cameras have; Pillow's own limit is what counts."""
    PIL.Image.new("L", (10, 10), 99).save(tmp_path / "small.png")
    (tmp_path / "a.png").write_bytes(png(8000, 6000, bytes(6000 * 1001), 1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").size == (8000, 6000)
