"""Layers of CogVideoX's video autoencoder, over [batch, frames, height, width, channels].

They take a video in chunks: what a layer has to know of earlier frames goes in and comes out as its
cache.
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

from svg_jax.models.layers import group_norm, silu

Frames = Float[Array, "batch _ _ _ _"]  # what goes in and what comes out differ in all others
Pasts = tuple[Frames, Frames]  # of the two causal convolutions of a residual layer

# Elements that a convolution is given at once. Libraries that count in 32 bits take no more than
# 2³¹, and copies and workspaces grow with them.
_MOST_ELEMENTS = 2**30


def conv3d(features: int, out_features: int, **kinds: Any) -> nnx.Conv:
    """The parameters of `causal_conv`: a kernel of three frames, rows and columns, and a bias."""
    return nnx.Conv(features, out_features, (3, 3, 3), **kinds)


def causal_conv(conv: nnx.Conv, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
    """Convolves frames with themselves and those before them; rows and columns are padded.

    Args:
        conv: What `conv3d` made.
        x: Frames.
        past: The two frames before them; None repeats the first frame.

    Returns:
        As many frames, and the past of the next ones.
    """
    taps, *_, out_features = conv.kernel.shape
    past = repeat(x[:, :1], taps - 1, axis=1) if past is None else past
    x = jnp.concatenate([past, x], axis=1)
    # In two dimensions, the frames that a result sees side by side in its channels: on GPUs, XLA
    # turns every three-dimensional convolution's operands to channels first, and back.
    kernel = jnp.moveaxis(conv.kernel[...].astype(x.dtype), 0, 2)
    kernel = kernel.reshape(*kernel.shape[:2], -1, out_features)
    assert conv.bias is not None
    bias = conv.bias[...].astype(x.dtype)

    def convolve(part: Frames) -> Frames:
        frames = part.shape[1] - taps + 1
        seen = [part[:, tap : tap + frames] for tap in range(taps)]
        images = jnp.concatenate(seen, axis=-1).reshape(-1, *x.shape[2:4], taps * x.shape[4])
        out = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out.reshape(len(x), frames, *out.shape[1:]) + bias.reshape(1, 1, 1, 1, -1)

    return by_frames(convolve, x, taps * x[:, 0].size, taps - 1), x[:, 1 - taps :]


def by_frames(
    function: Callable[[Array], Array], x: Frames, frame_elements: int, before: int = 0
) -> Frames:
    """Applies a convolution, to some frames at a time where all of them are too many elements.

    Args:
        function: The convolution.
        x: Frames.
        frame_elements: Elements that go into one frame's result.
        before: Frames that each result looks back.
    """
    frames = x.shape[1] - before
    fitting = [
        size
        for size in range(1, frames + 1)
        if frames % size == 0 and size * frame_elements <= _MOST_ELEMENTS
    ]
    size = max(fitting, default=1)
    if size == frames:
        return function(x)

    def add_part(part: Array, out: Array) -> Array:
        start = part * size
        result = function(jax.lax.dynamic_slice_in_dim(x, start, size + before, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(out, result, start, axis=1)

    shape = list(jax.eval_shape(function, x[:, : size + before]).shape)
    shape[1] = frames
    # Filled with something of x: what waits for nothing, the compiler makes too early and keeps.
    return jax.lax.fori_loop(0, frames // size, add_part, jnp.full(shape, x[0, 0, 0, 0, 0]))


def repeat(x: Float[Array, "..."], times: int, axis: int) -> Float[Array, "..."]:
    """Repeats every element along an axis."""
    # Not jnp.repeat: this is a broadcast, which whatever reads it does on the fly.
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    dimensions = [dimension for dimension in range(len(shape)) if dimension != axis + 1]
    spread = jax.lax.broadcast_in_dim(x, shape, dimensions)
    return spread.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def spread_frames(x: Frames, frames: int) -> Frames:
    """Repeats all frames equally often; but of an odd number, the first stays alone."""
    alone = x.shape[1] % 2
    if x.shape[1] == alone:
        return x
    times = (frames - alone) // (x.shape[1] - alone)
    return jnp.concatenate([x[:, :alone], repeat(x[:, alone:], times, axis=1)], axis=1)


def halve_frames(x: Frames) -> Frames:
    """Averages every two frames; of an odd number the first stays alone."""
    alone, pairs = x[:, : x.shape[1] % 2], x[:, x.shape[1] % 2 :]
    pairs = pairs.reshape(x.shape[0], -1, 2, *x.shape[2:])
    means = jnp.mean(pairs.astype(jnp.float32), axis=2).astype(x.dtype)
    return jnp.concatenate([alone, means], axis=1)


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
        self.norm = group_norm(features, groups, 1e-6, param_dtype=param_dtype, rngs=rngs)
        self.scale = nnx.Linear(latent_channels, features, **kinds)
        self.shift = nnx.Linear(latent_channels, features, **kinds)

    def __call__(self, x: Frames, latents: Frames) -> Frames:
        """Normalises frames that are on their way from these latents; float32."""
        size, latent_size = x.shape[1:4], latents.shape[1:4]

        def enlarge(of_latents: Frames) -> Frames:
            # Frames first: rows and columns are but broadcast, which takes no memory.
            enlarged = spread_frames(of_latents.astype(jnp.float32), size[0])
            for axis in (2, 3):
                enlarged = repeat(enlarged, size[axis - 1] // latent_size[axis - 1], axis)
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
        self.layers = nnx.List(make(*pair) for pair in itertools.pairwise(widths))
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
        x = halve_frames(x) if self.frames else x
        return by_frames(self.conv, x, x[:, 0].size)


class Upsample(nnx.Module):
    """Doubles height and width, and the frames if told."""

    def __init__(self, features: int, *, frames: bool, **kinds: Any):
        self.frames = frames
        self.conv = nnx.Conv(features, features, (3, 3), padding=1, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Returns the larger video."""

        def enlarge(part: Frames) -> Frames:
            return self.conv(repeat(repeat(part, 2, axis=2), 2, axis=3))

        # Frames are repeated last: equal ones need one convolution.
        x = by_frames(enlarge, x, 4 * x[:, 0].size)
        return spread_frames(x, 2 * x.shape[1] - x.shape[1] % 2) if self.frames else x
