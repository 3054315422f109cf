"""CogVideoX's latents: their shape for a size in pixels, and an image among them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.models import CogVideoXConfig

_VAE_SPATIAL = 8  # pixels of a latent, each way
# 1.5's config has the largest size that it has positions for; this is the one it is made for.
_SIZE_OF_1_5 = (768, 1360)


def latent_shape(
    config: CogVideoXConfig,
    *,
    has_vae: bool,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[tuple[int, int, int, int], int]:
    """Shape (frames, channels, height, width) of the latents of a video, and its padding frames.

    1.5 joins pairs of latent frames into tokens: an odd number of them is padded with leading
    noise, which is dropped at the end.

    Args:
        config: Of the transformer.
        has_vae: Whether latents are a VAE's; without one they are pixels.
        num_frames: In pixel space; None is what the checkpoint was trained at, as below.
        height: In pixels.
        width: In pixels.

    Raises:
        ValueError: On sizes that the model cannot take; says which it can.
    """
    scale = _VAE_SPATIAL if has_vae else 1
    default = (config.sample_height * scale, config.sample_width * scale)
    if config.patch_size_t is not None and has_vae:
        default = _SIZE_OF_1_5
    num_frames = config.sample_frames if num_frames is None else num_frames
    height = default[0] if height is None else height
    width = default[1] if width is None else width
    multiple = scale * config.patch_size
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 1 or pixels % multiple:
            raise ValueError(f"{name} must be a positive multiple of {multiple}: got {pixels}")
    ratio = config.temporal_compression_ratio if has_vae else 1
    if num_frames < 1 or (num_frames - 1) % ratio:
        what = f"of the form {ratio}k + 1" if ratio > 1 else "positive"
        raise ValueError(f"num_frames must be {what}: got {num_frames}")
    frames = (num_frames - 1) // ratio + 1
    padding_frames = -frames % (config.patch_size_t or 1)
    shape = (frames + padding_frames, config.out_channels, height // scale, width // scale)
    return shape, padding_frames


def place_image(
    image_latents: Float[Array | np.ndarray, "batch 1 channels height width"], num_frames: int
) -> Float[Array, "batch frames channels height width"]:
    """The image's latent frame at the start of a video, and zeros behind it.

    With 1.5 it stands, as in diffusers, in the padding frame if there is one.
    """
    image = jnp.asarray(image_latents, jnp.float32)
    return jnp.pad(image, ((0, 0), (0, num_frames - 1), (0, 0), (0, 0), (0, 0)))
