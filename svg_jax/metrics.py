"""How far one video is from another: PSNR and SSIM, as the paper's comparison uses them.

Both compare the sparse video with the dense one of the same noise, before any encoding, as float
arrays with pixels in −1…1 (values outside are clipped).
"""

import numpy as np
from jaxtyping import Float

Video = Float[np.ndarray, "frames height width channels"]
Reference = Float[np.ndarray, "..."]
SSIM_WINDOW = 11  # pixels a side: σ = 1.5, cut at 3.5σ


def _check_same_shape(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape:
        raise ValueError(
            f"two videos of one shape can be compared: got {video.shape} and {reference.shape}"
        )


def psnr(video: Video, reference: Reference) -> float:
    """Peak signal-to-noise ratio over a whole video, 10·log10(4 / MSE) in dB; inf if equal.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_same_shape(video, reference)
    difference = np.clip(video, -1, 1).astype(np.float64) - np.clip(reference, -1, 1)
    error = np.mean(difference**2)
    return float("inf") if error == 0 else float(10 * np.log10(4 / error))


def ssim(video: Video, reference: Reference) -> float:
    """Structural similarity with a Gaussian window of σ = 1.5 (Wang et al. 2004), mean over frames.

    Raises:
        ValueError: If the shapes differ, or a frame is smaller than the window of 11 pixels.
    """
    from skimage.metrics import structural_similarity

    _check_same_shape(video, reference)
    if min(video.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels each way: got {video.shape[1:3]}")
    return float(
        np.mean(
            [
                structural_similarity(
                    np.clip(frame, -1, 1).astype(np.float64),
                    np.clip(reference_frame, -1, 1).astype(np.float64),
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                    data_range=2,
                    channel_axis=-1,
                )
                for frame, reference_frame in zip(video, reference, strict=True)
            ]
        )
    )
