"""Videos written to files and read back by other means."""

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import pytest
from av.codec.codec import UnknownCodecError
from PIL import Image

from svg_jax.media.video import (
    contact_sheet,
    enlarge,
    save_video,
    side_by_side,
    to_uint8,
    with_label,
)


def moving_gradient(num_frames=5, height=48, width=64):
    """Smooth in space and changing in time: what a codec keeps."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    frames = [
        np.stack([x / width, y / height, np.full_like(x, t / num_frames)], -1)
        for t in range(num_frames)
    ]
    return np.stack(frames)


def read_mp4(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(stream.average_rate or 0), stream.codec_context


def read_gif(path):
    with Image.open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames), image.info


def test_mp4_keeps_the_pixels_the_rate_and_the_order(tmp_path):
    video = moving_gradient()
    save_video(video, tmp_path / "a.mp4", fps=8)
    frames, rate, codec = read_mp4(tmp_path / "a.mp4")
    assert (codec.name, codec.pix_fmt, rate) == ("h264", "yuv420p", 8)
    assert np.abs(frames.astype(float) - to_uint8(video)).mean() < 3


def test_mp4_pads_odd_sizes(tmp_path):
    save_video(moving_gradient(height=47, width=63), tmp_path / "a.mp4")
    frames, *_ = read_mp4(tmp_path / "a.mp4")
    assert frames.shape == (5, 48, 64, 3)


def test_mp4_without_an_h264_encoder(tmp_path, monkeypatch):
    real = av.Codec

    def without_h264(name, mode):
        if name == "libx264":
            raise UnknownCodecError(name)
        return real(name, mode)

    monkeypatch.setattr(av, "Codec", without_h264)
    video = moving_gradient()
    save_video(video, tmp_path / "a.mp4")
    frames, _, codec = read_mp4(tmp_path / "a.mp4")
    assert codec.name == "mpeg4"
    assert np.abs(frames.astype(float) - to_uint8(video)).mean() < 5


def test_gif_keeps_the_pixels_and_loops(tmp_path):
    video = moving_gradient()
    save_video(video, tmp_path / "a.gif", fps=8)
    frames, info = read_gif(tmp_path / "a.gif")
    assert frames.shape == (5, 48, 64, 3)
    assert (info["duration"], info["loop"]) == (120, 0)
    assert np.abs(frames.astype(float) - to_uint8(video)).mean() < 8


def test_a_still_background_does_not_flicker_in_a_gif(tmp_path):
    rng = np.random.default_rng(0)
    video = np.repeat(rng.random((1, 24, 32, 3), np.float32), 4, axis=0)
    video[:, :, :8] = rng.random((4, 1, 1, 3), np.float32)  # one part changes its colours
    save_video(video, tmp_path / "a.gif")
    frames, _ = read_gif(tmp_path / "a.gif")
    # Error diffusion carries a little of the changing part along its rows; colours must not jump.
    still = frames[:, :, 16:].astype(float)
    assert np.abs(still - still[:1]).mean() < 3


def test_png_is_a_row_of_frames_from_first_to_last(tmp_path):
    video = moving_gradient(num_frames=20)
    save_video(video, tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (48, 8 * 64, 3)
    np.testing.assert_array_equal(sheet[:, :64], to_uint8(video)[0])
    np.testing.assert_array_equal(sheet[:, -64:], to_uint8(video)[-1])
    assert contact_sheet(to_uint8(moving_gradient(num_frames=3))).shape == (48, 3 * 64, 3)


def test_what_a_pipeline_returns_can_be_saved(tmp_path):
    @dataclass
    class Output:
        frames: Any

    save_video(Output(moving_gradient()[None]), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match="latents only"):
        save_video(Output(None), tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_an_interrupted_write_leaves_nothing_and_spares_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    import svg_jax.convert.files

    monkeypatch.setattr(svg_jax.convert.files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_video(moving_gradient(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_bad_requests(tmp_path):
    video = moving_gradient()
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.png: got 'a\.avi'"):
        save_video(video, tmp_path / "a.avi")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_video(video, tmp_path / "missing" / "a.mp4")
    with pytest.raises(ValueError, match=r"fps must be a number from 0\.01 to 1000"):
        save_video(video, tmp_path / "a.mp4", fps=0)
    with pytest.raises(ValueError, match="pick one of these 2"):
        save_video(np.stack([video, video]), tmp_path / "a.mp4")
    video[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        save_video(video, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_side_by_side_enlarged_and_labelled():
    left, right = moving_gradient(), 1 - moving_gradient()
    row = side_by_side(left, right, gap=4)
    np.testing.assert_array_equal(row[:, :, :64], left)
    np.testing.assert_array_equal(row[:, :, 68:], right)
    assert (row[:, :, 64:68] == 1).all()
    big = enlarge(left, 3)
    np.testing.assert_array_equal(big[:, 1::3, 2::3], left)
    labelled = with_label(big, "dense")
    np.testing.assert_array_equal(labelled[:, 22:], big)
    assert labelled[:, :22].min() < 0.5  # there is text in the bar
    with pytest.raises(ValueError, match="one shape"):
        side_by_side(left, big)
