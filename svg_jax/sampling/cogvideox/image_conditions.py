"""What CogVideoX's image-to-video models are told of their image.

It is the first latent frame of a video that is zero behind it. Its latents are drawn from the VAE's
posterior: beside the initial noise, the only random numbers of image to video.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.media.images import as_frame, images_of_each
from svg_jax.models import CogVideoXConfig, CogVideoXVAE
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.components import Component, check_finite, in_memory
from svg_jax.sampling.latents import check_shape, place_image
from svg_jax.sampling.schedules.noise import image_noise_of


def check_image(
    config: CogVideoXConfig,
    settings: CogVideoXSettings,
    shape: tuple[int, ...],
    *,
    has_encoder: bool,
) -> None:
    """Check the image of a run, before anything is encoded.

    Args:
        config: Config of the transformer.
        settings: Settings of the run.
        shape: Batch, frames, channels, height and width of the video's latents.
        has_encoder: Whether there is a VAE.

    Raises:
        ValueError: If it does not fit the checkpoint.
    """
    names = [
        name
        for name in ("image", "image_latents", "image_noise")
        if getattr(settings, name) is not None
    ]
    if config.in_channels == config.out_channels:
        if names:
            raise ValueError(
                f"this is a text-to-video checkpoint: it takes no {' and no '.join(names)}"
            )
        return
    if settings.image is None and settings.image_latents is None:
        raise ValueError(
            "image is missing: this is an image-to-video checkpoint, which needs its first "
            "frame, or the image_latents of it"
        )
    if settings.image_latents is not None and len(names) > 1:
        raise ValueError(f"pass either {names[0]} or {names[1]}")
    if settings.image is not None and not has_encoder:
        raise ValueError("this checkpoint was converted without its VAE: pass image_latents")
    of_each = (settings.num_prompts, 1, *shape[2:])
    check_shape("image_latents", settings.image_latents, of_each, (1, *of_each[1:]))
    images = 1 if settings.image is None else len(images_of_each(settings.image, of_each[0]))
    check_shape("image_noise", settings.image_noise, (images, *of_each[1:]))


def encode_first_frame(
    settings: CogVideoXSettings,
    shape: tuple[int, ...],
    *,
    vae: Component[CogVideoXVAE] | None,
    seed: int,
) -> Float[Array, "batch frames channels height width"] | None:
    """Encode the image of a run, or take its latents; None for text to video.

    Args:
        settings: Settings of the run, whose image was checked.
        shape: Batch, frames, channels, height and width of the video's latents.
        vae: Autoencoder that encodes images.
        seed: Seed of the noise that the latents are drawn with, unless that is given.

    Returns:
        Channels that are appended to those of the latents.

    Raises:
        ValueError: If the VAE gives no finite latents.
    """
    image_latents = settings.image_latents
    if settings.image is not None:
        assert vae is not None
        image_latents = _draw_latents(vae, settings, shape, seed)
        check_finite("image_latents", image_latents)
    if image_latents is None:
        return None
    each = jnp.repeat(jnp.asarray(image_latents), shape[0] // len(image_latents), axis=0)
    return place_image(each, shape[1])


def _draw_latents(
    vae: Component[CogVideoXVAE], settings: CogVideoXSettings, shape: tuple[int, ...], seed: int
) -> Float[Array, "images 1 channels height width"]:
    images, noise = images_of_each(settings.image, settings.num_prompts), settings.image_noise
    if noise is None:
        noise = image_noise_of(seed, (len(images), 1, *shape[2:]))
    scale = vae.config.spatial_compression_ratio
    frames = np.stack([as_frame(image, scale * shape[3], scale * shape[4]) for image in images])
    with in_memory(vae) as module:
        posterior = module.encode(jnp.asarray(frames)[:, :, None])
        drawn = posterior.sample(jnp.asarray(noise, jnp.float32).swapaxes(1, 2))
        return module.normalize_image(drawn.astype(jnp.float32)).swapaxes(1, 2)
