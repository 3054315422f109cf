"""What the Hopper kernels share, and the one place that knows how versions of Pallas differ."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.sharding import vary_like

ROWS = 64  # of a warpgroup: what one wgmma multiplies
NUM_SMS = 132  # of an H100 and an H200
LOG2_E = math.log2(math.e)
# The largest logit so far starts below every logit, but finite: −inf − −inf would be NaN.
MASKED, FLOOR = -math.inf, float(jnp.finfo(jnp.float32).min)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def why_not(head_dim: int, dtype: Any) -> str:
    """Say in a clause why the Hopper kernels cannot run, or nothing where they can."""
    if jax.default_backend() != "gpu":
        return f"the default device is {jax.default_backend()}, not an NVIDIA GPU"
    device = jax.devices()[0]
    if getattr(device, "compute_capability", "") != "9.0":
        return f"it is made for Hopper (H100, H200), not {device.device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype)}: cast the arrays first"
    if head_dim > 64 and head_dim != 128:
        return f"it takes a head_dim up to 64 or of 128, not {head_dim}"
    return ""


def pad_head_dim(x: jax.Array) -> jax.Array:
    """Fill head_dim up to 64 with zeros, which is exact."""
    return x if x.shape[-1] >= 64 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 64 - x.shape[-1])])


def pad_tokens(x: jax.Array, multiple: int = 8) -> jax.Array:
    """Fill the tokens of [batch, tokens, ...] up: TMA takes whole multiples of eight rows."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def kernel(body: Callable, *, warpgroups: int, interpret: Any, **options: Any) -> Callable:
    """Make a Mosaic GPU kernel; `interpret` runs it on a CPU (see `Staging`)."""
    if interpret is not None:
        options["interpret"] = interpret
    run = plgpu.kernel(
        body,
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The maximum and the sum of a row stay within four lanes and need no scratch.
            reduction_scratch_bytes=512,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **options,
    )

    def call(*operands: jax.Array) -> Any:
        return jax.tree.map(partial(vary_like, like=operands[0]), run(*operands))

    return call


def full(shape: tuple[int, ...], value: float, layout: Any, interpret: Any) -> jax.Array:
    """Make a constant in registers; the interpreter knows no layouts, in 0.10 not even by name."""
    constant = jnp.full(shape, value, jnp.float32)
    return constant if interpret is not None else plgpu.layout_cast(constant, layout)


def positions(shape: tuple[int, ...], axis: int, interpret: Any) -> jax.Array:
    """Give each element of an accumulator its row's or column's number."""
    layout = None if interpret is not None else plgpu.Layout.WGMMA
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def load_line(ref: Any, index: tuple, layout: Any, interpret: Any) -> jax.Array:
    """Load a line of shared memory as one value for each row or column of an accumulator."""
    if interpret is not None:
        return ref[index]
    if hasattr(plgpu, "mma"):  # jax 0.11
        return plgpu.load(ref.at[index], layout=layout)  # pyright: ignore[reportCallIssue]
    return plgpu.load(ref, index, layout=layout)


def by_row(line: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value a row over the columns."""
    return lax.broadcast_in_dim(line, shape, [0])


def by_column(line: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value a column over the rows."""
    return lax.broadcast_in_dim(line, shape, [1])


class Ring(NamedTuple):
    """Tiles of shared memory that one warpgroup fills in turn, and others read.

    Attributes:
        free: Barriers that say of each tile when its readers have left it.
        ready: Barriers that say of each tile when it is filled.
        tiles: The tiles, [stages, rows, head_dim].
    """

    free: Any
    ready: Any
    tiles: Any

    def slot(self, n: Any) -> Any:
        """Give the number of the tile that the n-th block goes to."""
        return lax.rem(n, self.tiles.shape[0])


def ring(tiles: Any, *, readers: int, copies: int = 1) -> Ring:
    """Describe a ring in scratch memory, by how many warpgroups read and copies fill a tile."""
    free, ready = (
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.shape[0])
        for arrivals in (readers, copies)
    )
    return Ring(free, ready, tiles)


def release_all(*rings: Ring) -> None:
    """Mark all tiles as free, as each reader does before the first is filled."""
    for slot in range(rings[0].tiles.shape[0]):
        for each in rings:
            plgpu.barrier_arrive(each.free.at[slot])


def await_readers(step: Any, *rings: Ring) -> None:
    """Wait, behind `step` blocks, for all readers: no barrier may end with arrivals unseen."""
    for n in range(rings[0].tiles.shape[0]):
        for each in rings:
            plgpu.barrier_wait(each.free.at[each.slot(step + n)])


class Staging(NamedTuple):
    """Shared memory that only the interpreter needs.

    It multiplies neither from registers nor from a transposed reference (0.10's), and it does not
    add to an accumulator that is given.
    """

    weights: Any
    keys: Any


def add_logits(logits_ref: Any, query: Any, keys: Any, staging: Staging | None) -> None:
    """Start logits += query @ keysᵀ; both are references to shared memory."""
    if staging is not None:
        staging.keys[...] = keys[...].T
        plgpu.commit_smem()
        plgpu.wgmma(logits_ref, query, staging.keys)
    elif hasattr(plgpu, "mma"):  # jax 0.11
        plgpu.wgmma(logits_ref, query, keys.transpose((1, 0)))
    else:
        plgpu.wgmma(logits_ref, query, plgpu.transpose_ref(keys, (1, 0)))


def logits(
    query: Any, keys: Any, staging: Staging | None, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """Multiply query @ keysᵀ, and do something else meanwhile."""

    def multiply(logits_ref):
        add_logits(logits_ref, query, keys, staging)
        meanwhile()
        return logits_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((query.shape[0], keys.shape[0]), jnp.float32))


def empty_accumulator(head_dim: int, interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Make an accumulator of zeros, and each row's maximum logit and sum of weights so far."""
    return (
        full((ROWS, head_dim), 0.0, plgpu.Layout.WGMMA, interpret),
        full((ROWS,), FLOOR, ROW, interpret),
        full((ROWS,), 0.0, ROW, interpret),
    )


def online_softmax(
    logits: jax.Array, row_max: jax.Array, factor: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute weights under the new running maximum, the factor of older sums, and the maximum."""
    new_max = jnp.maximum(row_max, logits.max(axis=1) * factor)
    weights = jnp.exp2(logits * factor - by_row(new_max, logits.shape))
    return weights, jnp.exp2(row_max - new_max), new_max


def product(weights: jax.Array, values: Any, acc: jax.Array, staging: Staging | None) -> jax.Array:
    """Add weights (16 bits, in registers) @ values (in shared memory) to a float32 accumulator."""

    def multiply(acc_ref):
        if staging is None:
            acc_ref[...] = acc
            plgpu.wgmma(acc_ref, weights, values)
        else:
            staging.weights[...] = weights
            plgpu.commit_smem()
            plgpu.wgmma(acc_ref, staging.weights, values)
        return acc_ref[...]

    out = pl.run_scoped(multiply, plgpu.ACC((acc.shape[0], acc.shape[1]), jnp.float32))
    return out if staging is None else acc + out


def blanked_values(
    value: jax.Array, masks: tuple[BandMask, ...], text_length: jax.Array | None, block_kv: int
) -> tuple[tuple[int, int], jax.Array]:
    """Copy the few blocks of values that may hold padding, with it blanked: 0 · NaN would be NaN.

    Returns:
        Numbers of the first such block and of the one behind the last (equal: there are none), and
        the blocks.
    """
    if text_length is None:
        return (0, 0), value
    mask = masks[0]  # text stands at one place in all of them
    first, stop = mask.text_start // block_kv, -(-mask.text_stop // block_kv)
    blocks = value[:, first * block_kv : stop * block_kv]
    position = first * block_kv + jnp.arange(blocks.shape[1], dtype=jnp.int32)
    real = mask.is_real(position[None], text_length[:, None])
    return (first, stop), pad_tokens(
        jnp.where(real[:, :, None, None], blocks, jnp.zeros((), value.dtype))
    )


def aligned_tokens(
    key: jax.Array, value: jax.Array, block_kv: int
) -> tuple[tuple[int, int], jax.Array, jax.Array, jax.Array]:
    """Split [batch, tokens, ...] into what TMA can read, a multiple of eight tokens, and the rest.

    Returns:
        The number of the block that is cut through and behind it (equal: there is none); keys and
        values up to the last whole eight, which XLA hands to a kernel without a copy where batch is
        1; and that block of both, filled up and stacked: one small program makes it, not two.
        Where there is none, a constant: not even one program.
    """
    tokens = key.shape[1]
    whole = tokens // 8 * 8
    if whole == tokens or whole == 0:
        rest = jnp.zeros((2, 1, 8, 1, key.shape[-1]), key.dtype)
        return (0, 0), pad_tokens(key), pad_tokens(value), rest
    last = tokens // block_kv
    rest = jnp.stack([pad_tokens(x[:, last * block_kv :]) for x in (key, value)])
    return (last, last + 1), key[:, :whole], value[:, :whole], rest


def fetch_block(
    source: Any,
    ring: Ring,
    slot: Any,
    patches: tuple[tuple[tuple[int, int], Any], ...],
    batch: Any,
    block: Any,
    head: Any,
) -> None:
    """Start to copy a block of keys or values to a slot of a ring.

    Args:
        source: Keys or values in global memory, [batch, tokens, heads, head_dim].
        ring: Ring to fill.
        slot: Number of the tile.
        patches: First block and the one behind the last, and the blocks to take in their place;
            the first patch that has a block counts.
        batch: Batch entry.
        block: Number of the block.
        head: Number of the head.
    """
    block_kv = ring.tiles.shape[1]

    def fetch(source, number):
        rows = (batch, pl.ds(number * block_kv, block_kv), head)
        plgpu.copy_gmem_to_smem(source.at[rows], ring.tiles.at[slot], ring.ready.at[slot])

    elsewhere = True
    for (first, stop), patch in patches:
        if first == stop:
            continue
        here = (block >= first) & (block < stop)
        pl.when(elsewhere & here)(partial(fetch, patch, block - first))
        elsewhere &= ~here
    if elsewhere is True:
        fetch(source, block)
    else:
        pl.when(elsewhere)(partial(fetch, source, block))
