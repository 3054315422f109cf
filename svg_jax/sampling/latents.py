"""Latents: their shape for a size in pixels, the initial ones, and the pixels of the last."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.models import CogVideoXConfig
from svg_jax.sampling.schedules.noise import initial_noise
from svg_jax.sampling.settings import SettingError

# 1.5's config has the largest size that it has positions for; this is the one it is made for.
_SIZE_OF_1_5 = (768, 1360)


class Compression(NamedTuple):
    """Factors by which a VAE compresses a video.

    Attributes:
        frames: Number of frames in a latent frame; the first latent frame has one.
        pixels: Number of pixels in a latent, each way.
    """

    frames: int
    pixels: int


RELEASED = Compression(4, 8)  # of every released VAE but Wan 2.2's; taken where there is no VAE
NO_VAE = Compression(1, 1)  # latents are pixels


def latent_shape(
    config: CogVideoXConfig, num_frames: int, height: int, width: int, compression: Compression
) -> tuple[tuple[int, int, int, int], int]:
    """Compute the shape (frames, channels, height, width) of CogVideoX's latents of a video.

    Any number of frames has latents, as in diffusers. 1.5 joins pairs of latent frames into tokens:
    an odd number of them is padded with leading noise, which is dropped at the end.

    Args:
        config: Config of the transformer.
        num_frames: Number of frames.
        height: Height in pixels.
        width: Width in pixels.
        compression: Compression by the VAE.

    Returns:
        The shape, and the number of padding frames in it.

    Raises:
        SettingError: On sizes that the model cannot take; names those that it can.
    """
    rows, columns = latent_size(height, width, compression, config.patch_size)
    frames = (num_frames - 1) // compression.frames + 1
    padding_frames = -frames % (config.patch_size_t or 1)
    return (frames + padding_frames, config.out_channels, rows, columns), padding_frames


def trained_size(config: CogVideoXConfig, compression: Compression) -> tuple[int, int, int]:
    """Compute the frames, height and width that a CogVideoX was trained at."""
    if config.patch_size_t is not None and compression != NO_VAE:
        return config.sample_frames, *_SIZE_OF_1_5
    scale = compression.pixels
    return config.sample_frames, config.sample_height * scale, config.sample_width * scale


def decoded_frames(latent_frames: int, compression: Compression) -> int:
    """Count the frames that CogVideoX's VAE decodes: an even number has no single first one."""
    if latent_frames % 2 == 0:
        return latent_frames * compression.frames
    return (latent_frames - 1) * compression.frames + 1


def latent_grid(
    num_frames: int, height: int, width: int, *, compression: Compression, patch_size: int
) -> tuple[int, int, int]:
    """Compute the latent frames, rows and columns of a video of whole latent frames.

    Args:
        num_frames: Number of frames.
        height: Height in pixels.
        width: Width in pixels.
        compression: Compression by the VAE.
        patch_size: Number of latents in a token, each way.

    Raises:
        SettingError: On sizes that the model cannot take; names those that it can.
    """
    if (num_frames - 1) % compression.frames:
        raise SettingError(
            "num_frames", f"must be of the form {compression.frames}k + 1: got {num_frames}"
        )
    frames = (num_frames - 1) // compression.frames + 1
    return frames, *latent_size(height, width, compression, patch_size)


def latent_size(
    height: int, width: int, compression: Compression, patch_size: int
) -> tuple[int, int]:
    """Compute the latent rows and columns of a video; see `latent_grid`."""
    multiple = compression.pixels * patch_size
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 1 or pixels % multiple:
            raise SettingError(name, f"must be a positive multiple of {multiple}: got {pixels}")
    return height // compression.pixels, width // compression.pixels


def starting_latents(
    latents: Array | np.ndarray | None, shape: tuple[int, ...], seed: int
) -> Float[Array, "..."]:
    """Take the initial noise that was given, or draw it; float32.

    Raises:
        SettingError: If given noise has another shape.
    """
    if latents is None:
        return jnp.asarray(initial_noise(seed, shape))
    check_shape("latents", latents, shape)
    return jnp.asarray(latents, jnp.float32)


def check_shape(field: str, array: Any, *shapes: tuple[int, ...]) -> None:
    """Raise SettingError unless an array, if there is one, has one of some shapes."""
    if array is not None and array.shape not in shapes:
        raise SettingError(field, f"must have the shape {shapes[0]}: got {array.shape}")


def place_image(
    image_latents: Float[Array | np.ndarray, "batch 1 channels height width"], num_frames: int
) -> Float[Array, "batch frames channels height width"]:
    """Put an image's latent frame at the start of a video, and zeros behind it.

    With 1.5 it stands, as in diffusers, in the padding frame if there is one.
    """
    image = jnp.asarray(image_latents, jnp.float32)
    return jnp.pad(image, ((0, 0), (0, num_frames - 1), (0, 0), (0, 0), (0, 0)))


def to_frames(
    video: Float[Array | np.ndarray, "batch 3 frames height width"],
) -> Float[np.ndarray, "batch frames height width 3"]:
    """Turn a video from −1 to 1 into pixels in 0…1, float32."""
    video = np.moveaxis(np.asarray(video, np.float32), 1, -1)
    return np.clip(video / 2 + np.float32(0.5), 0, 1)


def is_480p(height: int, width: int) -> bool:
    """Tell whether a video has a number of pixels nearer to 480 × 832 than to 720 × 1280."""
    return 2 * height * width < 480 * 832 + 720 * 1280
