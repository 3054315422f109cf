"""Rotary position embedding of videos and texts (RoFormer, arXiv 2104.09864)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rotation(NamedTuple):
    """Cosine and sine of the angle by which each pair of features turns at each token (float32)."""

    cos: Float[Array, "tokens half_head_dim"]
    sin: Float[Array, "tokens half_head_dim"]


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], rotation: Rotation
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turn the feature pairs (0, 1), (2, 3), … of every head, computed in float32."""
    cos, sin = (table[None, :, None, :] for table in rotation)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(
    x: Float[Array, "batch tokens heads head_dim"], rotation: Rotation
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turn the pairs of a feature of each head's first half and one of its second, in float32."""
    cos, sin = (table[None, :, None, :] for table in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def text_rotation(num_tokens: int, features: int, *, theta: float) -> Rotation:
    """Compute the rotation of each token of a text.

    Args:
        num_tokens: Number of tokens, at positions 0, 1, 2, …
        features: Features of a head; an even number.
        theta: Base of the frequencies theta^(-2i / features).

    Source: transformers `LlamaRotaryEmbedding`.
    """
    # Powers, frequencies and angles are rounded to float32 where the reference rounds them: after a
    # few hundred tokens, the rounding of a frequency shows in the cosine.
    powers = theta ** (np.arange(0, features, 2) / features)
    frequencies = np.float32(1) / powers.astype(np.float32)
    angles = np.outer(np.arange(num_tokens, dtype=np.float32), frequencies).astype(np.float64)
    return Rotation(*(jnp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin)))


def video_rotation(
    positions: Sequence[np.ndarray],
    axis_features: Sequence[int],
    *,
    theta: float = 10_000.0,
    text_tokens: int = 0,
    text_position: Literal["first", "last"] = "first",
) -> Rotation:
    """Compute the rotation of each token of a video, in token order frame, row, column.

    Args:
        positions: Positions of the frames, of the rows and of the columns, with any spacing.
        axis_features: Numbers of a head's features that turn with the frame, the row and the
            column; even, and head_dim in all.
        theta: Base of the frequencies theta^(-2i / axis_features).
        text_tokens: Number of text tokens, which are not turned.
        text_position: Whether text stands before ("first") or behind ("last") the video.
    """
    # As in sincos_video_embedding, only the tables of the single axes are constants of the program.
    shape = tuple(len(axis) for axis in positions)
    tables = []
    for function, at_rest in ((np.cos, 1.0), (np.sin, 0.0)):
        parts = []
        for axis, (places, features) in enumerate(zip(positions, axis_features, strict=True)):
            frequencies = theta ** -(np.arange(0, features, 2) / features)
            table = function(np.outer(places, frequencies)).astype(np.float32)
            parts.append(jax.lax.broadcast_in_dim(table, (*shape, features // 2), (axis, 3)))
        video = jnp.concatenate(parts, axis=-1).reshape(-1, sum(axis_features) // 2)
        beside = (text_tokens, 0) if text_position == "first" else (0, text_tokens)
        tables.append(jnp.pad(video, (beside, (0, 0)), constant_values=at_rest))
    return Rotation(*tables)


def cropped_grid(grid: tuple[int, int], base: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Compute positions of a grid's rows and columns within the grid that a model was trained on.

    The grid is scaled, keeping its aspect ratio, until it fits into the base grid, and centred
    there; a grid of the base's size has positions 0, 1, 2, …

    Args:
        grid: Rows and columns of the grid.
        base: Rows and columns of the training grid.

    Source: diffusers `get_resize_crop_region_for_grid` and the "linspace" grid of
    `get_3d_rotary_pos_embed`.
    """
    (rows, columns), (base_rows, base_columns) = grid, base
    if rows / columns > base_rows / base_columns:
        resized = (base_rows, round(base_rows / rows * columns))
    else:
        resized = (round(base_columns / columns * rows), base_columns)
    positions = []
    for size, whole, part in zip(grid, base, resized, strict=True):
        start = round((whole - part) / 2)
        # The last position scales with the end of the crop, not with its length: if start > 0, the
        # distances are not exactly part / size. The models were trained like this.
        positions.append(np.linspace(start, (start + part) * (size - 1) / size, size))
    return positions[0], positions[1]
