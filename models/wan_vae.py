"""The VAEs of Wan 2.1 and 2.2 (arXiv 2503.20314): videos to latents and back.

Both take a video in chunks of one latent frame, in a scan: the memory that they need beside the
video does not grow with its length. Source of the architecture as released: diffusers
`AutoencoderKLWan`.
"""

from itertools import pairwise
from typing import Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.layers import Kinds, silu
from svg_jax.models.vae import Frames, Past, Posterior, compiled, in_chunks, run_layers
from svg_jax.models.vae_tiling import Progress, Tiling, decode_tiles, encode_tiles
from svg_jax.models.wan_vae_config import WanVAEConfig
from svg_jax.models.wan_vae_layers import (
    AttentionBlock,
    AverageDown,
    ChannelNorm,
    Downsample,
    RepeatUp,
    ResidualBlock,
    Upsample,
    causal_conv,
    channels_to_pixels,
    convolve,
    pixels_to_channels,
)


class Level(nnx.Module):
    """The residual blocks of one size and the step to the next; in 2.2 with a shortcut around."""

    def __init__(
        self,
        features: int,
        out_features: int,
        num_blocks: int,
        resample: Downsample | Upsample | None,
        shortcut: AverageDown | RepeatUp | None,
        **kinds: Unpack[Kinds],
    ):
        widths = [features] + [out_features] * num_blocks
        self.blocks = nnx.List([ResidualBlock(*pair, **kinds) for pair in pairwise(widths)])
        self.resample = resample
        self.shortcut = shortcut

    def __call__(self, x: Frames, past: Past) -> tuple[Frames, Past]:
        """Apply the level."""
        layers = self.blocks if self.resample is None else [*self.blocks, self.resample]
        out, next_past = run_layers(layers, x, past)
        if self.shortcut is not None:
            out = out + self.shortcut(x, first=past is None)
        return out, next_past


class Coder(nnx.Module):
    """An encoder or a decoder: layers of any kind between two convolutions."""

    def __init__(
        self,
        channels: int,
        features: int,
        layers: list[nnx.Module],
        out_features: int,
        out_channels: int,
        **kinds: Unpack[Kinds],
    ):
        self.input = causal_conv(channels, features, **kinds)
        self.layers = nnx.List(layers)
        self.norm = ChannelNorm(out_features, kinds["param_dtype"])
        self.output = causal_conv(out_features, out_channels, **kinds)

    def __call__(self, x: Frames, past: Past) -> tuple[Frames, Past]:
        """Code one chunk; see `in_chunks`."""
        past_in, past_layers, past_out = past or (None, None, None)
        x, past_in = convolve(self.input, x, past_in)
        x, past_layers = run_layers(self.layers, x, past_layers)
        x, past_out = convolve(self.output, silu(self.norm(x)), past_out)
        return x, (past_in, past_layers, past_out)


def make_encoder(config: WanVAEConfig, **kinds: Unpack[Kinds]) -> Coder:
    """Make the encoder: from full size down, then the middle."""
    levels, features = [], config.base_dim
    steps = (*config.temperal_downsample, None)  # the last size has none
    for width, temporal in zip(config.encoder_widths, steps, strict=True):
        down = None if temporal is None else Downsample(width, temporal, **kinds)
        shortcut = None
        if config.is_residual:
            shortcut = AverageDown(features, width, 2 if temporal else 1, 2 if down else 1)
        levels.append(Level(features, width, config.num_res_blocks, down, shortcut, **kinds))
        features = width
    layers = [*levels, *_middle(features, **kinds)]
    return Coder(config.in_channels, config.base_dim, layers, features, 2 * config.z_dim, **kinds)


def make_decoder(config: WanVAEConfig, **kinds: Unpack[Kinds]) -> Coder:
    """Make the decoder: the middle, then up to full size."""
    levels, features = [], config.decoder_widths[0]
    layers = _middle(features, **kinds)
    steps = (*reversed(config.temperal_downsample), None)
    for width, temporal in zip(config.decoder_widths, steps, strict=True):
        up, shortcut, next_features = None, None, width
        if temporal is not None:
            if config.is_residual:
                shortcut = RepeatUp(features, width, 2 if temporal else 1, 2)
            else:
                next_features = width // 2
            up = Upsample(width, next_features, temporal, **kinds)
        levels.append(Level(features, width, config.num_res_blocks + 1, up, shortcut, **kinds))
        features = next_features
    layers = [*layers, *levels]
    first, *_ = config.decoder_widths
    return Coder(config.z_dim, first, layers, features, config.out_channels, **kinds)


def _middle(features: int, **kinds: Unpack[Kinds]) -> list[nnx.Module]:
    return [
        ResidualBlock(features, features, **kinds),
        AttentionBlock(features, **kinds),
        ResidualBlock(features, features, **kinds),
    ]


class WanVAE(nnx.Module):
    """Encodes videos as a distribution of latents, and decodes latents.

    Both are compiled inside, once for each shape; with a tiling, call them outside of `jax.jit`.

    Attributes:
        config: Architecture.
    """

    def __init__(
        self,
        config: WanVAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Make a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of convolutions and attention; norms and activations are float32.
            param_dtype: Dtype of the parameters.
            rngs: Source of random weights.
        """
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.encoder = make_encoder(config, **kinds)
        self.posterior_projection = nnx.Linear(2 * config.z_dim, 2 * config.z_dim, **kinds)
        self.latent_projection = nnx.Linear(config.z_dim, config.z_dim, **kinds)
        self.decoder = make_decoder(config, **kinds)

    def encode(
        self,
        video: Float[Array, "batch channels frames height width"],
        *,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Posterior:
        """Encode a video in [-1, 1] as a distribution of latents.

        Args:
            video: Video of 1 + 4k frames.
            tiling: Sizes of tiles, which in 2.2 (as released) are twice as high and as wide; None
                for no tiles.
            progress: Function that is called after each tile with the tiles done and their number.

        Returns:
            The distribution of 1 + k latent frames, in `dtype`.

        Raises:
            ValueError: On a video that this model cannot take; see `WanVAEConfig.check_video`.
        """
        config, (height, width) = self.config, video.shape[-2:]
        config.check_video(*video.shape[1:])
        x = pixels_to_channels(video, config.patch)
        ratio = config.scale_factor_spatial // config.patch
        fits = tiling is None or tiling.holds(height, width)
        if tiling is not None and not fits:
            strides = (tiling.stride_height, tiling.stride_width)
            for size, stride in zip(x.shape[-2:], strides, strict=True):
                if 0 < size % stride < ratio:
                    raise ValueError(
                        f"a {height}x{width} video leaves {size % stride} pixels to its last tile, "
                        f"which needs {ratio}: take another size or tiling."
                    )
        encode = compiled(_encode, self)
        return Posterior.from_moments(encode_tiles(encode, x, tiling, ratio, progress, fits=fits))

    def decode(
        self,
        latents: Float[Array, "batch z_dim latent_frames latent_height latent_width"],
        *,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Float[Array, "batch channels frames height width"]:
        """Decode latents (not normalised ones) to a video in [-1, 1].

        Args:
            latents: Latents of 1 + k frames.
            tiling: Sizes of tiles in pixels; None for no tiles.
            progress: See `encode`.

        Returns:
            The video of 1 + 4k frames, in `dtype`.

        Raises:
            ValueError: On latents of another model, or of no size.
        """
        config = self.config
        if latents.shape[1] != config.z_dim or 0 in latents.shape:
            raise ValueError(
                f"latents are {list(latents.shape)} and must be [batch, {config.z_dim}, latent "
                "frames, latent rows, latent columns], all at least 1."
            )
        tiling = tiling and tiling.in_latents(config.patch)
        ratio = config.scale_factor_spatial // config.patch
        x = decode_tiles(compiled(_decode, self), latents, tiling, ratio, progress)
        return jnp.clip(channels_to_pixels(x, config.patch), -1, 1)

    def normalize(
        self, latents: Float[Array, "batch z_dim latent_frames latent_height latent_width"]
    ) -> Float[Array, "batch z_dim latent_frames latent_height latent_width"]:
        """Scale and shift latents to mean 0 and deviation 1, for the transformer."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(
        self, latents: Float[Array, "batch z_dim latent_frames latent_height latent_width"]
    ) -> Float[Array, "batch z_dim latent_frames latent_height latent_width"]:
        """Invert `normalize`, for `decode`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Array) -> tuple[Array, Array]:
        mean, std = (
            np.reshape(values, (1, -1, 1, 1, 1))
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return jnp.asarray(mean, latents.dtype), jnp.asarray(std, latents.dtype)


def _encode(vae: WanVAE, video: Frames) -> Frames:
    moments = in_chunks(vae.encoder, video, 1, vae.config.scale_factor_temporal)
    return vae.posterior_projection(moments)


def _decode(vae: WanVAE, latents: Frames) -> Frames:
    return in_chunks(vae.decoder, vae.latent_projection(latents), 1, 1)
