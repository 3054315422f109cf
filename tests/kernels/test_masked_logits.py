"""A masked key has no weight, be all real logits near the lowest number that float32 has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.kernels import (
    BandMask,
    block_list_attention,
    block_sparse_attention,
    dense_attention,
    sampled_attention,
)

TOKENS = 200
MASK = BandMask(TOKENS, 30, text_start=180, text_tokens=20)
LENGTH = jnp.array([12], jnp.int32)
IMPLEMENTATIONS = ["xla", "reference"]


def with_logits_below(lowest):
    """Queries, keys and values: all logits lie between −lowest and −lowest / 2, far apart."""
    rng = np.random.default_rng(0)
    size = np.sqrt(lowest)
    query = np.full((1, TOKENS, 1, 1), size)
    key = -size * rng.permutation(np.linspace(0.5, 1, TOKENS)).reshape(query.shape)
    value = rng.standard_normal((1, TOKENS, 1, 4))
    wide = (np.repeat(x, 4 // x.shape[-1], axis=-1) for x in (query / 2, key / 2, value))
    return tuple(jnp.asarray(x, jnp.float32) for x in wide)


def exact(qkv, keep):
    """The output in float64; the values of the largest real logits, as the others underflow."""
    query, key, value = (np.asarray(x, np.float64)[0, :, 0] for x in qkv)
    logits = np.where(keep, query @ key.T, -np.inf)
    weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e300))
    return weights @ value / np.maximum(weights.sum(-1, keepdims=True), 1)


def assert_near(out, expected):
    np.testing.assert_allclose(np.asarray(out)[0, :, 0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_keys_lose_to_the_lowest_real_logits(implementation):
    lowest, position = 1e38, np.arange(TOKENS)
    keep = MASK.keep(position[:, None], position[None], np.array(12))
    qkv = with_logits_below(lowest)
    attend = partial(block_sparse_attention, implementation=implementation, scale=1.0)
    out, lse = attend(*qkv, masks=MASK, text_length=LENGTH, return_lse=True)
    assert_near(out, exact(qkv, keep))
    real = np.isfinite(np.asarray(lse)[0, 0])
    np.testing.assert_array_equal(real, keep.any(-1))
    assert (np.asarray(lse)[0, 0][real] < -0.4 * lowest).all()

    below = np.broadcast_to(position < 150, keep.shape)
    out = dense_attention(
        *qkv,
        key_value_seq_lengths=jnp.array([150], jnp.int32),
        implementation=implementation,
        scale=1.0,
    )
    assert_near(out, exact(qkv, below))

    one = jnp.ones((1, 1, 2), jnp.int32)  # the partial block, whose missing keys would have 0
    attend = partial(block_list_attention, implementation=implementation, scale=1.0)
    out, _ = attend(*qkv, counts=one, blocks=one[..., None])
    assert_near(out, exact(qkv, np.broadcast_to(position >= 128, keep.shape)))


@pytest.mark.parametrize("lowest", [1e32, 1e38])
def test_so_they_do_where_rows_are_sampled(lowest):
    position = jnp.arange(TOKENS, dtype=jnp.int32)
    qkv = with_logits_below(lowest)
    out = sampled_attention(
        *qkv,
        masks=(MASK,),
        query_positions=position[None, None],
        key_positions=position[None],
        text_length=LENGTH,
        scale=1.0,
        block_kv=64,
    )
    keep = MASK.keep(np.arange(TOKENS)[:, None], np.arange(TOKENS)[None], np.array(12))
    assert_near(out[0].swapaxes(1, 2), exact(qkv, keep))


def test_gradients_of_listed_blocks_are_the_oracles_and_rows_without_a_key_have_none():
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(rng.standard_normal((3, 1, 300, 2, 8)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((1, 300, 2, 8)), jnp.float32)
    counts = jnp.array([[[2, 0, 3], [1, 1, 0]]], jnp.int32)
    blocks = jnp.asarray(np.tile([2, 0, 1], (1, 2, 3, 1)), jnp.int32)

    def loss(qkv, implementation):
        out, lse = block_list_attention(
            *qkv, counts=counts, blocks=blocks, implementation=implementation
        )
        return (out * weight).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    gradients, expected = (
        jax.jit(jax.grad(partial(loss, implementation=name)))(qkv) for name in IMPLEMENTATIONS
    )
    np.testing.assert_allclose(gradients, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_array_equal(gradients[0, 0, 128:256, 0], 0)

    nothing = partial(
        block_sparse_attention,
        masks=BandMask(9, 1, text_tokens=9),
        text_length=jnp.zeros(1, jnp.int32),
    )
    gradients = jax.jit(jax.grad(lambda qkv: nothing(*qkv).sum()))(qkv[:, :, :9])
    np.testing.assert_array_equal(gradients, 0)
