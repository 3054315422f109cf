"""A video in every form that users have it in: the same pixels, or one sentence."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from svg_jax.media.frames import as_frames
from svg_jax.media.metrics import psnr, ssim
from svg_jax.media.video import enlarge, save_video, side_by_side, to_uint8, with_label

BYTES = np.random.default_rng(0).integers(0, 256, (3, 12, 14, 3)).astype(np.uint8)
FLOATS = BYTES.astype(np.float32) / 255


class OnAnotherDevice:
    """As a tensor of PyTorch that NumPy cannot read: on a GPU, with a gradient."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self):
        return self

    def cpu(self):
        return self.tensor


@dataclass
class Output:
    frames: Any


FORMS = {
    "bytes": BYTES,
    "int64": BYTES.astype(np.int64),
    "int16": BYTES.astype(np.int16),
    "float32": FLOATS,
    "float64": BYTES / 255,
    "float16": FLOATS.astype(np.float16),
    "bfloat16": jnp.asarray(FLOATS, jnp.bfloat16),
    "jax bytes": jnp.asarray(BYTES),
    "a pipeline's": Output(FLOATS[None]),
    "a pipeline's bytes": Output(BYTES[None]),
    "a batch of one": BYTES[None],
    "channels first": FLOATS.transpose(0, 3, 1, 2),
    "torch": torch.tensor(FLOATS).permute(0, 3, 1, 2),
    "torch bfloat16": torch.tensor(FLOATS).bfloat16(),
    "torch with a gradient": torch.tensor(FLOATS, requires_grad=True),
    "torch elsewhere": OnAnotherDevice(torch.tensor(BYTES)),
    "a list of arrays": list(FLOATS),
    "a tuple of tensors": tuple(torch.tensor(FLOATS).permute(0, 3, 1, 2)),
    "a list of images": [Image.fromarray(frame) for frame in BYTES],
    "diffusers' lists": Output([[Image.fromarray(frame).convert("RGBA") for frame in BYTES]]),
    "a list of one array": [BYTES],
    "beyond by rounding": FLOATS * np.float32(1.004) - np.float32(0.002),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_video(form, tmp_path):
    tolerance = {"bfloat16": 1, "torch bfloat16": 1, "beyond by rounding": 1}.get(form, 0)
    found = to_uint8(FORMS[form])
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - BYTES).max() <= tolerance
    save_video(FORMS[form], tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(sheet, np.concatenate(list(found), axis=1))


def test_what_makes_new_videos_takes_bytes_for_bytes():
    row = side_by_side(BYTES, FORMS["jax bytes"], gap=2)
    np.testing.assert_array_equal(row, np.concatenate([BYTES, row[:, :, 14:16], BYTES], axis=2))
    assert (row[:, :, 14:16] == 255).all()
    for form in ("channels first", "a list of images"):  # floats and bytes meet as bytes
        np.testing.assert_array_equal(to_uint8(side_by_side(BYTES, FORMS[form])), row)
    np.testing.assert_array_equal(enlarge(list(BYTES), 2)[:, 1::2, ::2], BYTES)
    labelled = with_label(enlarge(BYTES, 5), "dense")
    np.testing.assert_array_equal(labelled, to_uint8(with_label(enlarge(FLOATS, 5), "dense")))
    assert labelled[:, 0].min() == 255


def test_metrics_know_the_range_of_bytes_and_of_outputs():
    other = np.clip(BYTES.astype(int) + 9, 0, 255).astype(np.uint8)
    error = np.mean((BYTES.astype(float) - other) ** 2)
    decibels = 10 * np.log10(255**2 / error)
    signed = [2 * (video / 255) - 1 for video in (BYTES, other)]
    pairs = [(BYTES, other), (Output(FLOATS[None]), Output((other / 255)[None])), signed]
    pairs += [([*FORMS["a list of images"]], torch.tensor(other).permute(0, 3, 1, 2))]
    for pair in pairs:
        assert psnr(*pair) == pytest.approx(decibels, abs=1e-4)
        assert ssim(*pair) == pytest.approx(ssim(*signed), abs=1e-6)
    with pytest.raises(ValueError, match="must be of one range"):
        psnr(BYTES, FLOATS)
    with pytest.raises(ValueError, match="reference has pixels that are not finite"):
        psnr(FLOATS, np.full_like(FLOATS, np.nan))
    for metric in (psnr, ssim):  # clipped, all of it were white
        with pytest.raises(ValueError, match=r"from -1 to 1: got some of 255; if they are from 0"):
            metric(FLOATS * 255, FLOATS * 200)


@pytest.mark.parametrize("axis", [1, 3])
def test_greys_have_one_colour_first_or_last(axis):
    greys = np.expand_dims(BYTES[..., 0], axis)
    np.testing.assert_array_equal(as_frames(greys), BYTES[..., :1].repeat(3, axis=-1))


@pytest.mark.parametrize("count", [-1, True])
def test_only_whole_numbers_enlarge_and_part(count):
    with pytest.raises(ValueError, match="factor must be a whole number of at least 1: got"):
        enlarge(BYTES, count)
    with pytest.raises(ValueError, match="gap must be a whole number of at least 0: got"):
        side_by_side(BYTES, BYTES, gap=count)


@pytest.mark.parametrize(
    ("video", "sentence"),
    [
        (FLOATS * 255, r"got 0 to 255; if they are from 0 to 255, cast them to uint8"),
        (2 * FLOATS - 1, r"if they are from -1 to 1, take \(x \+ 1\) / 2"),
        (FLOATS + 1, "has values from 0 to 1: got 1 to 2"),
        (BYTES.astype(np.int32) * 2, "in integers has values from 0 to 255: got 0 to 510"),
        (BYTES.astype(np.int8), "in integers has values from 0 to 255: got -128"),
        (BYTES.astype(np.uint16), r"got uint16 \(divide 16 bits by 65535\)"),
        (BYTES > 9, "got bool"),
        (FLOATS.astype(complex), "got complex128"),
        (FLOATS.astype(str), "got <U"),
        (np.where(BYTES > 9, np.inf, FLOATS), "some of these are not finite"),
        (jnp.full((1, 4, 4, 3), jnp.nan, jnp.bfloat16), "some of these are not finite"),
        (FLOATS[0], r"must have the axes \[frames, height, width, 3\]: got the shape \(12, 14, 3"),
        (FLOATS[..., 0], r"must have the axes"),
        (FLOATS[..., :2], "must have 3 colours as its last axis"),
        (np.zeros((2, 4, 6, 4)), "transparency has to be dropped first"),
        (np.zeros((3, 8, 6, 7)), "must have 3 colours"),  # [3, frames, height, width]
        (FLOATS[:0], "has no pixels"),
        (FLOATS[:, :0], "has no pixels"),
        ([], "has no frames"),
        (Output(None), "latents only"),
        (Output([]), "has no frames"),
        ([BYTES, BYTES], "pick one of these 2"),
        (Output([[Image.new("RGB", (4, 4))]] * 2), "pick one of these 2"),
        ([BYTES[0], BYTES[1, 1:]], r"frame 1 is uint8\[11, 14, 3\], and the first one uint8\[12"),
        ([BYTES[0], FLOATS[0]], "frame 1 is float32"),
        ([Image.new("F", (4, 4))], "mode F has no known range"),
        (Image.new("RGB", (4, 4)), "must be an array or a list of frames: got one Image"),
        ("a.mp4", "must be an array or a list of frames: got one str"),
        (None, "must be an array or a list of frames: got one NoneType"),
        (7, "must be an array or a list of frames: got one int"),
        ({"a": 1}, "must be an array or a list of frames: got one dict"),
        ((frame for frame in BYTES), "must be an array or a list of frames: got one generator"),
        (BYTES.astype("m8[s]"), "got timedelta64"),
        ([[1, 2], [3]], r"frame 1 is int64\[1\]"),
        ([[[1, 2], [3]]], "video: no array can be made of this list: "),
    ],
)
def test_what_is_no_video_is_one_sentence(video, sentence, tmp_path):
    for use in (lambda: save_video(video, tmp_path / "a.mp4"), lambda: as_frames(video)):
        with pytest.raises(ValueError, match=sentence) as caught:
            use()
        assert str(caught.value).startswith("video")
        assert len(str(caught.value)) < 500
    assert list(tmp_path.iterdir()) == []
