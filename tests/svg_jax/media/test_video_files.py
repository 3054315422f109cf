"""Names, rates, sizes and colours that a video's file may have."""

import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec.codec import UnknownCodecError
from PIL import Image

from svg_jax.media.video import check_fps, check_video_size, save_video

GREY = np.full((4, 16, 16, 3), 99, np.uint8)
# BT.601 and BT.709 differ in the weights of red, green and blue in Y.
COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [30, 200, 120], [128, 128, 128]],
    np.uint8,
)


def number_of_frames(path):
    if path.suffix.lower() == ".mp4":
        with av.open(f"file:{path}") as container:
            return sum(1 for _ in container.decode(video=0))
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1)


@pytest.mark.parametrize(
    "name",
    ["12:30", "http://a", "-y", "a%03d", "%", "a'b\"c", "видео 漢字", "pipe:1", "a\nb", "a.b"],
)
@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".gif", ".Png"])
def test_any_name_is_written(name, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name + suffix)
    path.parent.mkdir(exist_ok=True)
    save_video(GREY[:1], path)  # as relative as a user gives it
    assert os.listdir(path.parent) == [path.name]
    assert number_of_frames(path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_is_written(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.mp4"))
    save_video(GREY, path)
    assert os.listdir(os.fsencode(tmp_path)) == [b"bad\xff.mp4"]


def players_colours(path):
    """Tags of an mp4, its colours as tagged, and its Y."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (
            context.colorspace,
            context.color_primaries,
            context.color_trc,
            context.color_range,
        )
        frame = list(container.decode(video=0))[-1]
        middle = frame.height // 2, slice(frame.width // 12, None, frame.width // 6)
        matrix = {1: "ITU709", 6: "ITU601"}[context.colorspace]
        rgb = frame.to_ndarray(format="rgb24", src_colorspace=matrix, src_color_range="MPEG")
        luma = frame.to_ndarray(format="yuv420p")[: frame.height]
        return tags, rgb[middle], luma[middle]


@pytest.mark.parametrize(
    ("height", "width", "matrix", "weights"),
    [
        (480, 832, 6, (0.299, 0.587, 0.114)),
        (720, 1280, 1, (0.2126, 0.7152, 0.0722)),
        (48, 1284, 1, (0.2126, 0.7152, 0.0722)),
    ],
)
def test_colours_are_converted_as_players_take_them(height, width, matrix, weights, tmp_path):
    frames = np.repeat(COLOURS, width // 6 + 1, axis=0)[None, None, :width]
    save_video(np.broadcast_to(frames, (2, height, width, 3)), tmp_path / "a.mp4")
    tags, rgb, luma = players_colours(tmp_path / "a.mp4")
    assert tags == (matrix, 1, 1, 1)  # H.273: 1 is BT.709, 6 is BT.601; range 1 is 16 to 235
    assert np.abs(rgb.astype(int) - COLOURS).max() <= 3
    assert np.abs(luma - (16 + 219 / 255 * (COLOURS @ np.array(weights)))).max() <= 2


@pytest.mark.parametrize("fps", [0.01, 0.3, 7.5, 23.976, 30, np.float32(48), 50])
def test_any_rate_is_kept_by_every_format(fps, tmp_path):
    video = np.stack([np.full((16, 16, 3), 9 * index, np.uint8) for index in range(4)])
    save_video(video, tmp_path / "a.mp4", fps=fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(fps, rel=1e-4)
    save_video(video, tmp_path / "a.gif", fps=fps)
    with Image.open(tmp_path / "a.gif") as image:
        total = 0
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            total += image.info["duration"]
    assert total == pytest.approx(1000 * 4 / fps, abs=6)  # GIF counts in hundredths of a second


@pytest.mark.parametrize(
    "fps", [0, -1, 0.0001, 1001, float("nan"), float("inf"), 10**400, "8", None, True]
)
def test_rates_that_no_video_has(fps, tmp_path):
    with pytest.raises(ValueError, match="fps must be"):
        check_fps(fps)
    if isinstance(fps, float | int):
        with pytest.raises(ValueError, match="fps must be"):
            save_video(GREY, tmp_path / "a.mp4", fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_a_gif_has_limits_of_its_own():
    with pytest.raises(ValueError, match=r"at most 50 for a \.gif"):
        check_fps(60, "a.GIF")
    check_fps(60, "a.mp4")
    with pytest.raises(ValueError, match=r"too low for a \.gif of 81 frames"):
        check_video_size("a.gif", 81, 16, 16, 0.1)
    check_video_size("a.gif", 65, 16, 16, 0.1)


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("a.mp4", 16, 16386), ("a.MP4", 16386, 16), ("a.gif", 1, 65536), ("a.png", 2**14, 2**12)],
)
def test_sizes_that_a_format_cannot_hold(name, height, width, tmp_path):
    with pytest.raises(ValueError, match=r"is of at most [\d,]+ pixels.* would have [\d,]+ x"):
        check_video_size(name, 5, height, width, 8)
    video = np.broadcast_to(np.zeros(3, np.uint8), (5, height, width, 3))
    with pytest.raises(ValueError, match="is of at most"):
        save_video(video, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_sizes_can_be_written(tmp_path, monkeypatch):
    wide = np.zeros((1, 2, 16384, 3), np.uint8)
    save_video(wide, tmp_path / "a.mp4")
    save_video(wide.swapaxes(1, 2), tmp_path / "b.mp4")
    save_video(np.zeros((1, 1, 65535, 3), np.uint8), tmp_path / "c.gif")

    def without_h264(name, mode):
        raise UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", without_h264)
    with pytest.raises(ValueError, match="at most 8,190 pixels a side"):
        save_video(wide, tmp_path / "d.mp4")
    save_video(wide[:, :, :8190], tmp_path / "d.mp4", fps=999.99)
    assert len(list(tmp_path.iterdir())) == 4
