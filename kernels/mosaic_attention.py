"""Block-sparse attention on Hopper, in Pallas: listed blocks of keys are all that is ever touched.

A block of queries belongs to two warpgroups of 64 rows; a third one fetches its listed keys and
values ahead of them by TMA. Blocks that a mask cuts through come first in a list and are tested
pair by pair in registers; the others run untested. Lists and masks are data: labels and prompts
change them without compiling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from svg_jax.kernels import mosaic_common as mgpu
from svg_jax.kernels.block_lists import Lists, lists_of_heads, lists_of_masks, starting_order
from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.mosaic_schedules import alternating, overlapped, pass_turn


@dataclass(frozen=True)
class Tiling:
    """Sizes of the blocks, and the schedule of the warpgroups.

    Attributes:
        block_kv: Keys in a block.
        stages: Blocks of keys and values that are fetched ahead.
        overlap: Whether a warpgroup multiplies its next block while it weighs the last one; else
            the two warpgroups take turns, one multiplying while the other weighs.
    """

    block_kv: int = 128
    stages: int = 2
    overlap: bool = True


CONSUMERS = 2
BLOCK_Q = CONSUMERS * mgpu.ROWS
# The faster of each on an H100; see docs/decisions/hopper-kernel.md.
TILINGS = {64: Tiling(block_kv=256, overlap=False), 128: Tiling()}
REGISTERS = (240, 24)  # a thread of a consumer and of the producer: 504 of 512 in all


def block_sparse_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch rows heads head_dim"],
    value: Float[Array, "batch rows heads head_dim"],
    mask_of_head: Int[Array, "batch heads"] | None,
    text_length: Int[Array, " batch"] | None,
    *,
    masks: tuple[BandMask, ...],
    scale: float,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch heads rows"]]:
    """Attend under closed-form masks; see `svg_jax.kernels.attention` for the contract.

    Rows behind the masks' tokens are padding: no keys, and zeros as queries.

    Args:
        query: Queries, bfloat16 or float16; head_dim up to 64, or 128.
        key: Keys.
        value: Values.
        mask_of_head: Number of each head's mask; None means the first.
        text_length: Real text tokens of each batch entry; None means all.
        masks: Masks to choose from.
        scale: Factor of the logits, positive.
        tiling: Sizes of blocks, and schedule; None is the fastest known.
        interpret: Parameters of Pallas' interpreter, to run on a CPU.
    """
    batch, num_rows, heads, head_dim = query.shape
    tiling = TILINGS[max(head_dim, 64)] if tiling is None else tiling
    lists, weights = lists_of_masks(masks, BLOCK_Q, tiling.block_kv, text_length is not None)
    if mask_of_head is None:
        mask_of_head = jnp.zeros((batch, heads), jnp.int32)
    out, lse = _attend(
        query,
        key,
        value,
        lists=jax.tree.map(jnp.asarray, lists),
        map_of_head=jnp.clip(mask_of_head, 0, len(masks) - 1),
        order=starting_order(weights, batch * heads),
        num_tokens=masks[0].num_tokens,
        masks=masks,
        text_length=text_length,
        scale=scale,
        tiling=tiling,
        interpret=interpret,
    )
    position = jnp.arange(lse.shape[-1])[None]
    length = None if text_length is None else text_length[:, None]
    real = masks[0].is_real(position, length) & (position < masks[0].num_tokens)
    lse = jnp.where(real[:, None], lse, -jnp.inf)
    return out[:, :num_rows, :, :head_dim], lse[..., :num_rows]


def block_list_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    counts: Int[Array, "batch heads q_blocks"],
    blocks: Int[Array, "batch heads q_blocks most"],
    *,
    scale: float,
    interpret: Any = None,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]:
    """Attend to listed blocks of 128 keys, whole; see `svg_jax.kernels.attention`."""
    batch, tokens, heads, head_dim = query.shape
    tiling = Tiling(block_kv=128, overlap=head_dim == 128)
    lists = lists_of_heads(counts, blocks, tokens, tiling.block_kv)
    out, lse = _attend(
        query,
        key,
        value,
        lists=lists,
        map_of_head=jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads),
        order=jnp.argsort(-lists.counts.reshape(-1), stable=True).astype(jnp.int32),
        num_tokens=tokens,
        masks=(),
        text_length=None,
        scale=scale,
        tiling=tiling,
        interpret=interpret,
    )
    return out[:, :tokens, :, :head_dim], lse[..., :tokens]


def _attend(
    query,
    key,
    value,
    *,
    lists: Lists,
    map_of_head: Int[Array, "batch heads"],
    order: Int[Array, " items"],
    num_tokens: int,
    masks: tuple[BandMask, ...],
    text_length: Int[Array, " batch"] | None,
    scale: float,
    tiling: Tiling,
    interpret: Any,
):
    query, key, value = (mgpu.pad_tokens(mgpu.pad_head_dim(x)) for x in (query, key, value))
    batch, _, heads, head_dim = query.shape
    block_kv = tiling.block_kv
    num_q_blocks = lists.counts.shape[1]
    edge, edge_value = mgpu.blanked_values(value, masks, text_length, block_kv)
    if text_length is None:
        text_length = jnp.full(batch, num_tokens, jnp.int32)

    options = {"num_tokens": num_tokens, "edge": edge, "scale": scale, "interpret": interpret}
    tile = partial(plgpu.SMEM, dtype=query.dtype, transforms=mgpu.TILED)
    ring = mgpu.ring(tile((tiling.stages, block_kv, head_dim)), readers=CONSUMERS)
    scratch = {
        "q_smem": tile((CONSUMERS, mgpu.ROWS, head_dim)),
        "lse_smem": plgpu.SMEM((CONSUMERS, mgpu.ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=CONSUMERS),
        "k_ring": ring,
        "v_ring": ring,
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    if interpret is not None:
        scratch["staging"] = mgpu.Staging(
            weights=tile((CONSUMERS, mgpu.ROWS, block_kv)),
            keys=tile((CONSUMERS, head_dim, block_kv)),
        )
    return mgpu.kernel(
        partial(_body, tiling=tiling, **options),
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, num_q_blocks * BLOCK_Q), jnp.float32),
        ),
        scratch_types=scratch,
        grid=order.shape,
        grid_names=("cta",),
    )(
        query,
        key,
        value,
        edge_value,
        *lists,
        map_of_head.reshape(-1).astype(jnp.int32),
        order,
        text_length.astype(jnp.int32),
    )


class _Place(NamedTuple):
    """Batch entry, head, map and number of a block of queries."""

    batch: Any
    head: Any
    which: Any
    q_block: Any

    def rows(self) -> Any:
        """Find the rows of this warpgroup."""
        return pl.ds(self.q_block * BLOCK_Q + lax.axis_index("warpgroup") * mgpu.ROWS, mgpu.ROWS)


class _Work(NamedTuple):
    """What the thread blocks have to do, one block of queries each; references to global memory.

    Attributes:
        lists: Blocks of keys of each map.
        map_of_head: Map of each head of each batch entry, [batch · heads].
        order: Numbers of the query blocks of all heads, in the order in which they start.
        text_length: Real text tokens of each batch entry.
        heads: Number of heads.
        num_tokens: Number of tokens, without padding.
    """

    lists: Lists
    map_of_head: Any
    order: Any
    text_length: Any
    heads: int
    num_tokens: int

    def place(self) -> _Place:
        """Find the queries of this thread block."""
        num_q_blocks = self.lists.counts.shape[1]
        chosen = self.order[lax.axis_index("cta")]
        entry, q_block = lax.div(chosen, num_q_blocks), lax.rem(chosen, num_q_blocks)
        batch, head = lax.div(entry, self.heads), lax.rem(entry, self.heads)
        return _Place(batch, head, self.map_of_head[entry], q_block)


def _body(
    q_ref,
    k_ref,
    v_ref,
    edge_ref,
    tested_ref,
    counts_ref,
    blocks_ref,
    bounds_ref,
    map_ref,
    order_ref,
    length_ref,
    out_ref,
    lse_ref,
    *,
    tiling: Tiling,
    num_tokens: int,
    edge: tuple[int, int],
    scale: float,
    interpret: Any,
    q_smem,
    k_ring: mgpu.Ring,
    v_ring: mgpu.Ring,
    lse_smem,
    q_ready,
    turn,
    staging=None,
):
    """Run one warpgroup of a thread block: two compute, the third fetches keys and values."""
    warpgroup = lax.axis_index("warpgroup")
    lists = Lists(tested_ref, counts_ref, blocks_ref, bounds_ref)
    work = _Work(lists, map_ref, order_ref, length_ref, out_ref.shape[2], num_tokens)

    @pl.when(warpgroup == CONSUMERS)
    def _produce():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        place = work.place()
        count = counts_ref[place.which, place.q_block]

        def fetch(n, _):
            block, slot = blocks_ref[place.which, place.q_block, n], k_ring.slot(n)
            here = (place.batch, block, place.head)
            plgpu.barrier_wait(k_ring.free.at[slot])
            mgpu.fetch_block(k_ref, k_ring, slot, (), *here)
            plgpu.barrier_wait(v_ring.free.at[slot])
            mgpu.fetch_block(v_ref, v_ring, slot, ((edge, edge_ref),), *here)

        lax.fori_loop(0, count, fetch, None)
        mgpu.await_readers(count, k_ring, v_ring)

    @pl.when(warpgroup < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        my_q, my_lse = q_smem.at[warpgroup], lse_smem.at[warpgroup]
        mgpu.release_all(k_ring, v_ring)
        if not tiling.overlap:  # the second warpgroup is half a step behind
            pl.when(warpgroup == 1)(partial(pass_turn, turn))
        place = work.place()
        queries = q_ref.at[place.batch, place.rows(), place.head]
        plgpu.copy_gmem_to_smem(queries, my_q, q_ready.at[warpgroup])
        plgpu.barrier_wait(q_ready.at[warpgroup])
        visit = overlapped if tiling.overlap else alternating
        acc, row_max, row_sum = visit(
            my_q,
            k_ring,
            v_ring,
            turn,
            jax.tree.map(lambda ref: ref.at[warpgroup], staging),
            test=_test(work, place, tiling.block_kv, interpret),
            tested=tested_ref[place.which, place.q_block],
            count=counts_ref[place.which, place.q_block],
            factor=scale * mgpu.LOG2_E,
            interpret=interpret,
        )
        # Found again: a place that is held over the loop takes registers, and others spill.
        place = work.place()
        rows = place.rows()
        row = mgpu.positions(my_q.shape, 0, interpret) + rows.start
        inverse = mgpu.by_row(1.0 / jnp.where(row_sum > 0, row_sum, 1.0), acc.shape)
        padding = _is_padding(work, place)(row)
        my_q[...] = jnp.where(padding, 0.0, acc * inverse).astype(my_q.dtype)
        lse = (row_max + jnp.log2(row_sum)) * (1 / mgpu.LOG2_E)
        my_lse[...] = jnp.where(row_sum > 0, lse, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(my_q, out_ref.at[place.batch, rows, place.head])
        plgpu.copy_smem_to_gmem(my_lse, lse_ref.at[place.batch, place.head, rows])
        plgpu.wait_smem_to_gmem(0)
        if not tiling.overlap:
            pl.when(warpgroup == 0)(partial(pass_turn, turn))


def _is_padding(work: _Work, place: _Place) -> Callable[[jax.Array], jax.Array]:
    """Make a function that tells which positions hold padding."""
    text_start, text_stop = (work.lists.bounds[place.which, n] for n in (1, 2))
    real_stop = jnp.clip(text_start + work.text_length[place.batch], text_start, text_stop)

    def is_padding(position):
        is_text = (position >= real_stop) & (position < text_stop)
        return is_text | (position >= work.num_tokens)

    return is_padding


def _test(
    work: _Work, place: _Place, block_kv: int, interpret: Any
) -> Callable[[jax.Array, Any], jax.Array]:
    """Make a function that masks the logits of the list's n-th block."""
    first_row, is_padding = place.rows().start, _is_padding(work, place)
    band, text_start, text_stop, sink = (work.lists.bounds[place.which, n] for n in range(4))

    def is_text(position):
        return (position >= text_start) & (position < text_stop)

    def test(logits, n):
        q = mgpu.positions(logits.shape, 0, interpret) + first_row
        first_key = work.lists.blocks[place.which, place.q_block, n] * block_kv
        k = mgpu.positions(logits.shape, 1, interpret) + first_key
        near = (q - k < band) & (k - q < band)
        kept = near | (k < sink) | is_text(k) | is_text(q)
        return jnp.where(kept & ~is_padding(k), logits, mgpu.MASKED)

    return test
