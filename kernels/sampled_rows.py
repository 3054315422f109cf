"""Attention of a few sampled query rows under several masks at once: scores are computed once."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from svg_jax.kernels import mosaic_common, mosaic_sampled_rows
from svg_jax.kernels.batching import vmap_as_batch
from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.sharding import compiler_may_split, vary_like

# Below every logit and yet finite: where a row has kept nothing yet, −inf − −inf would be NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def sampled_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    masks: tuple[BandMask, ...],
    query_positions: Int[Array, "masks batch rows"],
    key_positions: Int[Array, "masks tokens"],
    text_length: Int[Array, " batch"] | None = None,
    scale: float | None = None,
    block_kv: int = 4096,
    implementation: Literal["mosaic_gpu", "xla"] | None = None,
) -> Float[Array, "masks batch heads rows head_dim"]:
    """Attend with the given rows, exactly, once per mask, by online softmaxes over blocks of keys.

    Under mask m row r of entry b keeps key j if and only if `masks[m].keep(query_positions[m, b,
    r], key_positions[m, j], text_length[b])`. Memory is linear in rows and `block_kv`: no rows ×
    tokens mask is ever stored.

    Args:
        query: The sampled rows only.
        key: All keys.
        value: All values.
        masks: The masks.
        query_positions: Position of each row in the order of tokens of each mask, int32.
        key_positions: Position of each key in the order of tokens of each mask, int32.
        text_length: Real text tokens of each entry, int32; None means that all text is real.
        scale: Factor of the scores; 1/√head_dim if None.
        block_kv: Most keys in a block, of the portable implementation.
        implementation: "mosaic_gpu" (Hopper; up to three masks; bfloat16 or float16), "xla" or None
            for the fastest that can run on the default device.

    Returns:
        float32 outputs; zeros for a row that keeps no key.

    Raises:
        ValueError: If the implementation that is asked for cannot run here.
    """
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    why_not = mosaic_common.why_not(query.shape[-1], query.dtype)
    if len(masks) > mosaic_sampled_rows.MOST_MASKS:
        why_not = why_not or f"it takes {mosaic_sampled_rows.MOST_MASKS} masks, not {len(masks)}"
    if implementation == "mosaic_gpu" and why_not:
        raise ValueError(f"implementation='mosaic_gpu' cannot run here: {why_not}")
    if implementation != "xla" and not why_not:

        def on_hopper(query, key, value, query_positions, key_positions, text_length):
            out = mosaic_sampled_rows.sampled_attention(
                query,
                key,
                value,
                masks=masks,
                query_positions=query_positions.swapaxes(0, 1),
                key_positions=key_positions[0],
                text_length=text_length,
                scale=scale,
            )
            return out.swapaxes(0, 1)

        by_entry = (
            query_positions.swapaxes(0, 1),
            jnp.broadcast_to(key_positions[None], (query.shape[0], *key_positions.shape)),
        )
        out = vmap_as_batch(on_hopper)(query, key, value, *by_entry, text_length)
        return out.swapaxes(0, 1)
    batch, rows, heads, head_dim = query.shape
    tokens = key.shape[1]
    num_blocks = -(-tokens // block_kv)
    block_kv = -(-tokens // num_blocks)
    state = (heads, len(masks) * rows)  # the masks' rows one below the other
    dot = partial(jnp.matmul, precision="highest")

    def one_entry(query, key, value, query_positions, length, each_head: Callable):
        def visit(carry, block):
            # The last block is moved back inside the sequence; what it repeats is masked away.
            start = jnp.minimum(block * block_kv, tokens - block_kv)
            fresh = start + jnp.arange(block_kv, dtype=jnp.int32) >= block * block_kv
            columns = lax.dynamic_slice_in_dim(key_positions, start, block_kv, axis=1)
            kept = jnp.stack(
                [
                    mask.keep(row[:, None], column[None], length) & fresh[None]
                    for mask, row, column in zip(masks, query_positions, columns, strict=True)
                ]
            )

            def one_head(args):
                row_max, weight, output, query, key, value = args
                keys, values = (lax.dynamic_slice_in_dim(x, start, block_kv) for x in (key, value))
                if length is not None:  # padding may hold NaN, and 0 · NaN is NaN
                    values = jnp.where(kept.any((0, 1))[:, None], values, 0.0)
                scores = jnp.where(kept, dot(query, keys.T)[None], -jnp.inf)
                scores = scores.reshape(-1, block_kv)
                new_max = jnp.maximum(row_max, scores.max(-1, keepdims=True))
                probabilities = jnp.exp(scores - new_max)
                rescale = jnp.exp(row_max - new_max)  # 0 where the first key is kept only now
                weight = weight * rescale + probabilities.sum(-1, keepdims=True)
                return new_max, weight, output * rescale + dot(probabilities, values)

            return each_head(one_head, (*carry, query, key, value)), None

        first = tuple(
            vary_like(jnp.full((*state, width), fill, jnp.float32), query)
            for width, fill in ((1, LOWEST), (1, 0.0), (head_dim, 0.0))
        )
        blocks = jnp.arange(num_blocks, dtype=jnp.int32)
        (_, weight, output), _ = lax.scan(visit, first, blocks)
        return output / jnp.where(weight > 0, weight, 1.0)

    query, key, value = (x.swapaxes(1, 2).astype(jnp.float32) for x in (query, key, value))
    query *= scale

    def run(*args, each: Callable):
        return each(lambda entry: one_entry(*entry, each_head=each), args)

    def together(body: Callable, args):
        return jax.vmap(body)(args)

    output = lax.platform_dependent(
        query,
        key,
        value,
        query_positions.swapaxes(0, 1),
        text_length,
        # One head's scores stay in a CPU's caches; one head alone does not fill an accelerator.
        cpu=partial(run, each=together if compiler_may_split(query) else lax.map),
        default=partial(run, each=together),
    )
    return output.reshape(batch, heads, len(masks), rows, head_dim).transpose(2, 0, 1, 3, 4)
