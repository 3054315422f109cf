"""The closed-form mask against its definition, its count, and its blocks against brute force."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svg_jax.kernels import BandMask, block_map, kept_pairs


@st.composite
def band_masks(draw, most_tokens: int = 40) -> BandMask:
    tokens = draw(st.integers(1, most_tokens))
    text = draw(st.integers(0, tokens))
    return BandMask(
        num_tokens=tokens,
        band_width=draw(st.integers(1, tokens + 2)),
        text_start=draw(st.sampled_from([0, tokens - text])),
        text_tokens=text,
        sink_tokens=draw(st.integers(0, tokens)),
    )


def table(mask: BandMask, text_length: int | None = None) -> np.ndarray:
    position = np.arange(mask.num_tokens)
    return mask.keep(position[:, None], position[None, :], text_length)


@settings(deadline=None)
@given(mask=band_masks(most_tokens=12), data=st.data())
def test_keep_is_the_definition(mask, data):
    text_length = data.draw(st.none() | st.integers(0, mask.text_tokens))
    real = mask.text_tokens if text_length is None else text_length
    text = range(mask.text_start, mask.text_start + mask.text_tokens)
    padding = range(mask.text_start + real, mask.text_start + mask.text_tokens)
    kept = table(mask, text_length)
    for q in range(mask.num_tokens):
        for k in range(mask.num_tokens):
            near = abs(q - k) < mask.band_width or k < mask.sink_tokens
            expected = near or q in text or k in text
            assert kept[q, k] == (expected and q not in padding and k not in padding)


def test_keep_is_the_same_for_jax_arrays_and_a_traced_text_length():
    mask = BandMask(num_tokens=30, band_width=4, text_start=23, text_tokens=7, sink_tokens=2)
    position = jnp.arange(30)
    lengths = jnp.array([0, 3, 7])
    traced = jax.jit(lambda n: mask.keep(position[:, None], position[None, :], n))
    for length in lengths:
        np.testing.assert_array_equal(traced(length), table(mask, int(length)))


@settings(deadline=None)
@given(mask=band_masks())
def test_kept_pairs_counts_the_table(mask):
    assert kept_pairs(mask) == table(mask).sum()
    lengths = np.arange(mask.text_tokens + 1)
    counted = np.array([table(mask, int(n)).sum() for n in lengths])
    np.testing.assert_array_equal(kept_pairs(mask, jnp.asarray(lengths)), counted)


@pytest.mark.parametrize(
    ("mask", "density"),
    [
        (BandMask(45_106, 5_760, text_tokens=226), 0.248),  # CogVideoX-1.5, 768×1360×81
        (BandMask(119_056, 15_616, text_start=118_800, text_tokens=256), 0.249),  # HunyuanVideo
        (BandMask(75_600, 12_417), 0.302),  # Wan 720p; it keeps |q - k| <= 12416
        (BandMask(75_600, 12_417, sink_tokens=3_600), 0.340),
    ],
)
def test_kept_pairs_at_full_size_are_the_published_densities(mask, density):
    exact = kept_pairs(mask)
    assert exact / mask.num_tokens**2 == pytest.approx(density, abs=6e-4)
    traced = jax.jit(lambda n: kept_pairs(mask, n))(jnp.int32(mask.text_tokens))
    assert float(traced) == pytest.approx(exact, rel=1e-6)


@settings(deadline=None, max_examples=200)
@given(
    mask=band_masks(),
    block_q=st.integers(1, 17),
    block_kv=st.integers(1, 17),
    padded_text=st.booleans(),
)
def test_blocks_hold_the_mask_and_full_ones_need_no_test(mask, block_q, block_kv, padded_text):
    blocks = block_map(mask, block_q, block_kv, padded_text=padded_text)
    lengths = range(mask.text_tokens + 1) if padded_text else [mask.text_tokens]
    tables = np.stack([table(mask, n) for n in lengths])
    # Queries of padding are blanked in the end: what a block would give them does not matter.
    position = np.arange(mask.num_tokens)
    is_real = np.stack([mask.is_real(position, n) for n in lengths])
    assert blocks.counts.shape == (-(-mask.num_tokens // block_q),)
    for i, count in enumerate(blocks.counts):
        rows = tables[:, i * block_q : (i + 1) * block_q]
        queries = is_real[:, i * block_q : (i + 1) * block_q, None]
        listed = blocks.indices[i, :count]
        assert (np.diff(listed) > 0).all()
        assert (blocks.indices[i, count:] == listed[-1]).all()
        assert not blocks.full[i, count:].any()
        for j in range(-(-mask.num_tokens // block_kv)):
            block = rows[:, :, j * block_kv : (j + 1) * block_kv]
            assert (j in listed) == block.any()
            if j in listed:
                keys_are_real = is_real[:, j * block_kv : (j + 1) * block_kv].all()
                whole = block.shape[2] == block_kv and (block | ~queries).all()
                full = blocks.full[i, list(listed).index(j)]
                # Where text may be padding, keys that touch it are tested whatever they hold.
                assert full == (whole and keys_are_real)


def test_block_map_is_cached_and_never_as_large_as_the_mask():
    mask = BandMask(119_056, 15_616, text_start=118_800, text_tokens=256)
    tracemalloc.start()
    blocks = block_map(mask, 128, 128)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**27  # the mask would be 13 GiB of booleans
    assert block_map(mask, 128, 128) is blocks
    with pytest.raises(ValueError, match="read-only"):
        blocks.counts[0] = 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0, "band_width": 1}, "at least one token"),
        ({"num_tokens": 8, "band_width": 0}, "band_width=0"),
        ({"num_tokens": 8, "band_width": 1, "text_tokens": 9}, "text_tokens=9"),
        ({"num_tokens": 8, "band_width": 1, "text_tokens": 2, "text_start": 3}, "first or last"),
        ({"num_tokens": 8, "band_width": 1, "sink_tokens": 9}, "sink_tokens=9"),
        ({"num_tokens": 8, "band_width": 1, "sink_tokens": -1}, "sink_tokens=-1"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BandMask(**arguments)


def test_blocks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="block_kv=0"):
        block_map(BandMask(8, 1), 4, 0)
