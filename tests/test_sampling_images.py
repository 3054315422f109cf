"""Images as frames and for CLIP, against diffusers' and transformers' own."""

import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
import transformers
from diffusers.video_processor import VideoProcessor

from svg_jax.sampling.images import (
    CLIPImageProcessor,
    as_frame,
    load_image_processor,
    open_image,
)

SIZES = [(40, 65), (65, 40), (33, 33), (300, 211)]  # rows and columns


def picture(height, width, mode="RGB"):
    rng = np.random.default_rng(height)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", SIZES)
def test_frames_are_those_of_diffusers(size):
    image = picture(*size)
    expected = VideoProcessor(vae_scale_factor=8).preprocess(image, height=48, width=64)
    for given in (image, np.asarray(image), np.asarray(image) / 255):
        found = as_frame(given, 48, 64)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[0].numpy())


def test_arrays_of_the_right_size_are_kept_as_they_are():
    pixels = np.random.default_rng(0).random((8, 16, 3))
    frame = as_frame(pixels, 8, 16)
    np.testing.assert_array_equal(frame, np.moveaxis(2 * pixels.astype(np.float32) - 1, -1, 0))
    image = picture(8, 16)
    np.testing.assert_array_equal(as_frame(np.asarray(image), 8, 16), as_frame(image, 8, 16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_have_three_colours(mode):
    image = picture(33, 40, mode)
    expected = as_frame(image.convert("RGB"), 16, 24)
    np.testing.assert_array_equal(as_frame(image, 16, 24), expected)


def test_transparency_of_a_palette_is_dropped(tmp_path):
    image = picture(33, 40, "P")
    image.save(tmp_path / "image.png", transparency=bytes(range(256)))
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "image.png")), expected)


def test_greys_of_16_bits_keep_their_range(tmp_path):
    greys = np.arange(256, dtype=np.uint16).reshape(16, 16)
    PIL.Image.fromarray(greys * 257).save(tmp_path / "image.png")
    found = np.asarray(open_image(tmp_path / "image.png"))
    np.testing.assert_array_equal(found, np.stack([greys] * 3, axis=-1))
    with pytest.raises(ValueError, match="an image of mode F has no known range"):
        as_frame(PIL.Image.fromarray(np.zeros((4, 4), np.float32)), 8, 8)


@pytest.mark.parametrize("pixels", [[[[-0.1] * 3]], [[[1.1] * 3]], [[[np.nan] * 3]]])
@pytest.mark.parametrize("height", [1, 2])
def test_arrays_that_are_no_images(pixels, height):
    with pytest.raises(ValueError, match="has values from 0 to 1"):
        as_frame(np.array(pixels), height, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("options", [{}, {"size": {"shortest_edge": 40}, "crop_size": 37}])
def test_clip_gets_what_transformers_makes(tmp_path, size, mode, options):
    height, width = size
    image = picture(height, width, mode)
    theirs: Any = transformers.CLIPImageProcessorPil(**options)
    theirs.save_pretrained(tmp_path)
    ours = load_image_processor(tmp_path)(image)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs(image, return_tensors="np").pixel_values[0])


def test_older_and_empty_settings(tmp_path):
    older = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}
    expected = CLIPImageProcessor(size=336, crop_size=336)
    assert CLIPImageProcessor.from_dict(older | {"do_resize": True}) == expected
    newer = {"size": {"shortest_edge": 336, "longest_edge": None}, "do_pad": None}
    newer |= {"crop_size": {"height": 336, "width": 336}}
    assert CLIPImageProcessor.from_dict(newer) == expected
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: cannot be read"):
        load_image_processor(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop=False is not implemented"),
        ({"size": {"height": 224, "width": 224}}, "size=.* is not implemented"),
        ({"crop_size": {"height": 224, "width": 200}}, "crop_size=.* is not implemented"),
        ({"crop_size": 225}, "crop_size=225 must be from 1 to the size of 224"),
        ({"resample": 9}, "resample=9 is no filter"),
        ({"image_processor_type": "ViTImageProcessor"}, "another image_processor_type"),
        ({"do_flip": True}, "unknown keys"),
    ],
)
def test_settings_that_are_not_implemented(tmp_path, changes, message):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=message):
        load_image_processor(tmp_path)


def test_files_are_turned_as_the_camera_was(tmp_path):
    image = picture(8, 16)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "image.png", exif=exif)
    turned = open_image(tmp_path / "image.png")
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match="is no image"):
        open_image(tmp_path / "no.png")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")
