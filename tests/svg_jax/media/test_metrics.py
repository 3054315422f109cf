"""PSNR and SSIM against their definitions."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from svg_jax.media.metrics import psnr, ssim


def random_video(seed, shape=(3, 16, 20, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_psnr_of_a_constant_error():
    """An error of .2 everywhere is 10·log10(4 / .04) = 20 dB."""
    video = random_video(0) * 0.5
    assert psnr(video + np.float32(0.2), video) == pytest.approx(20, abs=1e-4)


def test_psnr_is_over_the_whole_video_not_the_mean_of_its_frames():
    video = np.zeros((2, 4, 4, 3), np.float32)
    other = video.copy()
    other[0] = 0.2  # the second frame is equal: its own PSNR would be infinite
    assert psnr(other, video) == pytest.approx(10 * np.log10(4 / 0.02), abs=1e-4)


def test_pixels_outside_the_range_are_clipped():
    ones = np.ones((1, 12, 12, 3), np.float32)
    assert psnr(ones * 3, ones) == float("inf")
    assert ssim(ones * 3, ones) == pytest.approx(1)


def test_ssim_is_wangs_formula():
    """A second implementation: Gaussian moments of each channel, window cut at 5 pixels."""
    a, b = random_video(1).astype(np.float64), random_video(2).astype(np.float64)

    def blur(image):
        return gaussian_filter(image, 1.5, truncate=3.5)

    scores = []
    for frame_a, frame_b in zip(a, b, strict=True):
        for channel in range(3):
            x, y = frame_a[..., channel], frame_b[..., channel]
            mx, my = blur(x), blur(y)
            vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            score = (2 * mx * my + c1) * (2 * vxy + c2)
            score /= (mx**2 + my**2 + c1) * (vx + vy + c2)
            scores.append(score[5:-5, 5:-5].mean())
    assert ssim(a, b) == pytest.approx(np.mean(scores), abs=1e-9)


def test_a_video_equals_itself():
    video = random_video(3)
    assert psnr(video, video) == float("inf")
    assert ssim(video, video) == pytest.approx(1)


def test_shapes_must_agree():
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="one shape"):
            metric(random_video(0), random_video(0, (2, 16, 20, 3)))


def test_ssim_needs_room_for_its_window():
    small = random_video(0, (1, 8, 20, 3))
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(small, small)
