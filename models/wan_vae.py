"""The VAEs of Wan 2.1 and 2.2 (arXiv 2503.20314): videos to latents and back.

Both go through a video in chunks of one latent frame, in a scan: what they hold beside the video
does not grow with its length. Source of the architecture as released: diffusers `AutoencoderKLWan`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.layers import silu
from svg_jax.models.wan_vae_config import WanVAEConfig
from svg_jax.models.wan_vae_layers import (
    AttentionBlock,
    ChannelNorm,
    Downsample,
    Past,
    ResidualBlock,
    Upsample,
    causal_conv,
    convolve,
    run_layers,
)


class Level(nnx.Module):
    """The residual blocks of one size and the step to the next, if there is one.

    In 2.2 the input passes around them, averaged or repeated to the shape of the output.
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        num_blocks: int,
        resample: Downsample | Upsample | None,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = [features] + [out_features] * num_blocks
        self.blocks = nnx.List(
            [ResidualBlock(*pair, **kinds) for pair in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.resample = resample

    def __call__(
        self, x: Float[Array, "batch frames height width features"], past: Past
    ) -> tuple[Float[Array, "batch out_frames out_height out_width out_features"], Past]:
        """Applies the level."""
        layers = self.blocks if self.resample is None else [*self.blocks, self.resample]
        return run_layers(layers, x, past)


class Coder(nnx.Module):
    """What encoder and decoder have in common: layers of any kind between two convolutions."""

    def __init__(
        self,
        channels: int,
        features: int,
        layers: list[nnx.Module],
        out_features: int,
        out_channels: int,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input = causal_conv(channels, features, **kinds)
        self.layers = nnx.List(layers)
        self.norm = ChannelNorm(out_features, param_dtype=param_dtype)
        self.output = causal_conv(out_features, out_channels, **kinds)

    def __call__(
        self, x: Float[Array, "batch frames height width channels"], past: Past
    ) -> tuple[Float[Array, "batch out_frames out_height out_width out_channels"], Past]:
        """Codes one chunk; see `code_by_chunks`."""
        past_in, past_layers, past_out = past or (None, None, None)
        x, past_in = convolve(self.input, x, past_in)
        x, past_layers = run_layers(self.layers, x, past_layers)
        x, past_out = convolve(self.output, silu(self.norm(x)), past_out)
        return x, (past_in, past_layers, past_out)


def make_encoder(config: WanVAEConfig, **kinds: Any) -> Coder:
    """The encoder: from full size down, then the middle."""
    widths, steps = config.encoder_widths, config.temperal_downsample
    levels = [
        Level(
            features,
            out_features,
            config.num_res_blocks,
            Downsample(out_features, steps[i], **kinds) if i < len(steps) else None,
            **kinds,
        )
        for i, (features, out_features) in enumerate(
            zip((config.base_dim, *widths), widths, strict=False)
        )
    ]
    layers = [*levels, *_middle(widths[-1], **kinds)]
    return Coder(
        config.in_channels, config.base_dim, layers, widths[-1], 2 * config.z_dim, **kinds
    )


def make_decoder(config: WanVAEConfig, **kinds: Any) -> Coder:
    """The decoder: the middle, then up to full size."""
    widths, steps = config.decoder_widths, config.temperal_downsample[::-1]
    levels, features = [], widths[0]
    for i, out_features in enumerate(widths):
        after = out_features if config.is_residual else out_features // 2
        up = Upsample(out_features, after, steps[i], **kinds) if i < len(steps) else None
        levels.append(Level(features, out_features, config.num_res_blocks + 1, up, **kinds))
        features = after
    layers = [*_middle(widths[0], **kinds), *levels]
    return Coder(config.z_dim, widths[0], layers, widths[-1], config.out_channels, **kinds)


def _middle(features: int, **kinds: Any) -> list[nnx.Module]:
    return [
        ResidualBlock(features, features, **kinds),
        AttentionBlock(features, **kinds),
        ResidualBlock(features, features, **kinds),
    ]


def code_by_chunks(
    coder: Coder, x: Float[Array, "batch frames height width channels"], chunk_frames: int
) -> Float[Array, "batch out_frames out_height out_width out_channels"]:
    """Codes the first frame alone and then `chunk_frames` at a time."""
    first, past = coder(x[:, :1], None)
    if x.shape[1] == 1:
        return first
    chunks = x[:, 1:].reshape(len(x), -1, chunk_frames, *x.shape[2:])

    def step(past: Past, chunk: Array) -> tuple[Past, Array]:
        out, past = coder(chunk, past)
        return past, out

    _, rest = jax.lax.scan(step, past, jnp.moveaxis(chunks, 1, 0))
    rest = jnp.moveaxis(rest, 0, 1)
    return jnp.concatenate([first, rest.reshape(len(x), -1, *first.shape[2:])], axis=1)


class WanVAE(nnx.Module):
    """Encodes videos to latents and decodes latents.

    Attributes:
        config: The architecture.
    """

    def __init__(
        self,
        config: WanVAEConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: The architecture.
            dtype: Of convolutions and attention; norms and activations are float32 inside.
            param_dtype: Of the parameters.
            rngs: Source of random weights.
        """
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.encoder = make_encoder(config, **kinds)
        self.posterior_projection = nnx.Linear(2 * config.z_dim, 2 * config.z_dim, **kinds)
        self.latent_projection = nnx.Linear(config.z_dim, config.z_dim, **kinds)
        self.decoder = make_decoder(config, **kinds)

    def decode(
        self, latents: Float[Array, "batch z_dim latent_frames latent_height latent_width"]
    ) -> Float[Array, "batch channels frames height width"]:
        """Decodes latents (not normalised ones) to a video in [-1, 1].

        Args:
            latents: Latents.

        Returns:
            The video in `dtype`, of 1 + 4k frames for 1 + k latent ones.
        """
        x = self.latent_projection(jnp.moveaxis(latents, 1, -1))
        x = code_by_chunks(self.decoder, x, 1)
        return jnp.clip(jnp.moveaxis(x, -1, 1), -1, 1)

    def normalize(
        self, latents: Float[Array, "batch z_dim latent_frames latent_height latent_width"]
    ) -> Float[Array, "batch z_dim latent_frames latent_height latent_width"]:
        """Latents of mean 0 and deviation 1, as the transformer has them."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(
        self, latents: Float[Array, "batch z_dim latent_frames latent_height latent_width"]
    ) -> Float[Array, "batch z_dim latent_frames latent_height latent_width"]:
        """The inverse of `normalize`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Array) -> tuple[Array, Array]:
        mean, std = (
            np.reshape(values, (1, -1, 1, 1, 1))
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return jnp.asarray(mean, latents.dtype), jnp.asarray(std, latents.dtype)
