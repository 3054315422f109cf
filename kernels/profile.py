"""Attention of a few sampled query rows under several masks at once, in one read of K and V."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sampled_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    keep: Callable[[Int[Array, " keys"]], Bool[Array, "masks batch rows keys"]],
    scale: float | None = None,
    block_kv: int = 1024,
) -> Float[Array, "masks batch heads rows head_dim"]:
    """Exact outputs of the given rows, once per mask, by online softmaxes over blocks of keys.

    Scores are computed once and shared by the masks; memory is linear in rows and `block_kv`.

    Args:
        query: The sampled rows only.
        key: All keys.
        value: All values.
        keep: Says which of the keys at these positions each mask keeps for each row. A function,
            not an array: a rows × tokens mask is never stored.
        scale: Factor of the scores; 1/√head_dim if None.
        block_kv: Keys a block.

    Returns:
        float32 outputs; zeros for a row that keeps no key.
    """
    batch, rows, heads, head_dim = query.shape
    tokens = key.shape[1]
    block_kv = min(block_kv, tokens)
    scaled_query = query.astype(jnp.float32) * (head_dim**-0.5 if scale is None else scale)

    def visit(carry, block):
        highest, weight, output = carry
        # The last block is moved back inside the sequence; what it repeats is masked away.
        start = jnp.minimum(block * block_kv, tokens - block_kv)
        positions = start + jnp.arange(block_kv, dtype=jnp.int32)
        keys = jax.lax.dynamic_slice_in_dim(key, start, block_kv, axis=1).astype(jnp.float32)
        values = jax.lax.dynamic_slice_in_dim(value, start, block_kv, axis=1).astype(jnp.float32)
        kept = keep(positions) & (positions >= block * block_kv)[None, None, None, :]
        scores = jnp.einsum("brhd,bkhd->bhrk", scaled_query, keys, precision="highest")
        scores = jnp.where(kept[:, :, None], scores[None], -jnp.inf)

        new_highest = jnp.maximum(highest, scores.max(-1))
        # A row that has kept nothing yet has −inf everywhere, and −inf − −inf would be NaN.
        anchor = jnp.where(jnp.isfinite(new_highest), new_highest, 0.0)
        probabilities = jnp.exp(scores - anchor[..., None])
        decay = jnp.exp(highest - anchor)
        weight = weight * decay + probabilities.sum(-1)
        update = jnp.einsum("mbhrk,bkhd->mbhrd", probabilities, values, precision="highest")
        return (new_highest, weight, output * decay[..., None] + update), None

    masks = jax.eval_shape(keep, jax.ShapeDtypeStruct((block_kv,), jnp.int32)).shape[0]
    state = (masks, batch, heads, rows)
    first = (
        jnp.full(state, -jnp.inf, jnp.float32),
        jnp.zeros(state, jnp.float32),
        jnp.zeros((*state, head_dim), jnp.float32),
    )
    blocks = jnp.arange(-(-tokens // block_kv), dtype=jnp.int32)
    (_, weight, output), _ = jax.lax.scan(visit, first, blocks)
    return output / jnp.where(weight > 0, weight, 1.0)[..., None]
