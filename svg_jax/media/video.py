"""Videos as arrays of pixels: put side by side, labelled, and written to files."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from svg_jax.convert.files import written_atomically
from svg_jax.convert.formats.values import Number
from svg_jax.media.captions import caption_bar, draw_caption
from svg_jax.media.frames import AnyVideo, Frames, as_frames

Bytes = UInt8[np.ndarray, "frames height width 3"]
NewFrames = (
    UInt8[np.ndarray, "frames new_height new_width 3"]
    | Float32[np.ndarray, "frames new_height new_width 3"]
)
SUFFIXES = (".mp4", ".gif", ".png")
_SHEET_FRAMES = 8  # frames in a contact sheet
_PALETTE_PIXELS = 500_000
_SLOWEST, _FASTEST, _FASTEST_GIF = 0.01, 1000, 50  # browsers slow down frames under 20 ms
_MOST_OF_GIF, _MOST_OF_ENCODER = 65535, {"libx264": 16384, "mpeg4": 8190}  # pixels a side
_GIF_SECONDS = 655  # the longest still frame: 16 bits of hundredths
_SHEET_PIXELS = 2**28  # Pillow opens no larger image without a warning
_BT709, _SMPTE170M = 1, 6  # as H.273 numbers them
_HD = (577, 1280)  # rows or columns from which players read untagged colours by BT.709


def check_video_path(path: str | Path) -> Path:
    """Check, before the long work, that a file's suffix is a video's, in any case.

    Raises:
        ValueError: If the suffix is none of .mp4, .gif and .png.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a video is written as {', '.join(SUFFIXES)}: got {path.name!r}")
    return path


def check_fps(fps: Any, path: str | Path = "") -> None:
    """Check, before the long work, that a video can have this number of frames per second.

    Args:
        fps: Frames per second.
        path: File of the video, if it is known: a .gif has at most 50.

    Raises:
        ValueError: If it cannot.
    """
    _check_number("fps", fps, Number(_SLOWEST, _FASTEST))
    if Path(path).suffix.lower() == ".gif" and fps > _FASTEST_GIF:
        raise ValueError(
            f"fps must be at most {_FASTEST_GIF} for a .gif, which players slow down else: got "
            f"{fps:g}; write an .mp4"
        )


def check_video_size(
    path: str | Path, num_frames: int, height: int, width: int, fps: float | int
) -> None:
    """Check, before the long work, that the file's format can hold a video.

    Args:
        path: File of the video.
        num_frames: Frames of the video.
        height: Rows of a frame.
        width: Columns of a frame.
        fps: Frames per second.

    Raises:
        ValueError: If it cannot; the error says how much it can hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        width *= min(_SHEET_FRAMES, num_frames)
        if height * width > _SHEET_PIXELS:
            raise ValueError(
                f"a row of frames as .png is of at most {_SHEET_PIXELS:,} pixels: {path.name} "
                f"would have {width:,} x {height:,}"
            )
        return
    most = _MOST_OF_GIF if suffix == ".gif" else _MOST_OF_ENCODER[_mp4_encoder()[0]]
    if max(height, width) > most:
        raise ValueError(
            f"a {suffix} is of at most {most:,} pixels a side: {path.name} would have {width:,} x "
            f"{height:,}"
        )
    if suffix == ".gif" and num_frames / fps > _GIF_SECONDS:
        raise ValueError(
            f"fps {fps:g} is too low for a .gif of {num_frames:,} frames, which lasts at most "
            f"{_GIF_SECONDS} s: write an .mp4"
        )


def save_video(video: AnyVideo, path: str | Path, *, fps: float | int | np.number = 8) -> None:
    """Write a video, whole or not at all.

    Args:
        video: One video, in any form of `svg_jax.media.frames.as_frames`: output of a pipeline,
            array of NumPy, JAX or PyTorch, or list of frames. Integers are from 0 to 255, and
            floating point is from 0 to 1.
        path: File of the video. Its suffix decides the format: .mp4 (H.264, or MPEG-4 where PyAV
            has no such encoder; odd sizes repeat their last row or column; colours are BT.709 in HD
            and BT.601 below, and tagged so), .gif (endless, one palette for all frames), or .png
            (a row of frames from the whole video).
        fps: Frames per second, 0.01 to 1000; 50 at most for .gif.

    Raises:
        ValueError: If the suffix is another, the video is not exactly one, its pixels are not
            finite or out of range, or the format cannot hold it.
        OSError: If the file cannot be written.
    """
    path = check_video_path(path)
    check_fps(fps, path)
    fps = float(fps)
    frames = to_uint8(video)
    num_frames, height, width, _ = frames.shape
    check_video_size(path, num_frames, height, width, fps)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_sheet}[path.suffix.lower()]
    with written_atomically(path) as temporary:
        write(frames, temporary, fps)


def to_uint8(video: AnyVideo) -> Bytes:
    """Turn a video in any form of `as_frames` into bytes.

    Raises:
        ValueError: If it is no video, or a pixel is not finite or out of range.
    """
    frames = as_frames(video)
    return frames if frames.dtype == np.uint8 else np.round(frames * 255).astype(np.uint8)


def side_by_side(*videos: AnyVideo, gap: int = 2) -> NewFrames:
    """Put videos of one shape in a row, with `gap` white columns between them.

    Raises:
        ValueError: If there is no video, shapes differ, or the gap is no whole number from 0 on.
    """
    _check_number("gap", gap, Number(0, whole=True))
    arrays = [as_frames(video) for video in videos]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(f"only videos of one shape go side by side: got {sorted(shapes)}")
    if len({array.dtype for array in arrays}) > 1:
        arrays = [to_uint8(array) for array in arrays]
    space = np.full((*arrays[0].shape[:2], gap, 3), _white(arrays[0]), arrays[0].dtype)
    row = [part for array in arrays for part in (space, array)]
    return np.concatenate(row[1:], axis=2)


def enlarge(video: AnyVideo, factor: int) -> NewFrames:
    """Enlarge every pixel to a square of factor² pixels, without interpolation.

    Raises:
        ValueError: If it is no video, or the factor is no whole number of at least 1.
    """
    _check_number("factor", factor, Number(1, whole=True))
    return as_frames(video).repeat(factor, axis=1).repeat(factor, axis=2)


def with_label(video: AnyVideo, text: str, *, beside: Sequence[str] = ()) -> NewFrames:
    """Put a white bar with a text above a video.

    The text is never cut: it is broken into lines, and a video that is too narrow for them gets
    white columns on its right.

    Args:
        video: One video, in any form of `as_frames`.
        text: Caption of the video.
        beside: Captions of the videos beside it, to give all of them bars of one size.
    """
    frames = as_frames(video)
    bar = caption_bar(frames.shape[2], [text, *beside])
    white = _white(frames)
    columns = (0, bar.width - frames.shape[2])
    wide = np.pad(frames, ((0, 0), (0, 0), columns, (0, 0)), constant_values=white)
    pixels = draw_caption(text, bar)
    if frames.dtype != np.uint8:
        pixels = pixels.astype(frames.dtype) / 255
    return np.concatenate([np.broadcast_to(pixels, (len(wide), *pixels.shape)), wide], axis=1)


def _check_number(name: str, value: Any, rule: Number) -> None:
    if (problem := rule.problem(value)) is not None:
        raise ValueError(f"{name} {problem}")


def _white(frames: Frames) -> int:
    return 255 if frames.dtype == np.uint8 else 1


def contact_sheet(frames: Bytes) -> UInt8[np.ndarray, "height sheet_width 3"]:
    """Put evenly spread frames, with the first and the last, in one row."""
    shown = np.linspace(0, len(frames) - 1, min(_SHEET_FRAMES, len(frames))).round().astype(int)
    return np.concatenate(list(frames[shown]), axis=1)


def _write_sheet(frames: Bytes, path: Path, _fps: float) -> None:
    Image.fromarray(contact_sheet(frames)).save(path, format="png")


def _write_gif(frames: Bytes, path: Path, fps: float) -> None:
    # With a palette for each frame, still areas would flicker. A sample of the pixels is enough.
    stride = math.isqrt(frames.size // 3 // _PALETTE_PIXELS) + 1
    sample = frames[:, ::stride, ::stride]
    everything = Image.fromarray(np.ascontiguousarray(sample.reshape(-1, *sample.shape[2:])))
    palette = everything.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
    images = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        for frame in frames
    ]
    # GIF counts hundredths of a second: each frame ends at the one nearest to its time.
    ends = [round(100 * (index + 1) / fps) for index in range(len(frames))]
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    images[0].save(
        path, format="gif", save_all=True, append_images=images[1:], duration=durations, loop=0
    )


def _write_mp4(frames: Bytes, path: Path, fps: float) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    # yuv420p halves both sizes.
    padding = (0, height % 2), (0, width % 2), (0, 0)
    if fps < 1:
        rate = 1 / Fraction(1 / fps).limit_denominator(1001)
    else:  # MPEG-4 has 16 bits for the numerator
        rate = Fraction(fps).limit_denominator(min(1001, int(65535 / fps)))
    encoder, options = _mp4_encoder()
    matrix = Colorspace.ITU709 if height >= _HD[0] or width >= _HD[1] else Colorspace.ITU601
    # Without a scheme in front, FFmpeg would read one in a name such as 12:30.mp4.
    with av.open(f"file:{path}", "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(encoder, rate=rate, options=options)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # Pixels are sRGB, with the primaries of BT.709 whatever the matrix is.
        context.color_primaries = context.color_trc = _BT709
        context.colorspace = _BT709 if matrix == Colorspace.ITU709 else _SMPTE170M
        context.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.pad(frame, padding, mode="edge"), "rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _mp4_encoder() -> tuple[str, dict[str, str]]:
    """Choose the encoder and its options: H.264, or MPEG-4 where PyAV lacks it."""
    import av
    from av.codec.codec import UnknownCodecError

    try:
        return av.Codec("libx264", "w").name, {"crf": "16", "preset": "medium"}
    except UnknownCodecError:
        return "mpeg4", {"qscale": "2"}
