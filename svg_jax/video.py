"""Videos as arrays of pixels: put together, labelled, and written to a file."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from svg_jax.files import written_atomically

Frames = Float[np.ndarray, "frames height width 3"]
NewFrames = Float[np.ndarray, "frames new_height new_width 3"]
SUFFIXES = (".mp4", ".gif", ".png")
_SHEET_FRAMES = 8  # how many frames a contact sheet shows
_PALETTE_PIXELS = 500_000


@runtime_checkable
class HasFrames(Protocol):
    """What a pipeline returns."""

    @property
    def frames(self) -> Any:
        """Pixels in 0…1 [batch, frames, height, width, 3], or None."""
        ...


def check_video_path(path: str | Path) -> Path:
    """The path of a video that can be written; for a check before the long work.

    Raises:
        ValueError: If the suffix is none of .mp4, .gif and .png.
        FileNotFoundError: If the folder does not exist.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a video is written as {', '.join(SUFFIXES)}: got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: there is no folder {path.parent}")
    return path


def check_fps(fps: float | int) -> None:
    """ValueError unless a video can have so many frames per second."""
    if not 0 < fps <= 1000:
        raise ValueError(f"fps must be positive and at most 1000: got {fps}")


def save_video(
    video: HasFrames | Float[np.ndarray, "*batch frames height width 3"],
    path: str | Path,
    *,
    fps: float | int = 8,
) -> None:
    """Writes a video, whole or not at all.

    Args:
        video: Pixels in 0…1, or what a pipeline returned; one video.
        path: Its suffix tells the format: .mp4 (H.264, or MPEG-4 where PyAV has no such encoder;
            odd sizes repeat their last row or column), .gif (endless, one palette for all frames),
            or .png (frames spread over the video, in a row).
        fps: Frames per second.

    Raises:
        ValueError: At another suffix, pixels that are not finite, or more than one video.
        OSError: If the file cannot be written.
    """
    path = check_video_path(path)
    check_fps(fps)
    fps = float(fps)
    frames = to_uint8(_one_video(video))
    with written_atomically(path) as temporary:
        if path.suffix == ".mp4":
            _write_mp4(frames, temporary, fps)
        elif path.suffix == ".gif":
            _write_gif(frames, temporary, fps)
        else:
            Image.fromarray(contact_sheet(frames)).save(temporary)


def _one_video(video: Any) -> np.ndarray:
    frames = video.frames if isinstance(video, HasFrames) else video
    if frames is None:
        raise ValueError("this output has latents only: there are no frames to save")
    if frames.ndim == 5:
        if len(frames) != 1:
            raise ValueError(f"save_video writes one video: pick one of these {len(frames)}")
        frames = frames[0]
    return frames


def to_uint8(frames: Frames) -> UInt8[np.ndarray, "frames height width 3"]:
    """Pixels of 0…1 as bytes; values outside are clipped.

    Raises:
        ValueError: If a pixel is not finite.
    """
    if not np.isfinite(frames).all():
        raise ValueError("the video has pixels that are not finite")
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def side_by_side(*videos: Float[np.ndarray, "..."], gap: int = 2) -> NewFrames:
    """Videos of one shape in a row, with `gap` white columns between them."""
    shapes = {video.shape for video in videos}
    if len(shapes) != 1:
        raise ValueError(f"only videos of one shape go side by side: got {sorted(shapes)}")
    space = np.ones((*videos[0].shape[:2], gap, 3), videos[0].dtype)
    row = [part for video in videos for part in (space, video)]
    return np.concatenate(row[1:], axis=2)


def enlarge(frames: Frames, factor: int) -> NewFrames:
    """Every pixel as a square of factor² pixels: what a tiny model made, and nothing else."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def with_label(frames: Frames, text: str) -> NewFrames:
    """The video under a white bar with a line of text, at the size that it is drawn at."""
    num_frames, _, width, _ = frames.shape
    font = ImageFont.load_default(size=14)
    bar = Image.new("RGB", (width, 22), "white")
    ImageDraw.Draw(bar).text((4, 2), text, fill="black", font=font)
    pixels = np.asarray(bar).astype(frames.dtype) / 255
    return np.concatenate([np.broadcast_to(pixels, (num_frames, *pixels.shape)), frames], axis=1)


def contact_sheet(
    frames: UInt8[np.ndarray, "frames height width 3"],
) -> UInt8[np.ndarray, "height sheet_width 3"]:
    """Frames from the first to the last, evenly spread, in one row."""
    shown = np.linspace(0, len(frames) - 1, min(_SHEET_FRAMES, len(frames))).round().astype(int)
    return np.concatenate(list(frames[shown]), axis=1)


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    # A palette per frame would let still areas flicker; a sample of the pixels is enough for one.
    stride = math.isqrt(frames.size // 3 // _PALETTE_PIXELS) + 1
    sample = frames[:, ::stride, ::stride]
    everything = Image.fromarray(np.ascontiguousarray(sample.reshape(-1, *sample.shape[2:])))
    palette = everything.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
    images = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        for frame in frames
    ]
    # GIF counts in hundredths of a second.
    duration = max(10 * round(100 / fps), 20)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    import av
    from av.codec.codec import UnknownCodecError

    _, height, width, _ = frames.shape
    # yuv420p halves both sizes.
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    try:
        encoder = av.Codec("libx264", "w").name
        options = {"crf": "16", "preset": "medium"}
    except UnknownCodecError:
        encoder, options = "mpeg4", {"qscale": "2"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(encoder, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
