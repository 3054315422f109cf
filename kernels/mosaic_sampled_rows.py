"""Outputs of a few sampled rows under up to three masks, on Hopper: one read of K and V.

A thread block takes a stretch of the keys of one head. One warpgroup fetches them, and each mask
has a warpgroup of its own, which multiplies and weighs 64 rows. The stretches are joined outside.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from svg_jax.kernels import mosaic_common as mgpu
from svg_jax.kernels.block_mask import BandMask

MOST_MASKS = 3
BLOCK_KV = {64: 128, 128: 64}
STAGES = 3


def sampled_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    masks: tuple[BandMask, ...],
    query_positions: Int[Array, "masks batch rows"],
    key_positions: Int[Array, "masks tokens"],
    text_length: Int[Array, " batch"] | None,
    scale: float,
    interpret: Any = None,
) -> Float[Array, "masks batch heads rows head_dim"]:
    """Attend with the given rows, once per mask; see `svg_jax.kernels.sampled_rows`."""
    batch, num_rows, heads, head_dim = query.shape
    num_tokens = key.shape[1]
    query = mgpu.pad_tokens(mgpu.pad_head_dim(query), mgpu.ROWS)
    key, value = mgpu.pad_head_dim(key), mgpu.pad_head_dim(value)
    width = query.shape[-1]
    block_kv = BLOCK_KV[width]
    num_blocks = -(-num_tokens // block_kv)
    row_groups = query.shape[1] // mgpu.ROWS
    splits = min(num_blocks, max(1, mgpu.NUM_SMS // (batch * heads * row_groups)))
    rows, places = _places(masks, query_positions, key_positions, text_length)
    rows = jnp.pad(rows, [(0, 0)] * 3 + [(0, query.shape[1] - num_rows)])
    missing = num_blocks * block_kv - num_tokens
    places = jnp.pad(places, [(0, 0)] * 2 + [(0, missing)], constant_values=jnp.inf)
    edge, edge_value = mgpu.blanked_values(value, masks, text_length, block_kv)
    tail, key, value, tail_blocks = mgpu.aligned_tokens(key, value, block_kv)

    tile = partial(plgpu.SMEM, dtype=query.dtype, transforms=mgpu.TILED)
    blocks = tile((STAGES, block_kv, width))
    scratch = {
        "q_smem": tile((mgpu.ROWS, width)),
        "row_smem": plgpu.SMEM((len(masks), 2, mgpu.ROWS), jnp.float32),
        "key_smem": plgpu.SMEM((STAGES, len(masks), block_kv), jnp.float32),
        "out_smem": plgpu.SMEM((len(masks), mgpu.ROWS, width), jnp.float32),
        "sum_smem": plgpu.SMEM((len(masks), 2, mgpu.ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=2),
        "k_ring": mgpu.ring(blocks, readers=len(masks), copies=2),
        "v_ring": mgpu.ring(blocks, readers=len(masks)),
    }
    if interpret is not None:
        scratch["staging"] = mgpu.Staging(
            weights=tile((len(masks), mgpu.ROWS, block_kv)),
            keys=tile((len(masks), width, block_kv)),
        )
    lead = (splits, len(masks), batch, heads, query.shape[1])
    of_rows = jax.ShapeDtypeStruct(lead, jnp.float32)
    out, row_max, row_sum = mgpu.kernel(
        partial(_body, edge=edge, tail=tail, factor=scale * mgpu.LOG2_E, interpret=interpret),
        warpgroups=len(masks) + 1,
        interpret=interpret,
        out_type=(jax.ShapeDtypeStruct((*lead, width), jnp.float32), of_rows, of_rows),
        scratch_types=scratch,
        grid=(splits, row_groups, heads, batch),
        grid_names=("split", "group", "head", "batch"),
    )(query, key, value, edge_value, tail_blocks, rows, places)

    joined = _joined(out, row_max, row_sum)[..., :num_rows, :head_dim]
    if text_length is None:
        return joined
    real = jnp.stack(
        [
            mask.is_real(positions, text_length[:, None])
            for mask, positions in zip(masks, query_positions, strict=True)
        ]
    )
    return jnp.where(real[:, :, None, :, None], joined, 0.0)


def _joined(
    out: Float[Array, "splits masks batch heads rows head_dim"],
    row_max: Float[Array, "splits masks batch heads rows"],
    row_sum: Float[Array, "splits masks batch heads rows"],
) -> Float[Array, "masks batch heads rows head_dim"]:
    """Join the softmaxes of all stretches of keys."""
    share = jnp.exp2(row_max - row_max.max(axis=0, keepdims=True))
    row_sum = (share * row_sum).sum(axis=0)
    return (share[..., None] * out).sum(axis=0) / jnp.where(row_sum > 0, row_sum, 1.0)[..., None]


def _places(
    masks: tuple[BandMask, ...],
    query_positions: Int[Array, "masks batch rows"],
    key_positions: Int[Array, "masks tokens"],
    text_length: Int[Array, " batch"] | None,
) -> tuple[Float[Array, "masks batch 2 rows"], Float[Array, "masks batch tokens"]]:
    """Turn the masks into one comparison: a row keeps a key unless |row − key| ≥ reach.

    A key that is always kept stands at NaN, for which no comparison holds, padding at infinity, and
    the reach of a row of text is infinite. All masks are turned at once, since many small programs
    would take longer than the kernel.

    Returns:
        Place and reach of each row, and the place of each key. Integers up to 2²⁴ are exact.
    """
    fields = ((m.band_width, m.text_start, m.text_stop, m.sink_tokens) for m in masks)
    band, start, stop, sink = (
        jnp.array(field, jnp.int32)[:, None, None] for field in zip(*fields, strict=True)
    )
    real_stop = stop
    if text_length is not None:
        real_stop = jnp.clip(start + text_length[None, :, None], start, stop)
    key = key_positions[:, None]
    is_text, is_real = (key >= start) & (key < stop), (key >= start) & (key < real_stop)
    place = jnp.where(is_real | (key < sink), jnp.nan, key.astype(jnp.float32))
    place = jnp.where(is_text & ~is_real, jnp.inf, place)
    of_text = (query_positions >= start) & (query_positions < stop)
    reach = jnp.where(of_text, jnp.inf, band.astype(jnp.float32))
    shape = (len(masks), query_positions.shape[1], key.shape[2])
    rows = jnp.stack([query_positions.astype(jnp.float32), reach], axis=2)
    return rows, jnp.broadcast_to(place, shape)


def _body(
    q_ref,
    k_ref,
    v_ref,
    edge_ref,
    tail_ref,
    row_ref,
    key_ref,
    out_ref,
    max_ref,
    sum_ref,
    *,
    edge: tuple[int, int],
    tail: tuple[int, int],
    factor: float,
    interpret: Any,
    q_smem,
    row_smem,
    key_smem,
    out_smem,
    sum_smem,
    q_ready,
    k_ring: mgpu.Ring,
    v_ring: mgpu.Ring,
    staging=None,
):
    """Run one warpgroup of a thread block: the producer, or that of a mask."""
    warpgroup = lax.axis_index("warpgroup")
    split, group = lax.axis_index("split"), lax.axis_index("group")
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    splits, num_masks = out_ref.shape[:2]
    block_kv = k_ring.tiles.shape[1]
    num_blocks = key_ref.shape[-1] // block_kv
    first = lax.div(split * num_blocks, splits)
    count = lax.div((split + 1) * num_blocks, splits) - first
    rows = pl.ds(group * mgpu.ROWS, mgpu.ROWS)

    @pl.when(warpgroup == num_masks)
    def _produce():
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, q_ready)
        plgpu.copy_gmem_to_smem(row_ref.at[:, batch, :, rows], row_smem, q_ready)

        def fetch(n, _):
            slot = k_ring.slot(n)
            keys = pl.ds((first + n) * block_kv, block_kv)
            plgpu.barrier_wait(k_ring.free.at[slot])
            here = (batch, first + n, head)
            mgpu.fetch_block(k_ref, k_ring, slot, ((tail, tail_ref.at[0]),), *here)
            places = key_ref.at[:, batch, keys]
            plgpu.copy_gmem_to_smem(places, key_smem.at[slot], k_ring.ready.at[slot])
            plgpu.barrier_wait(v_ring.free.at[slot])
            patches = ((edge, edge_ref), (tail, tail_ref.at[1]))
            mgpu.fetch_block(v_ref, v_ring, slot, patches, *here)

        lax.fori_loop(0, count, fetch, None)
        mgpu.await_readers(count, k_ring, v_ring)

    @pl.when(warpgroup < num_masks)
    def _consume():
        mgpu.release_all(k_ring, v_ring)
        plgpu.barrier_wait(q_ready)
        memory = (q_smem, k_ring, v_ring, row_smem, key_smem)
        my_staging = jax.tree.map(lambda ref: ref.at[warpgroup], staging)
        of_mask = {"mask": warpgroup, "count": count, "factor": factor, "interpret": interpret}
        acc, row_max, row_sum = _visit(*memory, my_staging, **of_mask)
        out_smem[warpgroup] = acc
        sum_smem[warpgroup, 0] = row_max
        sum_smem[warpgroup, 1] = row_sum
        plgpu.commit_smem()
        here = (split, warpgroup, batch, head, rows)
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[here])
        plgpu.copy_smem_to_gmem(sum_smem.at[warpgroup, 0], max_ref.at[here])
        plgpu.copy_smem_to_gmem(sum_smem.at[warpgroup, 1], sum_ref.at[here])
        plgpu.wait_smem_to_gmem(0)


def _visit(q_smem, k_ring, v_ring, row_smem, key_smem, staging, *, mask, count, factor, interpret):
    """Attend to the blocks of a stretch under one mask, whose lines `_places` describes.

    Returns:
        The weighted sum of values, and of each row the largest logit and the sum of the weights.
    """
    block_kv = k_ring.tiles.shape[1]
    shape = (mgpu.ROWS, block_kv)
    row, reach = (
        mgpu.by_row(mgpu.load_line(row_smem, (mask, n), mgpu.ROW, interpret), shape)
        for n in range(2)
    )

    def dropped(slot):
        place = mgpu.load_line(key_smem, (slot, mask), mgpu.COLUMN, interpret)
        return jnp.abs(mgpu.by_column(place, shape) - row) >= reach

    def visit(n, carry):
        acc, row_max, row_sum = carry
        slot = k_ring.slot(n)
        plgpu.barrier_wait(k_ring.ready.at[slot])
        # Fetched before the product, a line is there behind it; one of 128 keys would spill.
        early = dropped(slot) if block_kv <= 64 else None
        logits = mgpu.logits(q_smem, k_ring.tiles.at[slot], staging)
        logits = jnp.where(dropped(slot) if early is None else early, mgpu.MASKED, logits)
        plgpu.barrier_arrive(k_ring.free.at[slot])
        weights, rescale, row_max = mgpu.online_softmax(logits, row_max, factor)
        acc *= mgpu.by_row(rescale, acc.shape)
        row_sum = row_sum * rescale + weights.sum(axis=1)
        plgpu.barrier_wait(v_ring.ready.at[slot])
        acc = mgpu.product(weights.astype(q_smem.dtype), v_ring.tiles.at[slot], acc, staging)
        plgpu.barrier_arrive(v_ring.free.at[slot])
        return acc, row_max, row_sum

    start = mgpu.empty_accumulator(q_smem.shape[1], interpret)
    return lax.fori_loop(0, count, visit, start)
