"""What Wan's image-to-video models are told of their images.

An image is seen twice: by the VAE, as the first frame of a video that is grey behind it, and by
CLIP. Models of first and last frame see two images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.media.images import AnyImage, CLIPImageProcessor, Image, as_frame, images_of_each
from svg_jax.models import CLIPVisionEncoder, WanConfig, WanVAE
from svg_jax.sampling.components import Lazy, check_finite, in_memory, run_encoder
from svg_jax.sampling.latents import Compression
from svg_jax.sampling.settings import SettingError

_HIDDEN_STATE = -2  # of CLIP


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageConditions:
    """What a model is told of its images.

    Attributes:
        channels: Appended to the latents' channels: the mask of known frames, and the latents of
            the known frames among zeros; [batch, 4 + 16, latent_frames, height, width].
        features: CLIP's, [batch, image_tokens, features].
    """

    channels: Any
    features: Any

    def for_each(self, batch: int, times: int) -> "ImageConditions":
        """For a batch of videos: of one image for all, or of one for `times` videos each.

        Raises:
            ValueError: If there are neither one nor as many as prompts.
        """
        arrays = []
        for name, array in (("image_latents", self.channels), ("image_embeds", self.features)):
            if len(array) not in (1, batch // times):
                raise ValueError(
                    f"{name} must be one for all prompts or one for each of {batch // times}: got "
                    f"{len(array)}"
                )
            arrays.append(jnp.repeat(array, batch // len(array), axis=0))
        return ImageConditions(*arrays)


def encode_first_frames(
    config: WanConfig,
    size: tuple[int, int, int],
    compression: Compression,
    images: tuple[AnyImage | None, AnyImage | None],
    *,
    prompts: int,
    vae: WanVAE | Lazy[WanVAE] | None,
    image_encoder: CLIPVisionEncoder | Lazy[CLIPVisionEncoder] | None,
    image_processor: CLIPImageProcessor | None,
    image_embeds: Array | np.ndarray | None,
    image_latents: Array | np.ndarray | None,
) -> ImageConditions | None:
    """Encode images, or take what was encoded.

    Args:
        config: Config of the transformer.
        size: Frames, height and width of the video, in pixels.
        compression: What the VAE makes of a video.
        images: The first and the last frame of the video: of all videos, or of each prompt's.
        prompts: How many prompts there are.
        vae: What encodes them as a video.
        image_encoder: CLIP.
        image_processor: What CLIP does to images.
        image_embeds: Features to take in place of CLIP's.
        image_latents: Normalised latents to take in place of the VAE's.

    Returns:
        The conditions, of one image or of one for each prompt; None for text to video.

    Raises:
        ValueError: On what does not fit the checkpoint, or if something is missing.
    """
    given = {"image": images[0], "last_image": images[1]}
    given |= {"image_embeds": image_embeds, "image_latents": image_latents}
    if config.image_dim is None:
        if names := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"this is a text-to-video checkpoint: it takes no {' and no '.join(names)}"
            )
        return None
    with_last = config.pos_embed_seq_len is not None
    needed = image_embeds is None or image_latents is None
    known = _known_images(images, prompts, with_last, needed)
    if with_last and size[0] == 1:
        least = 1 + compression.frames
        raise SettingError(
            "num_frames", f"must be at least {least} between a first and a last frame: got 1"
        )
    if image_latents is None and vae is None:
        raise ValueError("this checkpoint was converted without its VAE: pass image_latents")
    if image_embeds is None and (image_encoder is None or image_processor is None):
        raise ValueError(
            "this checkpoint was converted without its image encoder: pass image_embeds"
        )
    if image_latents is None:
        assert vae is not None
        image_latents = _encode_video(vae, known, size)
    if image_embeds is None:
        assert image_encoder is not None
        assert image_processor is not None
        image_embeds = _encode_for_clip(image_encoder, image_processor, known)
    latents = jnp.asarray(image_latents, jnp.float32)
    features = jnp.asarray(image_embeds, jnp.float32)
    _check_arrays(config, size, compression, latents, features)
    mask = known_frames(latents.shape[2], with_last, compression.frames)
    mask = jnp.broadcast_to(mask, (len(latents), *mask.shape[:2], *latents.shape[3:]))
    return ImageConditions(jnp.concatenate([mask, latents], axis=1), features)


def known_frames(
    latent_frames: int, with_last: bool, ratio: int = 4
) -> Float[np.ndarray, "{ratio} latent_frames 1 1"]:
    """1 where a frame is an image and 0 elsewhere, for each of the frames of a latent frame.

    The first latent frame is of one frame, and counts as a whole one.
    """
    mask = np.zeros((ratio, latent_frames, 1, 1), np.float32)
    mask[:, 0] = 1
    if with_last:
        mask[-1, -1] = 1
    return mask


def _known_images(
    images: tuple[AnyImage | None, AnyImage | None], prompts: int, with_last: bool, needed: bool
) -> list[tuple[Image, ...]]:
    """The images of all videos or of each prompt's, checked against what the model takes."""
    known = {
        name: image
        for name, image in zip(("image", "last_image"), images, strict=True)
        if image is not None
    }
    if not needed:
        if known:
            raise ValueError("pass either images or both of image_embeds and image_latents")
        return []
    if images[0] is None:
        raise ValueError(
            "this is an image-to-video checkpoint: pass the image of its first frame (--image)"
        )
    if with_last and images[1] is None:
        raise ValueError(
            "this checkpoint makes videos between two frames: pass the last_image (--last-image)"
        )
    if not with_last and images[1] is not None:
        raise ValueError("this checkpoint takes one image: it has no use for a last_image")
    each = [images_of_each(image, prompts, name) for name, image in known.items()]
    count = max(map(len, each))
    return list(zip(*(some * (count // len(some)) for some in each), strict=True))


def _encode_video(
    vae: WanVAE | Lazy[WanVAE], images: Sequence[tuple[Image, ...]], size: tuple[int, int, int]
) -> Float[Array, "videos channels latent_frames latent_height latent_width"]:
    """Normalised latents of videos that have images at their ends and zeros for the rest."""
    latents = []
    with in_memory(vae) as module:
        for ends in images:  # one by one: a video in HD takes gigabytes
            video = np.zeros((1, 3, *size), np.float32)
            for frame, image in zip((0, -1), ends, strict=False):
                video[0, :, frame] = as_frame(image, *size[1:])
            mean = module.encode(jnp.asarray(video)).mean
            latents.append(module.normalize(mean.astype(jnp.float32)))
    return jnp.concatenate(latents)


def _encode_for_clip(
    encoder: CLIPVisionEncoder | Lazy[CLIPVisionEncoder],
    processor: CLIPImageProcessor,
    images: Sequence[tuple[Image, ...]],
) -> Float[Array, "videos image_tokens features"]:
    """CLIP's features of each video's images, one behind the other."""
    pixels = jnp.asarray(np.stack([processor(image) for ends in images for image in ends]))
    with in_memory(encoder) as module:
        features = run_encoder(module, pixels, hidden_state=_HIDDEN_STATE)
    return features.reshape(len(images), -1, features.shape[-1])


def _check_arrays(
    config: WanConfig,
    size: tuple[int, int, int],
    compression: Compression,
    latents: Array,
    features: Array,
) -> None:
    frames, height, width = size
    ratio, scale = compression
    grid = ((frames - 1) // ratio + 1, height // scale, width // scale)
    expected = (config.in_channels - config.out_channels - ratio, *grid)
    if latents.shape[1:] != expected:
        raise ValueError(
            f"image_latents must have the shape {('batch', *expected)}: got {latents.shape}"
        )
    tokens = config.pos_embed_seq_len or features.shape[1]
    if features.shape[1:] != (tokens, config.image_dim):
        raise ValueError(
            f"image_embeds must have the shape {('batch', tokens, config.image_dim)}: got "
            f"{features.shape}"
        )
    check_finite("image_latents", latents)
    check_finite("image_embeds", features)
