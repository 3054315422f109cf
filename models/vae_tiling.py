"""Videos too large to encode or decode at once: overlapping tiles, and the blending of their seams.

Tiles are computed one after the other from the host, and those of equal shape by the same compiled
function: a GPU needs the memory of one tile. A tile does not see beyond its edge (nor do norms and
attention), so that the result is not that of the whole: tiles are part of what is computed.
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

Progress = Callable[[int, int], None]  # tiles done, tiles in all


@dataclass(frozen=True)
class Tiling:
    """Tiles of a video in space, in pixels; all of them multiples of a latent's pixels.

    Attributes:
        tile_height: Rows of a tile; tiles at the bottom have those that are left.
        tile_width: Columns of a tile; tiles on the right have those that are left.
        stride_height: Rows from one tile to the next; what a tile has beyond them is blended.
        stride_width: Columns from one tile to the next.
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
        """How many tiles a video of these pixels has."""
        if self.holds(height, width):
            return 1
        return math.ceil(height / self.stride_height) * math.ceil(width / self.stride_width)

    def holds(self, height: int, width: int) -> bool:
        """Whether one tile is enough."""
        return height <= self.tile_height and width <= self.tile_width

    def in_latents(self, ratio: int) -> "Tiling":
        """The same tiles counted in latents of ratio × ratio pixels.

        Raises:
            ValueError: If they are no whole number of latents.
        """
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        if any(size % ratio for size in sizes.values()):
            raise ValueError(f"{self}: every size must be a multiple of a latent's {ratio} pixels.")
        return Tiling(**{name: size // ratio for name, size in sizes.items()})


@dataclass(frozen=True)
class FrameTiling:
    """Tiles of a video in time, in frames; all of them multiples of a latent's frames.

    Attributes:
        tile_frames: Frames of a tile, without the one before them that is computed as well.
        stride_frames: Frames from one tile to the next; what a tile has beyond them is blended.
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
        """The same tiles counted in latents of `ratio` frames.

        Raises:
            ValueError: If they are no whole number of latents.
        """
        if self.tile_frames % ratio or self.stride_frames % ratio:
            raise ValueError(f"{self}: both must be multiples of a latent's {ratio} frames.")
        return FrameTiling(self.tile_frames // ratio, self.stride_frames // ratio)


def encode_tiles(
    encode: Callable[[Array], Array],
    video: Float[Array, "batch channels frames height width"],
    tiling: Tiling,
    ratio: int,
    progress: Progress | None = None,
    *,
    fits: bool | None = None,
) -> Float[Array, "batch out_channels latent_frames latent_height latent_width"]:
    """Encodes a video tile by tile.

    Args:
        encode: (pixels) -> latents, compiled; a tile's, of full size or what is left at the edges.
        video: The video.
        tiling: The tiles.
        ratio: Pixels to a latent, along rows and along columns.
        progress: Called after each tile.
        fits: Whether one tile is enough; None if that is the tiling's to say.
    """
    fits = tiling.holds(*video.shape[-2:]) if fits is None else fits
    return _map_tiles(encode, video, tiling, tiling.in_latents(ratio), progress, fits)


def decode_tiles(
    decode: Callable[[Array], Array],
    latents: Float[Array, "batch channels latent_frames latent_height latent_width"],
    tiling: Tiling,
    ratio: int,
    progress: Progress | None = None,
) -> Float[Array, "batch out_channels frames height width"]:
    """Decodes latents tile by tile; see `encode_tiles`."""
    tiles = tiling.in_latents(ratio)
    return _map_tiles(decode, latents, tiles, tiling, progress, tiles.holds(*latents.shape[-2:]))


def _map_tiles(
    function: Callable[[Array], Array],
    x: Array,
    tiles_in: Tiling,
    tiles_out: Tiling,
    progress: Progress | None,
    fits: bool,
) -> Array:
    height, width = x.shape[-2:]
    overlap_height = tiles_out.tile_height - tiles_out.stride_height
    overlap_width = tiles_out.tile_width - tiles_out.stride_width
    if fits:
        out = function(x)
        if progress is not None:
            progress(1, 1)
        return out
    tops = range(0, height, tiles_in.stride_height)
    lefts = range(0, width, tiles_in.stride_width)
    rows, above, done = [], [], 0
    for top in tops:
        row = []
        for left in lefts:
            size = (min(tiles_in.tile_height, height - top), min(tiles_in.tile_width, width - left))
            tile = function(_cut(x, top, left, size=size))
            # With the tiles above and on the left as they were blended, and with the one above
            # first: corners depend on it.
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
    """Joins tiles in time.

    Args:
        tiles: All of them in order. The first has one frame more than the others, in front.
        tiling: The tiles, counted in the frames of these.
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
    """The tile `after`, its first `overlap` entries fading in over the last ones of `before`."""
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
