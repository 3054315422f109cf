"""CogVideoX's video autoencoder (arXiv 2408.06072): videos to latents and back, chunk by chunk.

Source of the architecture as released: diffusers `AutoencoderKLCogVideoX`. Its norms take their
statistics over a chunk of frames, so that the size of the chunks is part of the model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.cogvideox_vae_config import CogVideoXVAEConfig
from svg_jax.models.cogvideox_vae_layers import (
    Block,
    Downsample,
    Frames,
    SpatialNorm,
    Upsample,
    causal_conv,
    conv3d,
    group_norm,
)
from svg_jax.models.layers import silu

_ENCODED = 8  # frames of a chunk
_DECODED = 2  # latent frames of a chunk

# What the causal convolutions of input, blocks and output have to know of earlier frames.
Cache = tuple[Frames, tuple[Any, ...], Frames]


class Coder(nnx.Module):
    """An encoder or a decoder: convolution, blocks, norm, convolution."""

    def __init__(
        self,
        channels: int,
        widths: tuple[int, int],
        out_channels: int,
        blocks: list[Block],
        make_norm: Callable[[int], nnx.Module],
        **kinds: Any,
    ):
        self.input = conv3d(channels, widths[0], **kinds)
        self.blocks = nnx.List(blocks)
        self.norm = make_norm(widths[1])
        self.output = conv3d(widths[1], out_channels, **kinds)

    def __call__(
        self, chunk: Frames, cache: Cache | None, condition: tuple[Array, ...] = ()
    ) -> tuple[Frames, Cache]:
        """Returns the chunk's result and the cache for the next one; None begins a video."""
        first, pasts, last = cache or (None, [None] * len(self.blocks), None)
        hidden, first = causal_conv(self.input, chunk, first)
        following = []
        for block, past in zip(self.blocks, pasts, strict=True):
            hidden, past = block(hidden, past, condition)
            following.append(past)
        hidden = silu(self.norm(hidden, *condition)).astype(chunk.dtype)
        hidden, last = causal_conv(self.output, hidden, last)
        return hidden, (first, tuple(following), last)


def _encoder(config: CogVideoXVAEConfig, **kinds: Any) -> Coder:
    norms = {"groups": config.norm_num_groups, **kinds}
    norms.pop("dtype")
    layer_norm = partial(group_norm, epsilon=config.norm_eps, **norms)
    widths = config.block_out_channels
    blocks = []
    for level, (features, out_features) in enumerate(zip((widths[0], *widths), widths)):
        last = level == len(widths) - 1
        frames = level < config.temporal_levels
        resize = None if last else Downsample(out_features, frames=frames, **kinds)
        layers = config.layers_per_block
        blocks.append(Block(features, out_features, layers, layer_norm, resize, **kinds))
    blocks.append(Block(widths[-1], widths[-1], 2, layer_norm, None, **kinds))
    return Coder(
        config.in_channels,
        (widths[0], widths[-1]),
        2 * config.latent_channels,
        blocks,
        partial(group_norm, **norms),
        **kinds,
    )


def _decoder(config: CogVideoXVAEConfig, **kinds: Any) -> Coder:
    norm = partial(
        SpatialNorm,
        groups=config.norm_num_groups,
        latent_channels=config.latent_channels,
        **kinds,
    )
    widths = config.block_out_channels[::-1]
    blocks = [Block(widths[0], widths[0], 2, norm, None, **kinds)]
    for level, (features, out_features) in enumerate(zip((widths[0], *widths), widths)):
        last = level == len(widths) - 1
        frames = level < config.temporal_levels
        resize = None if last else Upsample(out_features, frames=frames, **kinds)
        layers = config.layers_per_block + 1
        blocks.append(Block(features, out_features, layers, norm, resize, **kinds))
    return Coder(
        config.latent_channels,
        (widths[0], widths[-1]),
        config.out_channels,
        blocks,
        norm,
        **kinds,
    )


class CogVideoXVAE(nnx.Module):
    """Encodes videos to a distribution of latents and decodes latents.

    Attributes:
        config: The architecture.
    """

    def __init__(
        self,
        config: CogVideoXVAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: The architecture.
            dtype: Of convolutions and the result; norms are float32 inside.
            param_dtype: Of the parameters.
            rngs: Source of random weights.
        """
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.encoder = _encoder(config, **kinds)
        self.decoder = _decoder(config, **kinds)

    def moments(self, video: Array) -> Array:
        def step(chunk: Array, cache: Any) -> tuple[Array, Any]:
            return self.encoder(chunk, cache)

        video = jnp.moveaxis(video, 1, -1).astype(self.dtype)
        return jnp.moveaxis(_in_chunks(step, video, _ENCODED), -1, 1)

    def decode(
        self, latents: Float[Array, "batch latent_channels latent_frames rows columns"]
    ) -> Float[Array, "batch out_channels frames height width"]:
        """Decodes latents.

        Args:
            latents: Latents as they are encoded: `denormalize` makes them of a transformer's.

        Returns:
            A video in `dtype`, about -1 to 1. An even number of latent frames gives
            temporal_compression_ratio times as many frames; of an odd number, the first is one
            frame.
        """

        def step(chunk: Array, cache: Any) -> tuple[Array, Any]:
            return self.decoder(chunk, cache, (chunk,))

        latents = jnp.moveaxis(latents, 1, -1).astype(self.dtype)
        return jnp.moveaxis(_in_chunks(step, latents, _DECODED), -1, 1)


def _in_chunks(
    step: Callable[[Array, Any], tuple[Array, Any]], x: Frames, size: int
) -> Frames:
    """Sends frames through `step` by `size`; the first chunk takes what is left over, too.

    Args:
        step: (chunk, cache or None) -> (its result, cache).
        x: Frames of at least one chunk, or less than one.
        size: Frames of a chunk.
    """
    batch, frames, *_ = x.shape
    out, cache = step(x[:, : size + frames % size], None)
    rest = x[:, size + frames % size :]
    if rest.shape[1] == 0:
        return out

    def next_step(cache: Any, chunk: Array) -> tuple[Any, Array]:
        out, cache = step(chunk, cache)
        return cache, out

    chunks = jnp.moveaxis(rest.reshape(batch, -1, size, *x.shape[2:]), 1, 0)
    _, outs = jax.lax.scan(next_step, cache, chunks)
    outs = jnp.moveaxis(outs, 0, 1).reshape(batch, -1, *out.shape[2:])
    return jnp.concatenate([out, outs], axis=1)
