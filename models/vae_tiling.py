"""Videos too large to encode or decode at once: overlapping tiles, and the blending of their seams.

Tiles are computed one after the other from the host, and those of equal shape by the same compiled
function: a GPU needs the memory of one tile. Convolutions, norms and attention do not see beyond a
tile's edge, so the result differs from that of the whole video.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Progress = Callable[[int, int], None]  # number of tiles done, number of all tiles


@dataclass(frozen=True)
class Tiling:
    """Tiles of a video in space, in pixels; all sizes are multiples of a latent's pixels.

    Attributes:
        tile_height: Rows of a tile; tiles at the bottom may have fewer.
        tile_width: Columns of a tile; tiles on the right may have fewer.
        stride_height: Rows from one tile to the next; a tile's further rows are blended.
        stride_width: Columns from one tile to the next; a tile's further columns are blended.
    """

    tile_height: int = 256
    tile_width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        for axis, tile, stride in (
            ("height", self.tile_height, self.stride_height),
            ("width", self.tile_width, self.stride_width),
        ):
            if not 1 <= stride <= tile:
                raise ValueError(
                    f"Tiling: stride_{axis} must be from 1 to the tile's {tile}, not {stride}."
                )

    def count(self, height: int, width: int) -> int:
        """Count the tiles of a video of this size in pixels."""
        if self.holds(height, width):
            return 1
        return math.ceil(height / self.stride_height) * math.ceil(width / self.stride_width)

    def holds(self, height: int, width: int) -> bool:
        """Tell whether one tile is enough."""
        return height <= self.tile_height and width <= self.tile_width

    def in_latents(self, ratio: int) -> "Tiling":
        """Convert the sizes to latents of ratio × ratio pixels.

        Raises:
            ValueError: If a size is not a whole number of latents.
        """
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        if any(size % ratio for size in sizes.values()):
            raise ValueError(f"{self}: every size must be a multiple of a latent's {ratio} pixels.")
        return Tiling(**{name: size // ratio for name, size in sizes.items()})


@dataclass(frozen=True)
class FrameTiling:
    """Tiles of a video in time, in frames; both sizes are multiples of a latent's frames.

    Attributes:
        tile_frames: Frames of a tile, without the one before them that is computed as well.
        stride_frames: Frames from one tile to the next; a tile's further frames are blended.
    """

    tile_frames: int = 16
    stride_frames: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.stride_frames <= self.tile_frames:
            raise ValueError(
                f"FrameTiling: stride_frames must be from 1 to the tile's {self.tile_frames}, "
                f"not {self.stride_frames}."
            )

    def in_latents(self, ratio: int) -> "FrameTiling":
        """Convert the sizes to latents of `ratio` frames.

        Raises:
            ValueError: If a size is not a whole number of latents.
        """
        if self.tile_frames % ratio or self.stride_frames % ratio:
            raise ValueError(f"{self}: both must be multiples of a latent's {ratio} frames.")
        return FrameTiling(self.tile_frames // ratio, self.stride_frames // ratio)


def encode_tiles(
    encode: Callable[[Array], Array],
    video: Float[Array, "batch channels frames height width"],
    tiling: Tiling | None,
    ratio: int,
    progress: Progress | None = None,
    *,
    fits: bool | None = None,
) -> Float[Array, "batch out_channels latent_frames latent_height latent_width"]:
    """Encode a video tile by tile.

    Args:
        encode: Compiled function that encodes a tile; tiles at the edges are smaller.
        video: Pixels.
        tiling: Sizes of the tiles; None encodes the video as a whole.
        ratio: Pixels per latent along rows, and along columns.
        progress: Function that is called after each tile with the tiles done and their number.
        fits: Whether one tile is enough; None decides by the tiling.
    """
    if fits is None:
        fits = tiling is None or tiling.holds(*video.shape[-2:])
    return _map_tiles(encode, video, tiling, tiling and tiling.in_latents(ratio), progress, fits)


def decode_tiles(
    decode: Callable[[Array], Array],
    latents: Float[Array, "batch channels latent_frames latent_height latent_width"],
    tiling: Tiling | None,
    ratio: int,
    progress: Progress | None = None,
) -> Float[Array, "batch out_channels frames height width"]:
    """Decode latents tile by tile; see `encode_tiles`."""
    tiles = tiling and tiling.in_latents(ratio)
    fits = tiles is None or tiles.holds(*latents.shape[-2:])
    return _map_tiles(decode, latents, tiles, tiling, progress, fits)


def _map_tiles(
    function: Callable[[Array], Array],
    x: Array,
    tiles_in: Tiling | None,
    tiles_out: Tiling | None,
    progress: Progress | None,
    fits: bool,
) -> Array:
    if fits or tiles_in is None or tiles_out is None:
        out = function(x)
        if progress is not None:
            progress(1, 1)
        return out
    height, width = x.shape[-2:]
    overlap_height = tiles_out.tile_height - tiles_out.stride_height
    overlap_width = tiles_out.tile_width - tiles_out.stride_width
    tops = range(0, height, tiles_in.stride_height)
    lefts = range(0, width, tiles_in.stride_width)
    rows, above, done = [], [], 0
    for top in tops:
        row = []
        for left in lefts:
            size = (min(tiles_in.tile_height, height - top), min(tiles_in.tile_width, width - left))
            tile = function(_cut(x, top, left, size=size))
            # Blend with the blended tiles, first the one above, then the one on the left: corners
            # depend on this order.
            if above:
                tile = _blend(above[len(row)], tile, overlap=overlap_height, axis=-2)
            if row:
                tile = _blend(row[-1], tile, overlap=overlap_width, axis=-1)
            row.append(tile)
            done += 1
            if progress is not None:
                progress(done, len(tops) * len(lefts))
        rows.append(_join_row(row, tiles_out.stride_height, tiles_out.stride_width))
        above = row
    return jnp.concatenate(rows, axis=-2)


def blend_frames(
    tiles: Sequence[Float[Array, "batch channels _ height width"]], tiling: FrameTiling
) -> Float[Array, "batch channels frames height width"]:
    """Join tiles in time.

    Args:
        tiles: All tiles in order. The first one has one frame more than the others, in front.
        tiling: Sizes of the tiles, in frames of `tiles`.
    """
    overlap = tiling.tile_frames - tiling.stride_frames
    blended = [tiles[0]]
    for tile in tiles[1:]:
        blended.append(_blend(blended[-1], tile, overlap=overlap, axis=-3))
    kept = [tile[:, :, : tiling.stride_frames + (i == 0)] for i, tile in enumerate(blended)]
    return jnp.concatenate(kept, axis=-3)


@partial(jax.jit, static_argnames="size")  # one compilation for all places
def _cut(x: Array, top: Any, left: Any, *, size: tuple[int, int]) -> Array:
    rows = jax.lax.dynamic_slice_in_dim(x, top, size[0], axis=-2)
    return jax.lax.dynamic_slice_in_dim(rows, left, size[1], axis=-1)


@partial(jax.jit, static_argnames=("overlap", "axis"))
def _blend(before: Array, after: Array, *, overlap: int, axis: int) -> Array:
    """Return the tile `after`, its first `overlap` entries faded in over the last of `before`."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    if overlap == 0:
        return after
    shape = [1] * after.ndim
    shape[axis] = overlap
    share = np.arange(overlap).reshape(shape) / overlap
    old = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    new, rest = jnp.split(after, [overlap], axis=axis)
    seam = old.astype(jnp.float32) * np.float32(1 - share)
    seam += new.astype(jnp.float32) * np.float32(share)
    return jnp.concatenate([seam.astype(after.dtype), rest], axis=axis)


@partial(jax.jit, static_argnums=(1, 2))
def _join_row(row: list[Array], height: int, width: int) -> Array:
    return jnp.concatenate([tile[..., :height, :width] for tile in row], axis=-1)
