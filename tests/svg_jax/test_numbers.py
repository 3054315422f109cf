"""The same seed gives the same sparse video, however jax counts and whatever key it is given."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax import SparsityConfig, VideoLayout, sparse_attention
from svg_jax.classify import sample_rows
from svg_jax.kernels import block_list_attention, dense_attention
from svg_jax.sampling.schedules.noise import seed_key

LAYOUT = VideoLayout(num_frames=4, tokens_per_frame=12, text_tokens=8)
CONFIG = SparsityConfig(density=0.5, sampled_rows=8, band_multiple=1)
QKV = np.random.default_rng(0).standard_normal((3, 2, LAYOUT.num_tokens, 4, 16), np.float32)
SETTINGS = {
    "as it is": contextlib.nullcontext,
    "64 bits": lambda: jax.enable_x64(True),
    "another generator": lambda: jax.default_prng_impl("rbg"),
}


def sparse(qkv, rng):
    """Output and labels; lengths of text are of jax's default integers."""
    out, info = sparse_attention(
        *map(jnp.asarray, qkv),
        layout=LAYOUT,
        config=CONFIG,
        rng=rng,
        text_length=jnp.array([8, 3]),
    )
    return out, info.labels


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_seed_gives_the_same_keys_under_every_setting(setting):
    seeds = (0, 5, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
    with SETTINGS[setting]():
        of_step = [jax.random.fold_in(seed_key(seed), 3) for seed in seeds]
        keys = [np.asarray(jax.random.key_data(key)) for key in of_step]
        rows = sample_rows(jax.random.fold_in(seed_key(5), 3), LAYOUT, 8)
        assert rows.dtype == jnp.int32
    assert len({key.tobytes() for key in keys}) == len(seeds)
    for seed, key in zip(seeds[:4], keys, strict=False):  # what the default generator gives
        expected = jax.random.fold_in(jax.random.key(seed), 3)
        np.testing.assert_array_equal(key, jax.random.key_data(expected))
    np.testing.assert_array_equal(rows, sample_rows(jax.random.fold_in(seed_key(5), 3), LAYOUT, 8))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_key_gives_the_same_labels_and_output_under_every_setting(setting):
    def attend():
        return tuple(map(np.asarray, sparse(QKV, jax.random.fold_in(seed_key(5), 0))))

    expected = attend()
    jax.clear_caches()
    with SETTINGS[setting]():
        out, labels = attend()
        raw = jax.random.PRNGKey(0)
        assert np.isfinite(sparse(QKV, raw)[0]).all()
    assert out.dtype == np.float32
    np.testing.assert_array_equal(labels, expected[1])
    np.testing.assert_allclose(out, expected[0], rtol=1e-6, atol=1e-6)


def test_64_bits_are_kept():
    with jax.enable_x64(True):
        wide = jnp.asarray(QKV, jnp.float64)
        out, _ = sparse(wide, jax.random.fold_in(seed_key(5), 0))
        dense, _ = dense_attention(*wide, return_lse=True)
        counts = jnp.ones((2, 4, 1), jnp.int64)
        listed, _ = block_list_attention(*wide, counts=counts, blocks=counts[..., None] - 1)
    assert {x.dtype for x in (out, dense, listed)} == {np.dtype(np.float64)}
    np.testing.assert_allclose(listed, dense, rtol=1e-12)
    np.testing.assert_allclose(out, sparse(QKV, jax.random.fold_in(seed_key(5), 0))[0], atol=1e-5)
