"""Layers of the Wan VAEs, which take a video chunk by chunk; see `vae`.

The first chunk holds a single frame. Time is causal: chunks one after the other give the same as
all frames at once.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.attention import dense_attention
from svg_jax.models.layers import Kinds, silu
from svg_jax.models.layout import VideoLayout
from svg_jax.models.vae import Frames, Past


def causal_conv(
    features: int,
    out_features: int,
    kernel_size: tuple[int, int, int] = (3, 3, 3),
    **kinds: Unpack[Kinds],
) -> nnx.Conv:
    """Make a convolution for `convolve`, which keeps rows and columns and gives fewer frames."""
    space = [(size // 2, size // 2) for size in kernel_size[1:]]
    return nnx.Conv(features, out_features, kernel_size, padding=((0, 0), *space), **kinds)


def convolve(conv: nnx.Conv, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
    """Convolve a chunk with the frames before it, and zeros before the first."""
    past = empty_past(conv, x) if past is None else past
    x = jnp.concatenate([past, x.astype(past.dtype)], axis=1)
    return conv(x), x[:, -past.shape[1] :]


def empty_past(conv: nnx.Conv, x: Frames) -> Frames:
    """Make the frames that `convolve` sees before a video's first: zeros."""
    return jnp.zeros((len(x), conv.kernel_size[0] - 1, *x.shape[2:]), conv.dtype)


class ChannelNorm(nnx.Module):
    """An RMS norm of each pixel's channels, without an epsilon and in float32."""

    def __init__(self, features: int, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Float[Array, "*pixels features"]) -> Float[Array, "*pixels features"]:
        """Normalise every pixel."""
        x = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        scale = math.sqrt(x.shape[-1]) * self.scale[...].astype(jnp.float32)
        return (
            x
            / jnp.sqrt(jnp.maximum(squares, 1e-24))
            * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        )


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, added to the input."""

    def __init__(self, features: int, out_features: int, **kinds: Unpack[Kinds]):
        self.norm1 = ChannelNorm(features, kinds["param_dtype"])
        self.conv1 = causal_conv(features, out_features, **kinds)
        self.norm2 = ChannelNorm(out_features, kinds["param_dtype"])
        self.conv2 = causal_conv(out_features, out_features, **kinds)
        if features != out_features:
            self.shortcut = nnx.Linear(features, out_features, **kinds)

    def __call__(self, x: Frames, past: Past) -> tuple[Frames, Past]:
        """Apply the block."""
        past1, past2 = past or (None, None)
        out, past1 = convolve(self.conv1, silu(self.norm1(x)), past1)
        out, past2 = convolve(self.conv2, silu(self.norm2(out)), past2)
        return (self.shortcut(x) if hasattr(self, "shortcut") else x) + out, (past1, past2)


class AttentionBlock(nnx.Module):
    """Attention of one head to the pixels of the same frame, added to the input."""

    def __init__(self, features: int, **kinds: Unpack[Kinds]):
        self.norm = ChannelNorm(features, kinds["param_dtype"])
        self.query_key_value = nnx.Linear(features, 3 * features, **kinds)
        self.output = nnx.Linear(features, features, **kinds)

    def __call__(self, x: Frames, past: Past) -> tuple[Frames, Past]:
        """Apply the block."""
        batch, frames, height, width, features = x.shape
        projected = self.query_key_value(self.norm(x))
        by_frame = projected.reshape(batch * frames, height * width, 1, 3 * features)
        query, key, value = jnp.split(by_frame, 3, axis=-1)
        out, _ = dense_attention(query, key, value, layout=VideoLayout(1, height * width))
        return x + self.output(out.reshape(x.shape)), past


class Downsample(nnx.Module):
    """Halve rows and columns, and frames if `temporal`; an odd row or column is dropped."""

    def __init__(self, features: int, temporal: bool, **kinds: Unpack[Kinds]):
        conv = partial(nnx.Conv, features, features, **kinds)
        self.conv = conv((3, 3), strides=2, padding=((0, 1), (0, 1)))
        if temporal:
            self.time_conv = conv((3, 1, 1), strides=(2, 1, 1), padding="VALID")

    def __call__(self, x: Frames, past: Past) -> tuple[Frames, Past]:
        """Return one frame for the first chunk, then half as many as there are."""
        x = self.conv(x)
        if not hasattr(self, "time_conv"):
            return x, past
        last = x[:, -1:]
        if past is not None:
            x = self.time_conv(jnp.concatenate([past, x], axis=1))
        return x, last


class Upsample(nnx.Module):
    """Double rows and columns, and frames if `temporal`."""

    def __init__(self, features: int, out_features: int, temporal: bool, **kinds: Unpack[Kinds]):
        if temporal:
            self.time_conv = causal_conv(features, 2 * features, (3, 1, 1), **kinds)
        self.conv = nnx.Conv(features, out_features, (3, 3), padding=((1, 1), (1, 1)), **kinds)

    def __call__(self, x: Frames, past: Past) -> tuple[Frames, Past]:
        """Return one frame for the first chunk, then twice as many as there are."""
        batch, frames, height, width, features = x.shape
        if hasattr(self, "time_conv"):
            if past is None:  # the first frame stays one, and later ones do not see it
                past = empty_past(self.time_conv, x)
            else:
                pairs, past = convolve(self.time_conv, x, past)
                pairs = pairs.reshape(batch, frames, height, width, 2, features)
                x = jnp.moveaxis(pairs, 4, 2).reshape(batch, -1, height, width, features)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x), past


@dataclass(frozen=True)
class AverageDown:
    """The shortcut around a `Downsample`: frames, rows and columns become channels.

    A first frame is preceded by zeros; neighbouring channels are averaged.

    Attributes:
        features: Channels of the input.
        out_features: Channels of the result.
        frames: Number of frames that become one.
        size: Number of rows, and of columns, that become one.
    """

    features: int
    out_features: int
    frames: int
    size: int

    def __post_init__(self) -> None:
        _check_multiple(self.features * self.frames * self.size**2, self.out_features)

    def __call__(self, x: Frames, *, first: bool) -> Frames:
        """Apply the shortcut to a chunk; `first` marks a video's first one."""
        batch, _, height, width, features = x.shape
        ft, fs = self.frames, self.size
        if first:
            x = jnp.pad(x, ((0, 0), (ft - 1, 0), (0, 0), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, ft, height // fs, fs, width // fs, fs, features)
        x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
        x = x.reshape(*x.shape[:4], self.out_features, -1)
        return jnp.mean(x.astype(jnp.float32), axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class RepeatUp:
    """The shortcut around an `Upsample`: repeated channels become frames, rows and columns.

    A first frame becomes one frame only.

    Attributes:
        features: Channels of the input.
        out_features: Channels of the result.
        frames: Number of frames that one becomes.
        size: Number of rows, and of columns, that one becomes.
    """

    features: int
    out_features: int
    frames: int
    size: int

    def __post_init__(self) -> None:
        _check_multiple(self.out_features * self.frames * self.size**2, self.features)

    def __call__(self, x: Frames, *, first: bool) -> Frames:
        """Apply the shortcut to a chunk; `first` marks a video's first one."""
        batch, frames, height, width, features = x.shape
        ft, fs = self.frames, self.size
        x = jnp.repeat(x, self.out_features * ft * fs**2 // features, axis=-1)
        x = x.reshape(batch, frames, height, width, self.out_features, ft, fs, fs)
        x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(batch, frames * ft, height * fs, width * fs, self.out_features)
        return x[:, ft - 1 :] if first else x


def _check_multiple(more: int, fewer: int) -> None:
    if more % fewer:
        raise ValueError(
            f"a shortcut of {fewer} to {more} features (pixels made channels) cannot average or "
            "repeat them evenly: no such model."
        )


def pixels_to_channels(
    video: Float[Array, "batch channels frames height width"], patch: int
) -> Float[Array, "batch features frames out_height out_width"]:
    """Turn patches of pixels into features in the order channel, column, row."""
    batch, channels, frames, height, width = video.shape
    x = video.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    x = x.transpose(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(batch, channels * patch**2, *x.shape[4:])


def channels_to_pixels(
    x: Float[Array, "batch features frames height width"], patch: int
) -> Float[Array, "batch channels frames out_height out_width"]:
    """Invert `pixels_to_channels`."""
    batch, features, frames, height, width = x.shape
    x = x.reshape(batch, features // patch**2, patch, patch, frames, height, width)
    x = x.transpose(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(*x.shape[:3], height * patch, width * patch)
