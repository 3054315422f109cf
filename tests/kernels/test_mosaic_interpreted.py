"""The Hopper kernel on a CPU: Pallas' interpreter runs its threads, copies and barriers.

It shows that the arithmetic is right, that no thread waits for ever and that no two touch the same
memory unordered. The GPU's own tests are in test_gpu.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from svg_jax.kernels import BandMask, block_sparse_attention, mosaic_sampled_rows, reference
from svg_jax.kernels import mosaic_attention as mosaic
from svg_jax.kernels import sampled_rows as portable
from svg_jax.kernels.mosaic_attention import Tiling

INTERPRET = InterpretGPUParams(
    detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
)
# jax 0.10 drops a copy that stands partly outside its array, which a GPU fills with zeros.
needs_partial_copies = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10's interpreter drops copies at an array's end"
)


def random_qkv(tokens, head_dim, batch=1, heads=1):
    rng = np.random.default_rng(tokens + head_dim)
    shape = (3, batch, tokens, heads, head_dim)
    return tuple(jnp.asarray(1.5 * rng.standard_normal(shape), jnp.bfloat16))


def widened(qkv):
    return (x.astype(jnp.float32) for x in qkv)


def assert_equal_but_for_rounding(actual, attend_exactly, qkv):
    """Weights and output are rounded to bfloat16, each by 2⁻⁸ of itself at most; nothing else is.

    So |error| ≤ 2 · 2⁻⁸ · Σ weight · |value|, for every single number.
    """
    out, lse = actual
    query, key, value = widened(qkv)
    expected, expected_lse = attend_exactly(query, key, value)
    most, _ = attend_exactly(query, key, jnp.abs(value))
    error = np.abs(np.asarray(out, np.float32) - expected)
    np.testing.assert_array_less(error, np.asarray(most) * 2**-7 + 1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-5)  # −inf only where −inf is
    empty = np.isneginf(np.asarray(expected_lse)).swapaxes(1, 2)
    assert not np.asarray(out, np.float32)[empty].any()


def check(masks, head_dim, *, tiling, mask_of_head=None, lengths=None, heads=1):
    batch = 1 if lengths is None else len(lengths)
    tokens = masks[0].num_tokens
    qkv = poisoned = random_qkv(tokens, head_dim, batch, heads)
    text_length = None if lengths is None else jnp.array(lengths, jnp.int32)
    if lengths is not None:
        with_text = next(mask for mask in masks if mask.text_tokens)
        position = np.arange(tokens)
        real = jnp.asarray(with_text.is_real(position[None], np.array(lengths)[:, None]))
        nan = jnp.array(jnp.nan, jnp.bfloat16)
        poisoned = [jnp.where(real[:, :, None, None], x, nan) for x in qkv]
    if mask_of_head is not None:
        mask_of_head = jnp.array(mask_of_head, jnp.int32)
    actual = mosaic.block_sparse_attention(
        *poisoned,
        masks=masks,
        mask_of_head=mask_of_head,
        text_length=text_length,
        scale=0.3,
        tiling=tiling,
        interpret=INTERPRET,
    )
    assert actual[0].dtype == jnp.bfloat16
    assert not interpreter.get_races().races_found
    exactly = partial(
        block_sparse_attention,
        masks=masks,
        mask_of_head=mask_of_head,
        text_length=text_length,
        scale=0.3,
        implementation="reference",
        return_lse=True,
    )
    assert_equal_but_for_rounding(actual, exactly, qkv)


# Bands a little wider than a block of 128 keys leave some blocks whole and cut through others.
@pytest.mark.parametrize(
    ("overlap", "lengths"), [(True, [7]), pytest.param(False, [0], marks=pytest.mark.slow)]
)
def test_padded_text_may_hold_nan(overlap, lengths):
    mask = BandMask(256, 140, text_start=216, text_tokens=40)
    check((mask,), 32, lengths=lengths, tiling=Tiling(overlap=overlap))


def test_each_head_runs_its_own_mask():
    masks = (BandMask(128, 20, text_tokens=17), BandMask(128, 1, sink_tokens=30))
    check(masks, 64, mask_of_head=[[1, 0, 1]], heads=3, tiling=Tiling(overlap=False))


@pytest.mark.slow
def test_a_ring_of_two_tiles_goes_round_over_four_blocks_of_keys():
    check((BandMask(256, 150, sink_tokens=90),), 128, tiling=Tiling(block_kv=64))


@needs_partial_copies
@pytest.mark.parametrize("overlap", [True, False])
def test_odd_lengths(overlap):
    mask = BandMask(333, 140, text_tokens=21)
    check((mask,), 48, lengths=[3], tiling=Tiling(block_kv=256, overlap=overlap))


@needs_partial_copies
def test_one_token():
    check((BandMask(1, 1),), 64, tiling=mosaic.TILINGS[64])


@pytest.mark.slow
def test_text_lengths_beyond_the_text_mean_none_and_all_of_it():
    mask = BandMask(128, 20, text_start=98, text_tokens=30)
    check((mask,), 64, lengths=[-3, 99], tiling=Tiling(overlap=False))


def test_tokens_behind_the_masks_are_padding():
    mask = BandMask(123, 20, sink_tokens=10)
    qkv = random_qkv(128, 64)
    actual = mosaic.block_sparse_attention(
        *qkv,
        masks=(mask,),
        mask_of_head=None,
        text_length=None,
        scale=0.3,
        tiling=Tiling(overlap=False),
        interpret=INTERPRET,
    )
    exactly = partial(
        block_sparse_attention,
        masks=mask,
        scale=0.3,
        implementation="reference",
        return_lse=True,
    )
    assert_equal_but_for_rounding(actual, exactly, qkv)


@needs_partial_copies
@pytest.mark.parametrize("head_dim", [64, 128])
def test_listed_blocks_are_attended_whole_and_a_row_of_blocks_may_have_none(head_dim):
    qkv = random_qkv(261, head_dim)
    counts = jnp.array([[[2, 0, 1]]], jnp.int32)
    blocks = jnp.array([[[[0, 2], [1, 1], [1, 2]]]], jnp.int32)
    actual = mosaic.block_list_attention(
        *qkv, counts=counts, blocks=blocks, scale=0.3, interpret=INTERPRET
    )
    assert not interpreter.get_races().races_found
    listed = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    keep = jnp.asarray(listed.repeat(128, axis=0).repeat(128, axis=1)[:261, :261])[None, None]
    exactly = partial(reference.masked_attention, keep=keep, scale=0.3)
    assert_equal_but_for_rounding(actual, exactly, qkv)


@needs_partial_copies
@pytest.mark.parametrize("text_start", [0, 244])
@pytest.mark.parametrize(("columns", "head_dim"), [(61, 64), (62, 128)])
def test_sampled_rows_under_three_masks(text_start, columns, head_dim):
    rows, text = 4, 16
    text_start = text_start and rows * columns
    tokens = text + rows * columns
    start = 0 if text_start else text
    masks = tuple(
        BandMask(tokens, band, text_start=text_start, text_tokens=text, sink_tokens=sink)
        for band, sink in ((tokens, 0), (40, 0), (40, 0 if text_start == 0 else 20))
    )
    key_positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
    place = np.arange(rows * columns)
    key_positions[2, start + place] = start + place % columns * rows + place // columns
    rng = np.random.default_rng(columns)
    chosen = start + rng.choice(rows * columns, (2, 70), replace=False).astype(np.int32)
    chosen[:, :4] = text_start + np.array([0, 4, 5, 15])  # text, of which some is padding
    lengths = jnp.array([text, 5], jnp.int32)
    query, key, value = random_qkv(tokens, head_dim, batch=2)
    query = jnp.take_along_axis(query, jnp.asarray(chosen)[:, :, None, None], axis=1)
    real = masks[0].is_real(np.arange(tokens)[None], np.array(lengths)[:, None])
    nan = jnp.array(jnp.nan, jnp.bfloat16)
    poisoned = [jnp.where(jnp.asarray(real)[:, :, None, None], x, nan) for x in (key, value)]
    options = {
        "masks": masks,
        "query_positions": jnp.asarray(key_positions[:, chosen]),
        "key_positions": jnp.asarray(key_positions),
        "text_length": lengths,
        "scale": 0.3,
    }
    out = mosaic_sampled_rows.sampled_attention(query, *poisoned, interpret=INTERPRET, **options)
    assert not interpreter.get_races().races_found
    attend = partial(portable.sampled_attention, implementation="xla", **options)
    query, key, value = widened((query, key, value))
    error = np.abs(np.asarray(out) - attend(query, key, value))
    np.testing.assert_array_less(error, 2**-8 * attend(query, key, jnp.abs(value)) + 1e-6)
