"""What CogVideoX's image-to-video models are told of their image.

It is the first latent frame of a video that is zero behind it. Its latents are drawn from the VAE's
posterior: beside the initial noise, the only random numbers of image to video.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.media.images import AnyImage, Image, as_frame, images_of_each
from svg_jax.models import CogVideoXConfig, CogVideoXVAE
from svg_jax.sampling.components import Lazy, check_finite, in_memory
from svg_jax.sampling.latents import place_image
from svg_jax.sampling.schedules.noise import image_noise_of

# One for all prompts, or one for each; the rank alone, for errors that say what to do.
ImageLatents = Float[Array | np.ndarray, "_images _frames _channels _height _width"]


def check_image(
    config: CogVideoXConfig,
    *,
    has_encoder: bool,
    image: AnyImage | None,
    image_latents: ImageLatents | None,
    image_noise: ImageLatents | None,
) -> None:
    """ValueError if what was given does not fit the checkpoint, before anything is encoded."""
    given = {"image": image, "image_latents": image_latents, "image_noise": image_noise}
    names = [name for name, value in given.items() if value is not None]
    if config.in_channels == config.out_channels:
        if names:
            raise ValueError(
                f"this is a text-to-video checkpoint: it takes no {' and no '.join(names)}"
            )
        return
    if image is None and image_latents is None:
        raise ValueError(
            "this is an image-to-video checkpoint: pass the image of its first frame (--image), or "
            "its image_latents"
        )
    if image_latents is not None and len(names) > 1:
        raise ValueError(f"pass either {names[0]} or {names[1]}")
    if image is not None and not has_encoder:
        raise ValueError("this checkpoint was converted without its VAE: pass image_latents")


def encode_first_frame(
    shape: tuple[int, int, int, int, int],
    prompts: int,
    *,
    vae: CogVideoXVAE | Lazy[CogVideoXVAE] | None,
    image: AnyImage | None,
    image_latents: ImageLatents | None,
    image_noise: ImageLatents | None,
    seed: int,
) -> Float[Array, "batch frames channels height width"] | None:
    """Encode an image, or take what was encoded; None if there is neither.

    Args:
        shape: Batch, frames, channels, height and width of the video's latents.
        prompts: How many there are; the batch is of as many videos of each.
        vae: What encodes an image.
        image: One for all prompts, or one for each.
        image_latents: In its place: scaled as the model expects them.
        image_noise: Standard normal numbers that the latents are drawn with, in place of the
            seed's; of image_latents' shape.
        seed: Seed of that noise.

    Returns:
        What is appended to the latents' channels.

    Raises:
        ValueError: On another number of images than of prompts, or arrays that do not fit.
    """
    if image is not None:
        assert vae is not None
        image_latents = _draw_latents(vae, images_of_each(image, prompts), shape, image_noise, seed)
    if image_latents is None:
        return None
    expected = (prompts, 1, *shape[2:])
    if image_latents.shape not in (expected, (1, *expected[1:])):
        raise ValueError(f"image_latents must have the shape {expected}: got {image_latents.shape}")
    check_finite("image_latents", image_latents)
    each = jnp.repeat(jnp.asarray(image_latents), shape[0] // len(image_latents), axis=0)
    return place_image(each, shape[1])


def _draw_latents(
    vae: CogVideoXVAE | Lazy[CogVideoXVAE],
    images: Sequence[Image],
    shape: tuple[int, int, int, int, int],
    noise: ImageLatents | None,
    seed: int,
) -> Float[Array, "images 1 channels height width"]:
    expected = (len(images), 1, *shape[2:])
    if noise is None:
        noise = image_noise_of(seed, expected)
    if noise.shape != expected:
        raise ValueError(f"image_noise must have the shape {expected}: got {noise.shape}")
    check_finite("image_noise", noise)
    scale = vae.config.spatial_compression_ratio
    frames = np.stack([as_frame(image, scale * shape[3], scale * shape[4]) for image in images])
    with in_memory(vae) as module:
        posterior = module.encode(jnp.asarray(frames)[:, :, None])
        drawn = posterior.sample(jnp.asarray(noise, jnp.float32).swapaxes(1, 2))
        return module.normalize_image(drawn.astype(jnp.float32)).swapaxes(1, 2)
