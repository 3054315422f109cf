"""Layers of CogVideoX's video autoencoder, over [batch, frames, height, width, channels].

They take a video chunk by chunk; see `vae`.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from svg_jax.models.layers import Kinds, group_norm, silu
from svg_jax.models.vae import Frames, Past, repeat, run_layers

# Elements that a convolution is given at once. Libraries that count in 32 bits take no more than
# 2³¹, and copies and workspaces grow with them.
_MOST_ELEMENTS = 2**30


def conv3d(features: int, out_features: int, **kinds: Unpack[Kinds]) -> nnx.Conv:
    """Make the parameters of `causal_conv`: a kernel of 3 x 3 x 3 and a bias."""
    return nnx.Conv(features, out_features, (3, 3, 3), **kinds)


def causal_conv(conv: nnx.Conv, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
    """Convolve frames with themselves and those before them; rows and columns are padded.

    Args:
        conv: Parameters that `conv3d` made.
        x: Frames.
        past: Two frames before them; None repeats the first frame.

    Returns:
        As many frames, and the past of the next ones.
    """
    taps, *_, out_features = conv.kernel.shape
    past = repeat(x[:, :1], taps - 1, axis=1) if past is None else past
    x = jnp.concatenate([past, x], axis=1)
    # As a convolution in two dimensions, with the frames that a result sees side by side in the
    # channels: on GPUs, XLA transposes a three-dimensional one's operands and result.
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
    """Apply a convolution, to some frames at a time if all of them have too many elements.

    Args:
        function: Convolution.
        x: Frames.
        frame_elements: Number of elements that one frame's result is computed from.
        before: Number of earlier frames that one frame's result is computed from.
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
    # Filled with a value of x: an array that depends on nothing would be made, and kept, too early.
    return jax.lax.fori_loop(0, frames // size, add_part, jnp.full(shape, x[0, 0, 0, 0, 0]))


def spread_frames(x: Frames, frames: int) -> Frames:
    """Repeat all frames equally often; the first of an odd number is not repeated."""
    alone = x.shape[1] % 2
    if x.shape[1] == alone:
        return x
    times = (frames - alone) // (x.shape[1] - alone)
    return jnp.concatenate([x[:, :alone], repeat(x[:, alone:], times, axis=1)], axis=1)


def halve_frames(x: Frames) -> Frames:
    """Average every two frames; the first of an odd number stays as it is."""
    alone, pairs = x[:, : x.shape[1] % 2], x[:, x.shape[1] % 2 :]
    pairs = pairs.reshape(x.shape[0], -1, 2, *x.shape[2:])
    means = jnp.mean(pairs.astype(jnp.float32), axis=2).astype(x.dtype)
    return jnp.concatenate([alone, means], axis=1)


class SpatialNorm(nnx.Module):
    """A group norm whose result is scaled and shifted by the latents of the same place."""

    def __init__(self, features: int, groups: int, latent_channels: int, **kinds: Unpack[Kinds]):
        self.norm = group_norm(features, groups, **kinds)
        self.scale = nnx.Linear(latent_channels, features, **kinds)
        self.shift = nnx.Linear(latent_channels, features, **kinds)

    def __call__(self, x: Frames, latents: Frames) -> Frames:
        """Normalise frames that are decoded from these latents; the result is float32."""
        size, latent_size = x.shape[1:4], latents.shape[1:4]

        def enlarge(of_latents: Frames) -> Frames:
            # Frames first: repeating rows and columns is a broadcast, which takes no memory.
            enlarged = spread_frames(of_latents.astype(jnp.float32), size[0])
            for axis in (2, 3):
                enlarged = repeat(enlarged, size[axis - 1] // latent_size[axis - 1], axis)
            return enlarged

        return self.norm(x) * enlarge(self.scale(latents)) + enlarge(self.shift(latents))


class ResidualLayer(nnx.Module):
    """Norm, SiLU and causal convolution, twice, added to the input."""

    def __init__(
        self,
        features: int,
        out_features: int,
        make_norm: Callable[[int], nnx.Module],
        **kinds: Unpack[Kinds],
    ):
        self.dtype = kinds["dtype"]
        self.norm_1 = make_norm(features)
        self.conv_1 = conv3d(features, out_features, **kinds)
        self.norm_2 = make_norm(out_features)
        self.conv_2 = conv3d(out_features, out_features, **kinds)
        if features != out_features:
            self.shortcut = nnx.Linear(features, out_features, **kinds)

    def __call__(
        self, x: Frames, past: Past, condition: tuple[Array, ...] = ()
    ) -> tuple[Frames, Past]:
        """Return the next hidden state and past; norms take `condition`."""
        past_1, past_2 = past or (None, None)
        hidden = silu(self.norm_1(x, *condition)).astype(self.dtype)
        hidden, past_1 = causal_conv(self.conv_1, hidden, past_1)
        hidden = silu(self.norm_2(hidden, *condition)).astype(self.dtype)
        hidden, past_2 = causal_conv(self.conv_2, hidden, past_2)
        if hasattr(self, "shortcut"):
            x = self.shortcut(x)
        return hidden + x, (past_1, past_2)


class Block(nnx.Module):
    """Residual layers, then a change of size if there is one."""

    def __init__(
        self,
        features: int,
        out_features: int,
        num_layers: int,
        make_norm: Callable[[int], nnx.Module],
        resize: nnx.Module | None,
        **kinds: Unpack[Kinds],
    ):
        widths = [features] + [out_features] * num_layers
        make = partial(ResidualLayer, make_norm=make_norm, **kinds)
        self.layers = nnx.List(make(*pair) for pair in itertools.pairwise(widths))
        self.resize = resize

    def __call__(
        self, x: Frames, past: Past, condition: tuple[Array, ...] = ()
    ) -> tuple[Frames, Past]:
        """Return the next hidden state and past; norms take `condition`."""
        x, past = run_layers(self.layers, x, past, condition)
        return (x if self.resize is None else self.resize(x)), past


class Downsample(nnx.Module):
    """Halve height and width, and the frames if `frames`."""

    def __init__(self, features: int, *, frames: bool, **kinds: Unpack[Kinds]):
        self.frames = frames
        padding = ((0, 1), (0, 1))
        self.conv = nnx.Conv(features, features, (3, 3), strides=2, padding=padding, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Return the smaller video."""
        x = halve_frames(x) if self.frames else x
        return by_frames(self.conv, x, x[:, 0].size)


class Upsample(nnx.Module):
    """Double height and width, and the frames if `frames`."""

    def __init__(self, features: int, *, frames: bool, **kinds: Unpack[Kinds]):
        self.frames = frames
        self.conv = nnx.Conv(features, features, (3, 3), padding=1, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Return the larger video."""

        def enlarge(part: Frames) -> Frames:
            return self.conv(repeat(repeat(part, 2, axis=2), 2, axis=3))

        # Frames are repeated last: equal ones need one convolution.
        x = by_frames(enlarge, x, 4 * x[:, 0].size)
        return spread_frames(x, 2 * x.shape[1] - x.shape[1] % 2) if self.frames else x
