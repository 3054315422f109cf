"""The Hopper kernel compiles: Pallas lowers it for CUDA on any machine, at every shipped size."""

import jax
import jax.numpy as jnp
import pytest
from sizes import slow_but

from svg_jax.kernels import BandMask, mosaic_sampled_rows
from svg_jax.kernels import mosaic_attention as mosaic

# Batch 2, odd lengths, several masks.
SMALL = {
    "text first": ((BandMask(613, 100, text_tokens=17),), False),
    "text last and padded": ((BandMask(549, 77, text_start=520, text_tokens=29),), True),
    "sink": ((BandMask(701, 129, sink_tokens=90),), False),
    "several": ((BandMask(400, 60, text_tokens=30), BandMask(400, 9, text_tokens=30)), True),
    "one token": ((BandMask(1, 1),), False),
}
FULL = {
    "HunyuanVideo": ((BandMask(119056, 15360, text_start=118800, text_tokens=256),), True, 6, 128),
    "Wan": ((BandMask(75600, 12417, sink_tokens=3600),), False, 8, 128),
    "CogVideoX": ((BandMask(45106, 5760, text_tokens=226),), False, 12, 64),
}


def assert_lowers(function, *shapes):
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def lower(masks, padded, batch, heads, head_dim, dtype):
    def attend(query, key, value, mask_of_head, text_length):
        return mosaic.block_sparse_attention(
            query, key, value, masks=masks, mask_of_head=mask_of_head,
            text_length=text_length, scale=head_dim**-0.5,
        )  # fmt: skip

    x = jax.ShapeDtypeStruct((batch, masks[0].num_tokens, heads, head_dim), dtype)
    of_head = jax.ShapeDtypeStruct((batch, heads), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32) if padded else None
    assert_lowers(attend, x, x, x, of_head, lengths)


@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16], [jnp.bfloat16, jnp.float16]))
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("case", slow_but(["text last and padded", "several"], SMALL))
def test_every_mask_lowers_for_every_head_dim_and_dtype(case, head_dim, dtype):
    masks, padded = SMALL[case]
    lower(masks, padded, 2, 3, head_dim, dtype)


@pytest.mark.parametrize("case", FULL)
def test_full_sizes_lower(case):
    masks, padded, heads, head_dim = FULL[case]
    lower(masks, padded, 1, heads, head_dim, jnp.bfloat16)


@pytest.mark.parametrize("tokens", [261, 119056])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_block_lists_lower(head_dim, tokens):
    def attend(query, key, value, counts, blocks):
        return mosaic.block_list_attention(
            query, key, value, counts=counts, blocks=blocks, scale=head_dim**-0.5
        )

    x = jax.ShapeDtypeStruct((2, tokens, 3, head_dim), jnp.bfloat16)
    q_blocks = -(-tokens // 128)
    counts = jax.ShapeDtypeStruct((2, 3, q_blocks), jnp.int32)
    blocks = jax.ShapeDtypeStruct((2, 3, q_blocks, min(q_blocks, 200)), jnp.int32)
    assert_lowers(attend, x, x, x, counts, blocks)


@pytest.mark.parametrize("case", slow_but(["several", *FULL], [*SMALL, *FULL]))
@pytest.mark.parametrize("head_dim", slow_but([64, 128], [32, 64, 128]))
def test_sampled_rows_lower(case, head_dim):
    masks, padded = SMALL[case] if case in SMALL else FULL[case][:2]
    masks, tokens = (masks * 3)[:3], masks[0].num_tokens

    def attend(query, key, value, query_positions, key_positions, text_length):
        return mosaic_sampled_rows.sampled_attention(
            query, key, value, masks=masks, query_positions=query_positions,
            key_positions=key_positions, text_length=text_length, scale=head_dim**-0.5,
        )  # fmt: skip

    query = jax.ShapeDtypeStruct((2, 70, 3, head_dim), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, tokens, 3, head_dim), jnp.bfloat16)
    positions = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((3, 2, 70), (3, tokens))]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32) if padded else None
    assert_lowers(attend, query, x, x, *positions, lengths)
