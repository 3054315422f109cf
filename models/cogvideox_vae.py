"""CogVideoX's video autoencoder (arXiv 2408.06072): videos to latents and back, chunk by chunk.

Source of the architecture as released: diffusers `AutoencoderKLCogVideoX`. Its norms take their
statistics over a chunk of frames, so that the size of the chunks is part of the model.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.cogvideox_vae_config import CogVideoXVAEConfig
from svg_jax.models.cogvideox_vae_layers import (
    Block,
    Downsample,
    SpatialNorm,
    Upsample,
    causal_conv,
    conv3d,
)
from svg_jax.models.inputs import check_channels
from svg_jax.models.layers import Kinds, group_norm, silu
from svg_jax.models.vae import Frames, Past, Posterior, compiled, in_chunks, run_layers
from svg_jax.models.vae_tiling import Progress, Tiling, decode_tiles, encode_tiles

_ENCODED = 8  # frames of a chunk
_DECODED = 2  # latent frames of a chunk


class Coder(nnx.Module):
    """An encoder or a decoder: convolution, blocks, norm, convolution."""

    def __init__(
        self,
        channels: tuple[int, int],
        widths: tuple[int, int],
        blocks: list[Block],
        make_norm: Callable[[int], nnx.Module],
        **kinds: Unpack[Kinds],
    ):
        """Make a coder from its channels and widths, each at input and output, and its blocks."""
        self.input = conv3d(channels[0], widths[0], **kinds)
        self.blocks = nnx.List(blocks)
        self.norm = make_norm(widths[1])
        self.output = conv3d(widths[1], channels[1], **kinds)

    def __call__(
        self, chunk: Frames, past: Past, condition: tuple[Array, ...] = ()
    ) -> tuple[Frames, Past]:
        """Code one chunk; see `in_chunks`. Norms take `condition`."""
        past_in, past_blocks, past_out = past or (None, None, None)
        hidden, past_in = causal_conv(self.input, chunk, past_in)
        hidden, past_blocks = run_layers(self.blocks, hidden, past_blocks, condition)
        hidden = silu(self.norm(hidden, *condition)).astype(chunk.dtype)
        hidden, past_out = causal_conv(self.output, hidden, past_out)
        return hidden, (past_in, past_blocks, past_out)


def _make_encoder(config: CogVideoXVAEConfig, **kinds: Unpack[Kinds]) -> Coder:
    norm = partial(group_norm, groups=config.norm_num_groups, **kinds)
    layer_norm = partial(norm, epsilon=config.norm_eps)
    widths = config.block_out_channels
    blocks = []
    for level, (features, width) in enumerate(itertools.pairwise((widths[0], *widths))):
        frames = level < config.temporal_levels
        last = level == len(widths) - 1
        resize = None if last else Downsample(width, frames=frames, **kinds)
        blocks.append(Block(features, width, config.layers_per_block, layer_norm, resize, **kinds))
    blocks.append(Block(widths[-1], widths[-1], 2, layer_norm, None, **kinds))
    ends = (config.in_channels, 2 * config.latent_channels)
    return Coder(ends, (widths[0], widths[-1]), blocks, norm, **kinds)


def _make_decoder(config: CogVideoXVAEConfig, **kinds: Unpack[Kinds]) -> Coder:
    norm = partial(
        SpatialNorm, groups=config.norm_num_groups, latent_channels=config.latent_channels, **kinds
    )
    widths = config.block_out_channels[::-1]
    blocks = [Block(widths[0], widths[0], 2, norm, None, **kinds)]
    for level, (features, width) in enumerate(itertools.pairwise((widths[0], *widths))):
        frames = level < config.temporal_levels
        last = level == len(widths) - 1
        resize = None if last else Upsample(width, frames=frames, **kinds)
        blocks.append(Block(features, width, config.layers_per_block + 1, norm, resize, **kinds))
    ends = (config.latent_channels, config.out_channels)
    return Coder(ends, (widths[0], widths[-1]), blocks, norm, **kinds)


class CogVideoXVAE(nnx.Module):
    """Encodes videos to distributions of latents, and decodes latents.

    Attributes:
        config: Architecture.
    """

    def __init__(
        self,
        config: CogVideoXVAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Make a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of convolutions and results; norms are float32.
            param_dtype: Dtype of the parameters.
            rngs: Source of random weights.
        """
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.encoder = _make_encoder(config, **kinds)
        self.decoder = _make_decoder(config, **kinds)

    def encode(
        self,
        video: Float[Array, "batch channels frames height width"],
        *,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Posterior:
        """Encode a video as a distribution of latents; compiled inside.

        Args:
            video: Any number of frames from -1 to 1. The model was trained on one plus a multiple
                of temporal_compression_ratio.
            tiling: Sizes of tiles (`config.tiling` has the released ones), which take less memory
                and give another result; with tiles, call it outside of `jax.jit`. None encodes the
                video as a whole.
            progress: Function that is called after each tile with the tiles done and their number.

        Raises:
            ValueError: On a video that this model cannot take.
        """
        ratio = self.config.spatial_compression_ratio
        height, width = video.shape[-2:]
        check_channels("video", video, self.config.in_channels)
        for axis, size in (("height", height), ("width", width)):
            if size % ratio:
                raise ValueError(f"{axis}={size} must be a multiple of a latent's {ratio} pixels.")
        moments = encode_tiles(compiled(_encode, self), video, tiling, ratio, progress)
        return Posterior.from_moments(moments)

    def decode(
        self,
        latents: Float[Array, "batch channels latent_frames rows columns"],
        *,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Float[Array, "batch out_channels frames height width"]:
        """Decode latents; compiled inside.

        Args:
            latents: Latents from `encode`, or a transformer's after `denormalize`.
            tiling: See `encode`.
            progress: See `encode`.

        Returns:
            Frames in `dtype`, about from -1 to 1. Each latent frame gives
            temporal_compression_ratio of them, except that the first of an odd number gives one.

        Raises:
            ValueError: On latents that this model cannot take.
        """
        check_channels("latents", latents, self.config.latent_channels)
        ratio = self.config.spatial_compression_ratio
        return decode_tiles(compiled(_decode, self), latents, tiling, ratio, progress)

    def normalize(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale latents of a video for the transformer."""
        return _scale(latents, self.config.scaling_factor)

    def denormalize(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale the transformer's latents for `decode`: the inverse of `normalize`."""
        return _scale(latents, 1 / self.config.scaling_factor)

    def normalize_image(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale latents of an image for the transformer's condition.

        1.5 was trained with a division where `normalize` multiplies.
        """
        inverted = self.config.invert_scale_latents
        return self.denormalize(latents) if inverted else self.normalize(latents)


def _encode(vae: CogVideoXVAE, video: Frames) -> Frames:
    return _in_chunks(vae.encoder, video.astype(vae.dtype), _ENCODED)


def _decode(vae: CogVideoXVAE, latents: Frames) -> Frames:
    def step(chunk: Frames, past: Past) -> tuple[Frames, Past]:
        return vae.decoder(chunk, past, (chunk,))

    return _in_chunks(step, latents.astype(vae.dtype), _DECODED)


def _in_chunks(step: Callable[[Frames, Past], tuple[Frames, Past]], x: Frames, size: int) -> Frames:
    # The first chunk also takes the frames that are left over.
    return in_chunks(step, x, size + x.shape[1] % size, size)


def _scale(latents: Array, factor: float) -> Array:
    return (latents.astype(jnp.float32) * factor).astype(latents.dtype)
