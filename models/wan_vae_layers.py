"""Layers of the Wan VAEs, which take a video chunk by chunk.

Arrays are channels-last. Every layer takes (chunk, past) and returns (chunk, past): `past` is what
the layer keeps of earlier chunks, None before the first one, which holds a single frame. Time is
causal: chunks one behind the other give what all frames at once would.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from svg_jax.models.attention import dense_attention
from svg_jax.models.layers import silu
from svg_jax.models.layout import VideoLayout

Past = Any  # each layer's own: arrays, tuples of such, or None of a layer that keeps nothing


def run_layers(
    layers: Iterable[Any], x: Float[Array, "batch frames height width features"], past: Past
) -> tuple[Float[Array, "batch out_frames out_height out_width out_features"], Past]:
    """Sends a chunk through layers one after the other; their pasts are a tuple."""
    layers, pasts = tuple(layers), []
    for layer, its_past in zip(layers, past or (None,) * len(layers), strict=True):
        x, its_past = layer(x, its_past)
        pasts.append(its_past)
    return x, tuple(pasts)


def causal_conv(
    features: int, out_features: int, kernel_size: tuple[int, int, int] = (3, 3, 3), **kinds: Any
) -> nnx.Conv:
    """A convolution for `convolve`: as many rows and columns as it takes, fewer frames."""
    space = [(size // 2, size // 2) for size in kernel_size[1:]]
    return nnx.Conv(features, out_features, kernel_size, padding=((0, 0), *space), **kinds)


def convolve(
    conv: nnx.Conv,
    x: Float[Array, "batch frames height width features"],
    past: Float[Array, "batch past_frames height width features"] | None,
) -> tuple[
    Float[Array, "batch frames height width out_features"],
    Float[Array, "batch past_frames height width features"],
]:
    """Convolves a chunk with the frames before it, zeros before the first."""
    past = empty_past(conv, x) if past is None else past
    x = jnp.concatenate([past, x.astype(past.dtype)], axis=1)
    return conv(x), x[:, -past.shape[1] :]


def empty_past(
    conv: nnx.Conv, x: Float[Array, "batch frames height width features"]
) -> Float[Array, "batch past_frames height width features"]:
    """What `convolve` sees before a video's first frame."""
    return jnp.zeros((len(x), conv.kernel_size[0] - 1, *x.shape[2:]), conv.dtype)


class ChannelNorm(nnx.Module):
    """An RMS norm of each pixel's channels without an epsilon, in float32."""

    def __init__(self, features: int, *, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Float[Array, "*pixels features"]) -> Float[Array, "*pixels features"]:
        """Normalises every pixel."""
        x = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        scale = math.sqrt(x.shape[-1]) * self.scale[...].astype(jnp.float32)
        return (
            x
            / jnp.sqrt(jnp.maximum(squares, 1e-24))
            * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        )


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut."""

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = ChannelNorm(features, param_dtype=param_dtype)
        self.conv1 = causal_conv(features, out_features, **kinds)
        self.norm2 = ChannelNorm(out_features, param_dtype=param_dtype)
        self.conv2 = causal_conv(out_features, out_features, **kinds)
        if features != out_features:
            self.shortcut = nnx.Linear(features, out_features, **kinds)

    def __call__(
        self, x: Float[Array, "batch frames height width features"], past: Past
    ) -> tuple[Float[Array, "batch frames height width out_features"], Past]:
        """Applies the block."""
        past1, past2 = past or (None, None)
        out, past1 = convolve(self.conv1, silu(self.norm1(x)), past1)
        out, past2 = convolve(self.conv2, silu(self.norm2(out)), past2)
        return (self.shortcut(x) if hasattr(self, "shortcut") else x) + out, (past1, past2)


class AttentionBlock(nnx.Module):
    """Self-attention of one head among the pixels of each frame, beside a shortcut."""

    def __init__(self, features: int, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = ChannelNorm(features, param_dtype=param_dtype)
        self.query_key_value = nnx.Linear(features, 3 * features, **kinds)
        self.output = nnx.Linear(features, features, **kinds)

    def __call__(
        self, x: Float[Array, "batch frames height width features"], past: Past
    ) -> tuple[Float[Array, "batch frames height width features"], Past]:
        """Applies the block."""
        batch, frames, height, width, features = x.shape
        projected = self.query_key_value(self.norm(x))
        by_frame = projected.reshape(batch * frames, height * width, 1, 3 * features)
        query, key, value = jnp.split(by_frame, 3, axis=-1)
        out, _ = dense_attention(query, key, value, layout=VideoLayout(1, height * width))
        return x + self.output(out.reshape(x.shape)), past


class Downsample(nnx.Module):
    """Halves rows and columns, and frames where `temporal`; odd ones lose their last."""

    def __init__(
        self, features: int, temporal: bool, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ):
        conv = partial(
            nnx.Conv, features, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.conv = conv((3, 3), strides=2, padding=((0, 1), (0, 1)))
        if temporal:
            self.time_conv = conv((3, 1, 1), strides=(2, 1, 1), padding="VALID")

    def __call__(
        self, x: Float[Array, "batch frames height width features"], past: Past
    ) -> tuple[Float[Array, "batch out_frames out_height out_width features"], Past]:
        """Makes one frame of the first chunk, then half as many as there are."""
        x = self.conv(x)
        if not hasattr(self, "time_conv"):
            return x, past
        last = x[:, -1:]
        if past is not None:
            x = self.time_conv(jnp.concatenate([past, x], axis=1))
        return x, last


class Upsample(nnx.Module):
    """Doubles rows and columns, and frames where `temporal`."""

    def __init__(
        self,
        features: int,
        out_features: int,
        temporal: bool,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if temporal:
            self.time_conv = causal_conv(features, 2 * features, (3, 1, 1), **kinds)
        self.conv = nnx.Conv(features, out_features, (3, 3), padding=((1, 1), (1, 1)), **kinds)

    def __call__(
        self, x: Float[Array, "batch frames height width features"], past: Past
    ) -> tuple[Float[Array, "batch out_frames out_height out_width out_features"], Past]:
        """Makes one frame of the first chunk, then twice as many as there are."""
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

    Zeros stand before a first frame that is alone; neighbouring channels are averaged.

    Attributes:
        features: Channels of the input.
        out_features: Channels of the result.
        frames: Frames that become one.
        size: Rows, and columns, that become one.
    """

    features: int
    out_features: int
    frames: int
    size: int

    def __post_init__(self) -> None:
        _check_multiple(self.features * self.frames * self.size**2, self.out_features)

    def __call__(
        self, x: Float[Array, "batch frames height width features"], *, first: bool
    ) -> Float[Array, "batch out_frames out_height out_width out_features"]:
        """Takes a chunk, maybe a video's first."""
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

    Of the frames that a first one becomes only the last is there. Attributes as `AverageDown`'s.
    """

    features: int
    out_features: int
    frames: int
    size: int

    def __post_init__(self) -> None:
        _check_multiple(self.out_features * self.frames * self.size**2, self.features)

    def __call__(
        self, x: Float[Array, "batch frames height width features"], *, first: bool
    ) -> Float[Array, "batch out_frames out_height out_width out_features"]:
        """Takes a chunk, maybe a video's first."""
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
    """Patches of pixels to features in the order channel, column, row."""
    batch, channels, frames, height, width = video.shape
    x = video.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    x = x.transpose(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(batch, channels * patch**2, *x.shape[4:])


def channels_to_pixels(
    x: Float[Array, "batch features frames height width"], patch: int
) -> Float[Array, "batch channels frames out_height out_width"]:
    """The inverse of `pixels_to_channels`."""
    batch, features, frames, height, width = x.shape
    x = x.reshape(batch, features // patch**2, patch, patch, frames, height, width)
    x = x.transpose(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(*x.shape[:3], height * patch, width * patch)
