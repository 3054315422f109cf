"""CogVideoX's video autoencoder (arXiv 2408.06072): videos to latents and back, chunk by chunk.

Source of the architecture as released: diffusers `AutoencoderKLCogVideoX`. Its norms take their
statistics over a chunk of frames, so that the size of the chunks is part of the model.
"""

import itertools
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
)
from svg_jax.models.layers import group_norm, silu
from svg_jax.models.vae import Posterior
from svg_jax.models.vae_tiling import Progress, Tiling, decode_tiles, encode_tiles

_ENCODED = 8  # frames of a chunk
_DECODED = 2  # latent frames of a chunk

# What the causal convolutions of input, blocks and output have to know of earlier frames.
Cache = tuple[Frames, tuple[Any, ...], Frames]


class Coder(nnx.Module):
    """An encoder or a decoder: convolution, blocks, norm, convolution."""

    def __init__(
        self,
        channels: tuple[int, int],
        widths: tuple[int, int],
        blocks: list[Block],
        make_norm: Callable[[int], nnx.Module],
        **kinds: Any,
    ):
        """Makes it of channels and widths at its beginning and end, and what is between them."""
        self.input = conv3d(channels[0], widths[0], **kinds)
        self.blocks = nnx.List(blocks)
        self.norm = make_norm(widths[1])
        self.output = conv3d(widths[1], channels[1], **kinds)

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


def _make_encoder(
    config: CogVideoXVAEConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
) -> Coder:
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    norm = partial(group_norm, groups=config.norm_num_groups, param_dtype=param_dtype, rngs=rngs)
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
    return Coder(ends, (widths[0], widths[-1]), blocks, partial(norm, epsilon=1e-6), **kinds)


def _make_decoder(config: CogVideoXVAEConfig, **kinds: Any) -> Coder:
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
            dtype: Of convolutions and results; norms are float32 inside.
            param_dtype: Of the parameters.
            rngs: Source of random weights.
        """
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
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
        """Describes the latents of a video; compiled inside.

        Args:
            video: Frames from -1 to 1. One of them, and then some that temporal_compression_ratio
                divides, is what the model was trained on; any number is taken.
            tiling: Encode in tiles (`config.tiling` is the released one), which takes less memory
                and is not the same; call it outside of `jax.jit`. None encodes it as a whole.
            progress: Called with the tiles that are done and their number.

        Raises:
            ValueError: On a video that this model cannot take.
        """
        ratio = self.config.spatial_compression_ratio
        height, width = video.shape[-2:]
        _check_channels("video", video, self.config.in_channels)
        for axis, size in (("height", height), ("width", width)):
            if size % ratio:
                raise ValueError(f"{axis}={size} must be a multiple of a latent's {ratio} pixels.")
        run = partial(_encode, *nnx.split(self))
        if tiling is None:
            return Posterior.from_moments(run(video))
        return Posterior.from_moments(encode_tiles(run, video, tiling, ratio, progress))

    def decode(
        self,
        latents: Float[Array, "batch channels latent_frames rows columns"],
        *,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Float[Array, "batch out_channels frames height width"]:
        """Decodes latents; compiled inside.

        Args:
            latents: As `encode` describes them; `denormalize` makes them of a transformer's.
            tiling: See `encode`.
            progress: See `encode`.

        Returns:
            Frames in `dtype`, about from -1 to 1. Each latent frame gives
            temporal_compression_ratio of them; but of an odd number, the first gives one.

        Raises:
            ValueError: On latents that this model cannot take.
        """
        _check_channels("latents", latents, self.config.latent_channels)
        run = partial(_decode, *nnx.split(self))
        if tiling is None:
            return run(latents)
        ratio = self.config.spatial_compression_ratio
        return decode_tiles(run, latents, tiling, ratio, progress)

    def normalize(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Latents of a video as the transformer takes them."""
        return _scale(latents, self.config.scaling_factor)

    def denormalize(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The inverse of `normalize`: the transformer's latents as `decode` takes them."""
        return _scale(latents, 1 / self.config.scaling_factor)

    def normalize_image(self, latents: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Latents of an image as the transformer takes them for its condition.

        1.5 was trained with a division where `normalize` multiplies.
        """
        inverted = self.config.invert_scale_latents
        return self.denormalize(latents) if inverted else self.normalize(latents)


@partial(jax.jit, static_argnums=0)
def _encode(graph: Any, state: Any, video: Array) -> Array:
    vae = nnx.merge(graph, state)

    def step(chunk: Array, cache: Cache | None) -> tuple[Array, Cache]:
        return vae.encoder(chunk, cache)

    frames = jnp.moveaxis(video, 1, -1).astype(vae.dtype)
    return jnp.moveaxis(_in_chunks(step, frames, _ENCODED), -1, 1)


@partial(jax.jit, static_argnums=0)
def _decode(graph: Any, state: Any, latents: Array) -> Array:
    vae = nnx.merge(graph, state)

    def step(chunk: Array, cache: Cache | None) -> tuple[Array, Cache]:
        return vae.decoder(chunk, cache, (chunk,))

    frames = jnp.moveaxis(latents, 1, -1).astype(vae.dtype)
    return jnp.moveaxis(_in_chunks(step, frames, _DECODED), -1, 1)


def _in_chunks(
    step: Callable[[Array, Cache | None], tuple[Array, Cache]], x: Frames, size: int
) -> Frames:
    """Sends frames through `step` by `size`; the first chunk takes what is left over, too."""
    batch, frames, *_ = x.shape
    first = size + frames % size
    out, cache = step(x[:, :first], None)
    if frames <= first:
        return out

    def next_step(cache: Cache, chunk: Array) -> tuple[Cache, Array]:
        out, cache = step(chunk, cache)
        return cache, out

    chunks = x[:, first:].reshape(batch, -1, size, *x.shape[2:])
    _, outs = jax.lax.scan(next_step, cache, jnp.moveaxis(chunks, 1, 0))
    outs = jnp.moveaxis(outs, 0, 1).reshape(batch, -1, *out.shape[2:])
    return jnp.concatenate([out, outs], axis=1)


def _check_channels(name: str, x: Array, channels: int) -> None:
    if x.shape[1] != channels:
        raise ValueError(f"{name} has {x.shape[1]} channels and this model takes {channels}.")
    if 0 in x.shape:
        raise ValueError(f"{name} is {list(x.shape)}: there is nothing in it.")


def _scale(latents: Array, factor: float) -> Array:
    return (latents.astype(jnp.float32) * factor).astype(latents.dtype)
