"""Masked attention in its plainest form: the oracle that all other implementations are held to.

It builds whole S×S arrays; nothing but tests and small studies should call it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from svg_jax.kernels.block_mask import BandMask


def keep_table(
    masks: tuple[BandMask, ...],
    mask_of_head: Int[Array, "batch heads"],
    text_length: Int[Array, " batch"] | None,
) -> Bool[Array, "batch heads tokens tokens"]:
    """Write the closed-form masks out for every pair of tokens."""
    position = jnp.arange(masks[0].num_tokens, dtype=jnp.int32)
    query, key = position[None, :, None], position[None, None, :]
    length = None if text_length is None else text_length[:, None, None]
    batch = mask_of_head.shape[0]
    shape = (batch, position.size, position.size)
    tables = [jnp.broadcast_to(mask.keep(query, key, length), shape) for mask in masks]
    of_batch = jax.vmap(lambda table, index: jnp.take(table, index, axis=0, mode="clip"))
    return of_batch(jnp.stack(tables, axis=1), mask_of_head)


def masked_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    keep: Bool[Array, "batch #heads queries keys"],
    *,
    scale: float,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """Softmax attention over the kept keys, accumulated in float32, or float64 if so given.

    Returns:
        The output in the query's dtype and the natural log-sum-exp of the scaled logits in the
        accumulator's; rows that keep no key are 0 and -inf.
    """
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    # What keeps nothing, or is kept by none, may hold anything: 0 * NaN must not reach a sum, of
    # the output or of a gradient.
    keeps, kept = (jnp.any(keep, axis).swapaxes(1, 2)[..., None] for axis in (-1, -2))
    query = jnp.where(keeps, query, jnp.zeros((), query.dtype))
    key, value = (jnp.where(kept, x, jnp.zeros((), x.dtype)) for x in (key, value))
    query_, key, value = (x.astype(dtype) for x in (query, key, value))
    highest = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bqhd,bkhd->bhqk", query_, key, precision=highest) * scale
    logits = jnp.where(keep, logits, -jnp.inf)
    some = jnp.any(keep, axis=-1, keepdims=True)
    row_max = jnp.where(some, jnp.max(logits, axis=-1, keepdims=True), 0.0)
    weights = jnp.exp(logits - jax.lax.stop_gradient(row_max))
    row_sum = jnp.where(some, jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights / row_sum, value, precision=highest)
    lse = jnp.where(some, jax.lax.stop_gradient(row_max) + jnp.log(row_sum), -jnp.inf)
    return out.astype(query.dtype), lse[..., 0]
