"""Layers of CogVideoX's video autoencoder, over [batch, frames, height, width, channels].

They take a video in chunks: what a layer has to know of earlier frames goes in and comes out as its
cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.layers import silu

Frames = Float[Array, "batch frames height width channels"]
Pasts = tuple[Frames, Frames]  # of the two causal convolutions of a residual layer


def causal_conv(conv: nnx.Conv, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
    """Convolves frames with themselves and those before them.

    Args:
        conv: What `conv3d` made.
        x: Frames.
        past: The two frames before them; None repeats the first frame.

    Returns:
        As many frames, and the past of the next ones.
    """
    before = conv.kernel_size[0] - 1
    past = repeat(x[:, :1], before, axis=1) if past is None else past
    x = jnp.concatenate([past, x], axis=1)
    return conv(x), x[:, -before:]


def conv3d(features: int, out_features: int, **kinds: Any) -> nnx.Conv:
    """A convolution of three frames, rows and columns; only rows and columns are padded."""
    return nnx.Conv(features, out_features, (3, 3, 3), padding=((0, 0), (1, 1), (1, 1)), **kinds)


def repeat(x: Float[Array, "..."], times: int, axis: int) -> Float[Array, "..."]:
    """Repeats every element along an axis."""
    # Not jnp.repeat: this is a broadcast, which whatever reads it does on the fly.
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    dimensions = [dimension for dimension in range(len(shape)) if dimension != axis + 1]
    spread = jax.lax.broadcast_in_dim(x, shape, dimensions)
    return spread.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def repeat_frames(x: Frames, times: int) -> Frames:
    """Repeats every frame; but of an odd number, the first: it is one frame of the video."""
    if times == 1 or x.shape[1] == 1:
        return x
    if x.shape[1] % 2 == 0:
        return repeat(x, times, axis=1)
    return jnp.concatenate([x[:, :1], repeat(x[:, 1:], times, axis=1)], axis=1)


def halve_frames(x: Frames) -> Frames:
    """Averages every two frames; of an odd number the first stays alone."""
    alone, pairs = x[:, : x.shape[1] % 2], x[:, x.shape[1] % 2 :]
    pairs = pairs.reshape(x.shape[0], -1, 2, *x.shape[2:])
    means = jnp.mean(pairs.astype(jnp.float32), axis=2).astype(x.dtype)
    return jnp.concatenate([alone, means], axis=1)


def group_norm(
    features: int, groups: int, epsilon: float = 1e-6, *, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        features,
        groups,
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


class SpatialNorm(nnx.Module):
    """A group norm whose result the latents scale and shift, each over its rows and columns."""

    def __init__(
        self,
        features: int,
        groups: int,
        latent_channels: int,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = group_norm(features, groups, param_dtype=param_dtype, rngs=rngs)
        self.scale = nnx.Linear(latent_channels, features, **kinds)
        self.shift = nnx.Linear(latent_channels, features, **kinds)

    def __call__(
        self, x: Frames, latents: Float[Array, "batch latent_frames rows columns latent_channels"]
    ) -> Frames:
        """Normalises frames that these latents are decoded to; float32."""
        _, frames, height, _, _ = x.shape

        def enlarge(of_latents: Array) -> Array:
            size = of_latents.shape
            times = (frames - size[1] % 2) // max(size[1] - size[1] % 2, 1)
            enlarged = repeat_frames(of_latents.astype(jnp.float32), times)
            for axis in (2, 3):
                enlarged = repeat(enlarged, height // size[2], axis)
            return enlarged

        return self.norm(x) * enlarge(self.scale(latents)) + enlarge(self.shift(latents))


class ResidualLayer(nnx.Module):
    """Norm, SiLU, causal convolution; and again; plus what came in."""

    def __init__(
        self,
        features: int,
        out_features: int,
        make_norm: Callable[[int], nnx.Module],
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype = dtype
        self.norm_1 = make_norm(features)
        self.conv_1 = conv3d(features, out_features, **kinds)
        self.norm_2 = make_norm(out_features)
        self.conv_2 = conv3d(out_features, out_features, **kinds)
        if features != out_features:
            self.shortcut = nnx.Linear(features, out_features, **kinds)

    def __call__(
        self, x: Frames, pasts: Pasts | None, condition: tuple[Array, ...] = ()
    ) -> tuple[Frames, Pasts]:
        """Returns the next hidden state and the pasts of its successor; norms take `condition`."""
        past_1, past_2 = (None, None) if pasts is None else pasts
        hidden = silu(self.norm_1(x, *condition)).astype(self.dtype)
        hidden, past_1 = causal_conv(self.conv_1, hidden, past_1)
        hidden = silu(self.norm_2(hidden, *condition)).astype(self.dtype)
        hidden, past_2 = causal_conv(self.conv_2, hidden, past_2)
        if hasattr(self, "shortcut"):
            x = self.shortcut(x)
        return hidden + x, (past_1, past_2)


class Block(nnx.Module):
    """Residual layers, and a change of size where there is one."""

    def __init__(
        self,
        features: int,
        out_features: int,
        num_layers: int,
        make_norm: Callable[[int], nnx.Module],
        resize: nnx.Module | None,
        **kinds: Any,
    ):
        widths = [features] + [out_features] * num_layers
        make = partial(ResidualLayer, make_norm=make_norm, **kinds)
        self.layers = nnx.List(make(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.resize = resize

    def __call__(
        self,
        x: Frames,
        pasts: tuple[Pasts, ...] | None,
        condition: tuple[Array, ...] = (),
    ) -> tuple[Frames, tuple[Pasts, ...]]:
        """See `ResidualLayer`; a past for each layer."""
        following = []
        for layer, past in zip(self.layers, pasts or [None] * len(self.layers), strict=True):
            x, past = layer(x, past, condition)
            following.append(past)
        return (x if self.resize is None else self.resize(x)), tuple(following)


class Downsample(nnx.Module):
    """Halves height and width, and the frames if told."""

    def __init__(self, features: int, *, frames: bool, **kinds: Any):
        self.frames = frames
        padding = ((0, 1), (0, 1))
        self.conv = nnx.Conv(features, features, (3, 3), strides=2, padding=padding, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Returns the smaller video."""
        return self.conv(halve_frames(x) if self.frames else x)


class Upsample(nnx.Module):
    """Doubles height and width, and the frames if told."""

    def __init__(self, features: int, *, frames: bool, **kinds: Any):
        self.frames = frames
        self.conv = nnx.Conv(features, features, (3, 3), padding=1, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Returns the larger video."""
        x = self.conv(repeat(repeat(x, 2, axis=2), 2, axis=3))
        return repeat_frames(x, 2) if self.frames else x  # equal frames need one convolution
