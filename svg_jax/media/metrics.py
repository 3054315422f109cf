"""Distances between two videos, PSNR and SSIM, as in the paper's comparison.

There the sparse video is compared with the dense one of the same noise, before any encoding. Arrays
in floating point are from −1 to 1, and what a decoder overshoots is clipped. Bytes and outputs of
pipelines have known ranges and need no scaling.
"""

from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from svg_jax.media.frames import AnyVideo, as_frames, stacked_frames

_Signed = Float[np.ndarray, "frames height width 3"]
_FURTHEST = 10  # no decoder overshoots that far, and no picture from 0 to 255 is that dark
SSIM_WINDOW = 11  # pixels a side: σ = 1.5, cut at 3.5σ


def psnr(video: AnyVideo, reference: AnyVideo) -> float:
    """Compute the peak signal-to-noise ratio over a whole video.

    Args:
        video: Pixels in any form of `as_frames`; in floating point from −1 to 1.
        reference: Pixels of the same shape and range.

    Returns:
        10·log10(4 / MSE) in dB; inf if the two are equal.

    Raises:
        ValueError: If the shapes or ranges differ, or a pixel is not finite.
    """
    video, reference = _both(video, reference)
    # Frame by frame: in float64 a video in HD is gigabytes.
    pairs = zip(video, reference, strict=True)
    error = np.mean([np.mean((a.astype(np.float64) - b) ** 2) for a, b in pairs])
    return float("inf") if error == 0 else float(10 * np.log10(4 / error))


def ssim(video: AnyVideo, reference: AnyVideo) -> float:
    """Compute the structural similarity with a Gaussian window of σ = 1.5 (Wang et al. 2004).

    Args:
        video: Pixels in any form of `as_frames`; in floating point from −1 to 1.
        reference: Pixels of the same shape and range.

    Returns:
        The mean over all frames.

    Raises:
        ValueError: If `psnr` would raise it, or a frame is smaller than the window of 11 pixels.
    """
    from skimage.metrics import structural_similarity

    video, reference = _both(video, reference)
    if min(video.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels each way: got {video.shape[1:3]}")
    similarity = partial(
        structural_similarity,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=2,
        channel_axis=-1,
    )
    pairs = zip(video, reference, strict=True)
    return float(np.mean([similarity(*np.asarray(pair, np.float64)) for pair in pairs]))


def _both(video: AnyVideo, reference: AnyVideo) -> tuple[_Signed, _Signed]:
    """Scale two videos to −1 to 1, and check that they can be compared."""
    given = {"video": video, "reference": reference}
    arrays = {name: stacked_frames(each, name) for name, each in given.items()}
    known = [
        hasattr(each, "frames") or not jax.dtypes.issubdtype(arrays[name].dtype, np.floating)
        for name, each in given.items()
    ]
    if known[0] != known[1]:
        raise ValueError(
            "video and reference must be of one range: an array in floating point is taken as -1 "
            "to 1, while bytes and a pipeline's output have a range of their own"
        )
    if arrays["video"].shape != arrays["reference"].shape:
        raise ValueError(
            f"two videos of one shape can be compared: got {arrays['video'].shape} and "
            f"{arrays['reference'].shape}"
        )
    scale = _from_known_range if known[0] else _clipped
    first, second = (scale(array, name) for name, array in arrays.items())
    return first, second


def _from_known_range(array: np.ndarray, name: str) -> _Signed:
    pixels = as_frames(array, name)
    highest = 255 if pixels.dtype == np.uint8 else 1
    return pixels.astype(np.float32) * np.float32(2 / highest) - 1


def _clipped(array: np.ndarray, name: str) -> _Signed:
    pixels = array if array.dtype == np.float64 else array.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{name} has pixels that are not finite")
    if (furthest := np.abs(pixels).max()) > _FURTHEST:
        raise ValueError(
            f"{name} in floating point has values from -1 to 1: got some of {furthest:.3g}; if "
            "they are from 0 to 255, cast them to uint8"
        )
    return np.clip(pixels, -1, 1)
