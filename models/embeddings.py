"""Embeddings of times and positions by sines and cosines."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from svg_jax.models.layers import Kinds

_MAX_PERIOD = 10_000


def sinusoidal_embedding(
    times: Real[Array, "*batch"], features: int
) -> Float[Array, "*batch features"]:
    """Return cosines, then sines, of times at geometrically falling frequencies (float32).

    Source: diffusers `get_timestep_embedding` with flip_sin_to_cos and no frequency shift.
    """
    # In float32 and in the reference's order of operations: at times in the thousands the rounding
    # of the frequencies shows in the result. Except exp: numpy's float32 one is three ulp off.
    half = features // 2
    exponents = np.float32(-math.log(_MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    exponents = (exponents / np.float32(half)).astype(np.float64)
    frequencies = np.exp(exponents).astype(np.float32)
    angles = jnp.multiply.outer(times.astype(jnp.float32), frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, linear over a sinusoidal embedding, in float32 whatever the `dtype`.

    It computes one row per time, and every layer's modulation repeats its errors: in bfloat16, it
    caused a fifth of a whole model's error.
    """

    def __init__(self, sinusoid_features: int, features: int, **kinds: Unpack[Kinds]):
        kinds["dtype"] = jnp.float32
        self.sinusoid_features = sinusoid_features
        self.input = nnx.Linear(sinusoid_features, features, **kinds)
        self.output = nnx.Linear(features, features, **kinds)

    def __call__(self, times: Real[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Embed times."""
        hidden = self.input(sinusoidal_embedding(times, self.sinusoid_features))
        return self.output(jax.nn.silu(hidden))


def sincos_video_embedding(
    num_frames: int,
    height: int,
    width: int,
    features: int,
    *,
    spatial_scale: float = 1.0,
    temporal_scale: float = 1.0,
) -> Float[Array, "tokens features"]:
    """Embed the position of each video token, in token order frame, row, column (float32).

    A quarter of the features is for the frame, then three eighths for the column and three for the
    row; each part holds sines, then cosines.

    Args:
        num_frames: Frames of tokens.
        height: Rows of tokens.
        width: Columns of tokens.
        features: Features of a token.
        spatial_scale: Divisor of rows and columns.
        temporal_scale: Divisor of frames.

    Source: diffusers `get_3d_sincos_pos_embed`.
    """
    # Only the tables of the single axes are constants of the program: the table of all tokens is as
    # large as a hidden state, and the addition that reads it can make it on the fly.
    shape = (num_frames, height, width)
    parts = [
        (_sincos_axis(np.arange(num_frames) / temporal_scale, features // 4), (0,)),
        (_sincos_axis(np.arange(width) / spatial_scale, 3 * features // 8), (2,)),
        (_sincos_axis(np.arange(height) / spatial_scale, 3 * features // 8), (1,)),
    ]
    spread = [
        jax.lax.broadcast_in_dim(table, (*shape, table.shape[-1]), (*axis, 3))
        for table, axis in parts
    ]
    return jnp.concatenate(spread, axis=-1).reshape(-1, features)


def _sincos_axis(positions: np.ndarray, features: int) -> np.ndarray:
    half = features // 2
    angles = np.outer(positions, _MAX_PERIOD ** -(np.arange(half) / half))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
