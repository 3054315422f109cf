"""What Wan's image-to-video models are told of their images.

An image is seen twice: by the VAE, as the first frame of a video that is grey behind it, and by
CLIP. Models of first and last frame see two images.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.media.images import CLIPImageProcessor, Image, as_frame, images_of_each
from svg_jax.models import CLIPVisionEncoder, WanConfig, WanVAE
from svg_jax.sampling.components import Component, check_finite, in_memory, run_encoder
from svg_jax.sampling.latents import Compression
from svg_jax.sampling.settings import SettingError
from svg_jax.sampling.wan.settings import WanSettings

_HIDDEN_STATE = -2  # of CLIP


def encode_first_frames(
    config: WanConfig,
    settings: WanSettings,
    compression: Compression,
    *,
    vae: Component[WanVAE] | None,
    image_encoder: Component[CLIPVisionEncoder] | None,
    image_processor: CLIPImageProcessor | None,
) -> (
    tuple[
        Float[Array, "videos channels latent_frames latent_height latent_width"],
        Float[Array, "videos image_tokens features"],
    ]
    | None
):
    """Encode the images of a run, or take what was encoded.

    Args:
        config: Config of the transformer.
        settings: Settings of the run, all filled in.
        compression: Frames and pixels to a latent.
        vae: Autoencoder that encodes the images as a video.
        image_encoder: Image encoder of CLIP.
        image_processor: Preparation of images for it.

    Returns:
        The mask of known frames with their latents among zeros, to be appended to the channels; and
        CLIP's features. None for text to video.

    Raises:
        ValueError: On what does not fit the checkpoint, or if something is missing.
    """
    latents, features = settings.image_latents, settings.image_embeds
    if config.image_dim is None:
        names = ("image", "last_image", "image_embeds", "image_latents")
        if given := [name for name in names if getattr(settings, name) is not None]:
            raise ValueError(
                f"this is a text-to-video checkpoint: it takes no {' and no '.join(given)}"
            )
        return None
    with_last = config.pos_embed_seq_len is not None
    known = _known_images(settings, with_last)
    if with_last and settings.num_frames == 1:
        least = 1 + compression.frames
        raise SettingError(
            "num_frames", f"must be at least {least} between a first and a last frame: got 1"
        )
    if latents is None and vae is None:
        raise ValueError("this checkpoint was converted without its VAE: pass image_latents")
    if features is None and (image_encoder is None or image_processor is None):
        raise ValueError(
            "this checkpoint was converted without its image encoder: pass image_embeds"
        )
    _check_arrays(config, settings, compression, latents, features)
    if latents is None:
        assert vae is not None
        latents = _encode_video(vae, known, settings)
    if features is None:
        assert image_encoder is not None
        assert image_processor is not None
        features = _encode_for_clip(image_encoder, image_processor, known)
    latents, features = jnp.asarray(latents, jnp.float32), jnp.asarray(features, jnp.float32)
    _check_arrays(config, settings, compression, latents, features)
    mask = known_frames(latents.shape[2], with_last, compression.frames)
    mask = jnp.broadcast_to(mask, (len(latents), *mask.shape[:2], *latents.shape[3:]))
    channels = jnp.concatenate([mask, latents], axis=1)
    return _for_each(channels, settings.num_videos), _for_each(features, settings.num_videos)


def known_frames(
    latent_frames: int, with_last: bool, ratio: int = 4
) -> Float[np.ndarray, "{ratio} latent_frames 1 1"]:
    """Mark the known frames among the frames of every latent frame: 1 where one is an image.

    The first latent frame is of one frame, and counts as a whole one.
    """
    mask = np.zeros((ratio, latent_frames, 1, 1), np.float32)
    mask[:, 0] = 1
    if with_last:
        mask[-1, -1] = 1
    return mask


def _known_images(settings: WanSettings, with_last: bool) -> list[tuple[Image, ...]]:
    """Pair the images of all videos, or of each prompt's, checked against what the model takes."""
    given = {"image": settings.image, "last_image": settings.last_image}
    known = {name: image for name, image in given.items() if image is not None}
    if settings.image_latents is not None and settings.image_embeds is not None:
        if known:
            raise ValueError("pass either images or both of image_embeds and image_latents")
        return []
    if "image" not in known:
        raise ValueError(
            "image is missing: this is an image-to-video checkpoint, which needs its first frame"
        )
    if with_last and "last_image" not in known:
        raise ValueError("last_image is missing: this checkpoint makes videos between two frames")
    if not with_last and "last_image" in known:
        raise ValueError("this checkpoint takes one image: it has no use for a last_image")
    each = [images_of_each(image, settings.num_prompts, name) for name, image in known.items()]
    count = max(map(len, each))
    return list(zip(*(some * (count // len(some)) for some in each), strict=True))


def _encode_video(
    vae: Component[WanVAE], images: Sequence[tuple[Image, ...]], settings: WanSettings
) -> Float[Array, "videos channels latent_frames latent_height latent_width"]:
    """Encode videos that have images at their ends and zeros for the rest, and normalise them."""
    assert settings.num_frames is not None
    assert settings.height is not None
    assert settings.width is not None
    size, latents = (settings.height, settings.width), []
    with in_memory(vae) as module:
        for ends in images:  # one by one: a video in HD takes gigabytes
            video = np.zeros((1, 3, settings.num_frames, *size), np.float32)
            for frame, image in zip((0, -1), ends, strict=False):
                video[0, :, frame] = as_frame(image, *size)
            mean = module.encode(jnp.asarray(video)).mean
            latents.append(module.normalize(mean.astype(jnp.float32)))
    return jnp.concatenate(latents)


def _encode_for_clip(
    encoder: Component[CLIPVisionEncoder],
    processor: CLIPImageProcessor,
    images: Sequence[tuple[Image, ...]],
) -> Float[Array, "videos image_tokens features"]:
    """Encode each video's images by CLIP, one behind the other."""
    pixels = jnp.asarray(np.stack([processor(image) for ends in images for image in ends]))
    with in_memory(encoder) as module:
        features = run_encoder(module, pixels, hidden_state=_HIDDEN_STATE)
    return features.reshape(len(images), -1, features.shape[-1])


def _for_each(array: Array, videos: int) -> Array:
    """Repeat the entries of an array, of one image or of one for each prompt, for all videos."""
    return jnp.repeat(array, videos // len(array), axis=0)


def _check_arrays(
    config: WanConfig,
    settings: WanSettings,
    compression: Compression,
    latents: Array | np.ndarray | None,
    features: Array | np.ndarray | None,
) -> None:
    """Raise ValueError if latents or features do not fit model, size and prompts."""
    assert settings.num_frames is not None
    assert settings.height is not None
    assert settings.width is not None
    (ratio, scale), prompts = compression, settings.num_prompts
    grid = (settings.num_frames - 1) // ratio + 1, settings.height // scale, settings.width // scale
    expected = (config.in_channels - config.out_channels - ratio, *grid)
    if latents is not None and latents.shape[1:] != expected:
        raise ValueError(
            f"image_latents must have the shape {('batch', *expected)}: got {latents.shape}"
        )
    if features is not None:
        tokens = config.pos_embed_seq_len or features.shape[1]
        if features.shape[1:] != (tokens, config.image_dim):
            raise ValueError(
                f"image_embeds must have the shape {('batch', tokens, config.image_dim)}: got "
                f"{features.shape}"
            )
    for name, array in (("image_latents", latents), ("image_embeds", features)):
        if array is None:
            continue
        if len(array) not in (1, prompts):
            raise ValueError(
                f"{name} must be one for all prompts or one for each of {prompts}: got {len(array)}"
            )
        check_finite(name, array)
