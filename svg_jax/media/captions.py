"""Captions above videos, readable at any size of the video."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_SMALLEST, _COLUMNS_PER_POINT = 14, 36  # pixels of the font; wider videos get a larger one
_MARGIN = 4  # pixels around the text
_MOST_LINES = 3  # a video that is too narrow for these is widened


@dataclass(frozen=True)
class CaptionBar:
    """The size of the captions of videos of one width, so that none of them is cut.

    Attributes:
        width: Columns of the bar, at least those of the video.
        height: Rows of the bar.
        font_size: Pixels of the font.
    """

    width: int
    height: int
    font_size: int


def caption_bar(video_width: int, captions: Sequence[str]) -> CaptionBar:
    """Lay out the captions of videos that are shown side by side.

    Args:
        video_width: Columns of each video.
        captions: Captions of the videos.
    """
    size = max(_SMALLEST, video_width // _COLUMNS_PER_POINT)
    width = video_width
    while (lines := _most_lines(captions, width, size)) is None or lines > _MOST_LINES:
        width += _MARGIN
    return CaptionBar(width, lines * _line_height(size) + _MARGIN, size)


def _line_height(size: int) -> int:
    return size + max(4, size // 3)


def _most_lines(captions: Sequence[str], width: int, size: int) -> int | None:
    """Count the lines of the longest caption; None if a word is wider than the bar."""
    counts = [_lines(caption, width, size) for caption in captions]
    return None if None in counts else max(len(lines) for lines in counts if lines is not None)


def _lines(caption: str, width: int, size: int) -> list[str] | None:
    """Break a caption into lines that fit; None if a word does not fit."""
    font = ImageFont.load_default(size=size)
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 2 * _MARGIN:
            lines[-1] = longer
        elif font.getlength(word) <= width - 2 * _MARGIN:
            lines.append(word)
        else:
            return None
    return lines


def draw_caption(caption: str, bar: CaptionBar) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a caption in black on white.

    Args:
        caption: Caption that the bar was laid out for.
        bar: Size of the bar and its font.
    """
    image = Image.new("RGB", (bar.width, bar.height), "white")
    font = ImageFont.load_default(size=bar.font_size)
    lines = _lines(caption, bar.width, bar.font_size) or [caption]
    for number, line in enumerate(lines):
        top = number * _line_height(bar.font_size) + _MARGIN // 2
        ImageDraw.Draw(image).text((_MARGIN, top), line, fill="black", font=font)
    return np.asarray(image)
