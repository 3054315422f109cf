"""Lists of the blocks of keys that a GPU kernel visits: from masks, or from anyone's choice."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from svg_jax.kernels.block_mask import BandMask, block_map


class Lists(NamedTuple):
    """Which blocks of keys each block of queries visits, for each of several maps.

    Attributes:
        tested: How many blocks at the front of a list are tested pair by pair.
        counts: How many blocks are listed.
        blocks: Their numbers; what stands behind `counts` is ignored.
        bounds: Band width, start and end of the text, and end of the sink, for each map.
    """

    tested: Int[Array, "maps q_blocks"]
    counts: Int[Array, "maps q_blocks"]
    blocks: Int[Array, "maps q_blocks most"]
    bounds: Int[Array, "maps 4"]


def lists_of_heads(
    counts: Int[Array, "batch heads q_blocks"],
    blocks: Int[Array, "batch heads q_blocks most"],
    num_tokens: int,
    block_kv: int,
) -> Lists:
    """Make a user's lists for each head, one map a head, fit for a kernel.

    A partial last block is to be tested, so it goes to the front. A row without blocks gets one
    that lies behind all keys, so that every list has a first one.
    """
    counts = counts.reshape(-1, counts.shape[-1])
    blocks = blocks.reshape(-1, *blocks.shape[2:])
    num_blocks = -(-num_tokens // block_kv)
    place = jnp.arange(blocks.shape[-1])[None, None]
    is_partial = (
        (place < counts[..., None]) & (blocks == num_blocks - 1) & (num_tokens % block_kv != 0)
    )
    has_partial = is_partial.any(-1, keepdims=True)
    front = jnp.where(has_partial, num_blocks - 1, blocks[..., :1])
    swapped = jnp.where(is_partial, blocks[..., :1], blocks).at[..., :1].set(front)
    empty = (counts == 0)[..., None]
    return Lists(
        tested=(has_partial | empty)[..., 0].astype(jnp.int32),
        counts=jnp.maximum(counts, 1).astype(jnp.int32),
        blocks=jnp.where(empty, num_blocks, swapped).astype(jnp.int32),
        bounds=jnp.tile(jnp.array([[num_tokens, 0, 0, 0]], jnp.int32), (counts.shape[0], 1)),
    )


def lists_of_masks(
    masks: tuple[BandMask, ...], block_q: int, block_kv: int, padded_text: bool
) -> tuple[Lists, np.ndarray]:
    """List the masks' block maps, tested blocks first, and give the cost of each query block."""
    maps = [block_map(mask, block_q, block_kv, padded_text=padded_text) for mask in masks]
    most = max(each.indices.shape[1] for each in maps)
    blocks = []
    for each in maps:
        # What pads a list is not full either, and must not come to the front.
        behind = np.arange(each.indices.shape[1]) >= each.counts[:, None]
        tested_first = np.argsort(each.full + 2 * behind, axis=1, kind="stable")
        listed = np.take_along_axis(each.indices, tested_first, axis=1)
        blocks.append(np.pad(listed, [(0, 0), (0, most - listed.shape[1])], mode="edge"))
    counts = np.stack([each.counts for each in maps])
    whole = np.stack([each.full.sum(axis=1, dtype=np.int32) for each in maps])
    bounds = [[m.band_width, m.text_start, m.text_stop, m.sink_tokens] for m in masks]
    lists = Lists(counts - whole, counts, np.stack(blocks), np.array(bounds, np.int32))  # pyright: ignore[reportArgumentType]
    return lists, counts.max(axis=0)


def starting_order(weights: np.ndarray, num_heads: int) -> Int[Array, " items"]:
    """Query blocks of all heads in the order in which they start.

    Rows of text, which attend to everything, start first, for the last of them would run alone.
    The others go head by head and place by place, so that neighbours share keys in the cache; the
    shorter ones at the ends of a sequence last.
    """
    long = weights > 1.5 * np.median(weights)
    longest_first = np.argsort(-weights, kind="stable")
    heads = np.arange(num_heads)[:, None] * len(weights)
    first = (heads + longest_first[long[longest_first]]).reshape(-1)
    rest = (heads + longest_first[~long[longest_first]]).reshape(-1)
    return jnp.asarray(np.concatenate([first, rest]), jnp.int32)
