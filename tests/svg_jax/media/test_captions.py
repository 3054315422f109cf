"""Captions above videos: whole at any width."""

import numpy as np
import pytest
from PIL import Image

from svg_jax.media.captions import caption_bar, draw_caption
from svg_jax.media.video import side_by_side, with_label

CAPTIONS = "dense: 0.12 s a step", "svg, density 0.25: 0.07 s a step"


def ink(pixels):
    """Number of dark pixels."""
    return int((pixels < 128).all(-1).sum())


@pytest.mark.parametrize("width", [1, 8, 16, 64, 65, 128, 200, 390, 832, 1280, 4096])
def test_a_caption_is_whole_at_any_width(width):
    bar = caption_bar(width, CAPTIONS)
    assert bar.width >= width
    assert bar.font_size >= 14
    room = caption_bar(4096, CAPTIONS)
    for caption in CAPTIONS:
        drawn = draw_caption(caption, bar)
        assert drawn.shape == (bar.height, bar.width, 3)
        edges = np.concatenate([drawn[:, :2], drawn[:, -2:]], axis=1)
        assert (edges == 255).all()
        assert (drawn[-1] == 255).all()
        # As much ink as where there is room for all of it in one line, at the same size.
        one_line = draw_caption(caption, type(bar)(room.width, room.height, bar.font_size))
        assert ink(drawn) == pytest.approx(ink(one_line), rel=0.05)


@pytest.mark.parametrize("width", [8, 64, 390, 1280])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_videos_with_captions_go_side_by_side(width, dtype):
    frame = np.full((2, 8, width, 3), 1, dtype)
    both = [with_label(frame, caption, beside=CAPTIONS) for caption in CAPTIONS]
    assert both[0].shape == both[1].shape
    assert side_by_side(*both).dtype == dtype
    np.testing.assert_array_equal(both[0][:, -8:, :width], frame)


def test_a_video_that_is_wide_enough_stays_as_wide():
    frame = np.zeros((1, 48, 390, 3), np.uint8)
    labelled = with_label(frame, CAPTIONS[0], beside=CAPTIONS)
    assert labelled.shape == (1, 48 + 22, 390, 3)
    assert Image.fromarray(labelled[0]).size == (390, 70)
