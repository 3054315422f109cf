"""Images as frames and for CLIP, against diffusers' and transformers' own."""

import io
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from diffusers.video_processor import VideoProcessor

from svg_jax.media.images import (
    CLIPImageProcessor,
    as_frame,
    images_of_each,
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


PIXELS = np.asarray(picture(24, 40))
FORMS = {
    "Pillow's": PIL.Image.fromarray(PIXELS),
    "int64": PIXELS.astype(np.int64),
    "float64": PIXELS / 255,
    "jax": jnp.asarray(PIXELS),
    "jax bfloat16": jnp.asarray(PIXELS / 255, jnp.bfloat16),
    "channels first": PIXELS.transpose(2, 0, 1),
    "torch": torch.tensor(PIXELS).permute(2, 0, 1) / 255,
    "torch with a gradient": torch.tensor(PIXELS / 255, requires_grad=True),
    "a batch of one": PIXELS[None],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(24, 40), (16, 16)])
def test_every_form_is_the_same_frame(form, size):
    expected = as_frame(PIXELS, *size)
    found = as_frame(FORMS[form], *size)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= (0.02 if form == "jax bfloat16" else 1e-6)
    clip = CLIPImageProcessor(size=32, crop_size=32)
    assert np.abs(clip(FORMS[form]) - clip(PIXELS)).max() <= (0.1 if "bfl" in form else 0)


def test_one_for_all_prompts_or_one_for_each(tmp_path):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", *list(FORMS.values())[:2]]
    for given in (
        mixed,
        tuple(mixed),
        np.stack([PIXELS] * 3),
        torch.tensor(PIXELS)[None].expand(3, -1, -1, -1),
    ):
        images = images_of_each(given, 3)
        assert len(images) == 3
        for image in images:
            np.testing.assert_array_equal(np.asarray(image), PIXELS)
    assert len(images_of_each(str(tmp_path / "a.png"), 3)) == 1
    refused = [
        (mixed, "image must be one or as many as the prompts: got 3 for 2"),
        ([], "image is empty"),
        ([mixed, mixed], "image must be images, or one: got a list of lists"),
        ([PIXELS, PIXELS * 2.0], "image 1 in floating point has values from 0 to 1: got 0 to 510"),
        (np.zeros((2, 3, 4, 5, 3)), "image must be a path, an image, or an array"),
        (7, "image must be a path, an image, or an array"),
        (PIXELS[:0], "image has no pixels"),
        (PIXELS > 7, "got bool"),
        (np.zeros((8, 8, 4)), "transparency has to be dropped first"),
        (PIL.Image.new("RGB", (0, 4)), "image has no pixels"),
    ]
    for given, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            images_of_each(given, 2)


def test_an_image_that_is_too_narrow_is_not_resized():
    with pytest.raises(ValueError, match="image of 1 x 9000 pixels is too narrow for CLIP"):
        CLIPImageProcessor()(PIL.Image.new("RGB", (1, 9000)))


def test_an_image_that_was_opened_and_is_damaged_is_one_sentence(tmp_path):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    with (
        PIL.Image.open(io.BytesIO(content[:-1000])) as image,
        pytest.raises(ValueError, match="image: the image cannot be decoded: "),
    ):
        as_frame(image, 8, 8)


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
