"""Layers of HunyuanVideo's video autoencoder, over [batch, frames, height, width, channels].

Convolutions and attention do not see later frames. Norms do: their statistics are of all frames.
"""

from itertools import pairwise
from typing import Unpack

import jax.numpy as jnp
from flax import nnx

from svg_jax.models.attention import frame_causal_attention
from svg_jax.models.layers import Kinds, group_norm, silu
from svg_jax.models.vae import Frames, repeat

Factor = tuple[int, int, int]  # of frames, rows and columns

# cuDNN counts elements in 32 bits. Beyond, its only convolutions are a thousand times as slow.
_MOST_ELEMENTS = 2**31 - 1


class CausalConv(nnx.Conv):
    """A 3 x 3 x 3 convolution; edges are repeated outwards.

    A frame is convolved with the two before it; the first frame is repeated in front.
    """

    def __init__(
        self, features: int, out_features: int, strides: Factor = (1, 1, 1), **kinds: Unpack[Kinds]
    ):
        super().__init__(features, out_features, (3, 3, 3), strides, padding="VALID", **kinds)
        self.frame_stride = strides[0]

    def __call__(self, inputs: Frames) -> Frames:
        """Return as many frames, rows and columns; with strides, fewer (rounded up)."""
        around = ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0))
        padded = jnp.pad(inputs, around, mode="edge")
        stride = self.frame_stride
        out_frames = (padded.shape[1] - 3) // stride + 1
        of_frame = padded[:, 0].size // self.in_features * max(self.in_features, self.out_features)
        at_once = max((_MOST_ELEMENTS // of_frame - 3) // stride + 1, 1)
        parts = [
            super(CausalConv, self).__call__(padded[:, stride * first : stride * last + 3 - stride])
            for first, last in _spans(out_frames, at_once)
        ]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


class Upsample(nnx.Module):
    """Repeat frames, rows and columns; the first frame is one of the video and not repeated."""

    def __init__(self, features: int, factor: Factor, **kinds: Unpack[Kinds]):
        self.factor = factor
        self.conv = CausalConv(features, features, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Return the larger video."""
        for axis, times in enumerate(self.factor, start=1):
            x = repeat(x, times, axis)
        return self.conv(x[:, self.factor[0] - 1 :])


class ResidualLayer(nnx.Module):
    """Norm, SiLU and convolution, twice, added to the input."""

    def __init__(self, features: int, out_features: int, groups: int, **kinds: Unpack[Kinds]):
        self.norm_1 = group_norm(features, groups, **kinds)
        self.conv_1 = CausalConv(features, out_features, **kinds)
        self.norm_2 = group_norm(out_features, groups, **kinds)
        self.conv_2 = CausalConv(out_features, out_features, **kinds)
        if features != out_features:
            self.shortcut = nnx.Linear(features, out_features, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Return the next hidden state."""
        hidden = self.conv_1(silu(self.norm_1(x)).astype(x.dtype))
        hidden = self.conv_2(silu(self.norm_2(hidden)).astype(x.dtype))
        return hidden + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class Attention(nnx.Module):
    """Attention of one head to all pixels of a frame and of earlier ones, added to the input."""

    def __init__(self, features: int, groups: int, **kinds: Unpack[Kinds]):
        self.norm = group_norm(features, groups, **kinds)
        self.query = nnx.Linear(features, features, **kinds)
        self.key = nnx.Linear(features, features, **kinds)
        self.value = nnx.Linear(features, features, **kinds)
        self.output = nnx.Linear(features, features, **kinds)

    def __call__(self, x: Frames) -> Frames:
        """Return the next hidden state."""
        batch, _, height, width, features = x.shape
        tokens = self.norm(x).astype(x.dtype).reshape(batch, -1, 1, features)
        out = frame_causal_attention(
            self.query(tokens), self.key(tokens), self.value(tokens), frame_tokens=height * width
        )
        return self.output(out.reshape(x.shape)) + x


class MiddleBlock(nnx.Module):
    """A residual layer, perhaps attention, and another residual layer."""

    def __init__(self, features: int, groups: int, *, attention: bool, **kinds: Unpack[Kinds]):
        self.layers = nnx.List(ResidualLayer(features, features, groups, **kinds) for _ in range(2))
        self.attention = Attention(features, groups, **kinds) if attention else None

    def __call__(self, x: Frames) -> Frames:
        """Return the next hidden state."""
        x = self.layers[0](x)
        return self.layers[1](x if self.attention is None else self.attention(x))


class Block(nnx.Module):
    """Residual layers, then a change of size if there is one."""

    def __init__(
        self,
        features: int,
        out_features: int,
        num_layers: int,
        groups: int,
        resize: nnx.Module | None,
        **kinds: Unpack[Kinds],
    ):
        widths = [features] + [out_features] * num_layers
        self.layers = nnx.List(ResidualLayer(*pair, groups, **kinds) for pair in pairwise(widths))
        self.resize = resize

    def __call__(self, x: Frames) -> Frames:
        """Return the next hidden state."""
        for layer in self.layers:
            x = layer(x)
        return x if self.resize is None else self.resize(x)


def _spans(total: int, most: int) -> list[tuple[int, int]]:
    """Cut range(total) into pieces of at most `most`: start and stop of each."""
    return [(first, min(first + most, total)) for first in range(0, total, most)]
