"""Online profiling against a float64 brute force that holds every mask whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.classify import _classify_heads, classify_heads, sample_rows
from svg_jax.config import SparsityConfig
from svg_jax.masks import sparse_mask
from svg_jax.models import VideoLayout
from svg_jax.token_order import token_major_position

COGVIDEOX = VideoLayout(num_frames=6, tokens_per_frame=23, text_tokens=9, text_position="first")
HUNYUANVIDEO = VideoLayout(num_frames=6, tokens_per_frame=23, text_tokens=9)
WAN = VideoLayout(num_frames=6, tokens_per_frame=23)
CONFIG = SparsityConfig(density=0.4, sampled_rows=16, band_multiple=8)


def random_qkv(layout, seed, batch=2, heads=3, head_dim=8):
    shape = (3, batch, layout.num_tokens, heads, head_dim)
    return 2 * jax.random.normal(jax.random.key(seed), shape)


def brute_force_errors(qkv, layout, config, rows, text_length):
    """Mean squared errors of both masks for the given rows, from whole S×S maps in float64."""
    query, key, value = (np.asarray(x, np.float64).swapaxes(1, 2) for x in qkv)
    mask = sparse_mask(layout, config)
    position = np.arange(layout.num_tokens)
    moved = token_major_position(position, layout)
    errors = np.empty((*query.shape[:2], 2))
    for b, length in enumerate(text_length):
        real = (position < layout.text_start) | (position >= layout.text_start + layout.text_tokens)
        real |= (position >= layout.text_start) & (position < layout.text_start + length)
        kept = (
            np.broadcast_to(real[None, :], (len(position), len(position))),
            mask.keep(position[:, None], position[None, :], np.asarray(length)),
            mask.keep(moved[:, None], moved[None, :], np.asarray(length)),
        )
        row = np.asarray(rows[b])
        scores = query[b, :, row].swapaxes(0, 1) @ key[b].swapaxes(1, 2) / np.sqrt(query.shape[-1])
        outputs = []
        for keep in kept:
            weights = np.where(keep[row], np.exp(scores - scores.max()), 0)
            outputs.append(weights / weights.sum(-1, keepdims=True) @ value[b])
        for i in (1, 2):
            errors[b, :, i - 1] = np.square(outputs[i] - outputs[0]).mean((-2, -1))
    return errors


@pytest.mark.parametrize("layout", [COGVIDEOX, HUNYUANVIDEO, WAN])
def test_errors_and_labels_agree_with_brute_force(layout):
    qkv, rng = random_qkv(layout, seed=1), jax.random.key(7)
    lengths = [layout.text_tokens, layout.text_tokens // 2]
    padded = layout is HUNYUANVIDEO
    labels, errors = classify_heads(
        *qkv,
        layout=layout,
        config=CONFIG,
        rng=rng,
        text_length=jnp.array(lengths, jnp.int32) if padded else None,
    )
    rows = np.tile(sample_rows(rng, layout, CONFIG.sampled_rows), (2, 1))
    expected = brute_force_errors(
        qkv, layout, CONFIG, rows, lengths if padded else [layout.text_tokens] * 2
    )
    np.testing.assert_allclose(errors, expected, rtol=1e-5)
    np.testing.assert_array_equal(labels, expected[..., 1] < expected[..., 0])


def test_a_head_that_looks_through_time_is_temporal_and_one_that_looks_around_is_spatial():
    layout = VideoLayout(num_frames=8, tokens_per_frame=32)
    place = np.arange(layout.num_tokens) % layout.tokens_per_frame
    frame = np.arange(layout.num_tokens) // layout.tokens_per_frame
    one_hot = np.stack([np.eye(32)[frame], np.eye(32)[place]], axis=1).astype(np.float32)
    query = jnp.asarray(one_hot)[None] * 60
    value = jax.random.normal(jax.random.key(0), query.shape)
    labels, errors = classify_heads(
        query,
        query,
        value,
        layout=layout,
        config=SparsityConfig(density=0.3, first_frame_sink=False, band_multiple=1),
        rng=jax.random.key(1),
    )
    np.testing.assert_array_equal(labels, [[False, True]])
    assert (errors.min(-1) < 0.1 * errors.max(-1)).all()


@pytest.mark.parametrize("layout", [COGVIDEOX, HUNYUANVIDEO, WAN])
def test_rows_are_distinct_video_tokens_of_the_whole_sequence(layout):
    for seed in range(20):
        rows = np.asarray(sample_rows(jax.random.key(seed), layout, 16))
        assert rows.shape == (16,)
        assert (np.diff(rows) > 0).all()
        assert rows.min() >= layout.video_start
        assert rows.max() < layout.video_start + layout.video_tokens
    every = sample_rows(jax.random.key(0), layout, 10_000)
    np.testing.assert_array_equal(every, layout.video_start + np.arange(layout.video_tokens))


def test_rows_reach_every_token_of_a_full_size_video():
    layout = VideoLayout(num_frames=33, tokens_per_frame=3600, text_tokens=256)
    rows = jax.vmap(lambda key: sample_rows(key, layout, 64))(
        jax.random.split(jax.random.key(0), 500)
    )
    counts = np.histogram(rows, bins=8, range=(0, layout.video_tokens))[0]
    assert (counts == 500 * 64 // 8).all()


@pytest.mark.parametrize("text_length", [0, 1, 9])
def test_nothing_is_nan_whatever_rows_are_drawn(text_length):
    qkv = 100 * random_qkv(HUNYUANVIDEO, seed=3)
    for seed in range(30):
        _, errors = classify_heads(
            *qkv,
            layout=HUNYUANVIDEO,
            config=SparsityConfig(density=0.14, sampled_rows=4),
            rng=jax.random.key(seed),
            text_length=jnp.full((2,), text_length, jnp.int32),
        )
        assert np.isfinite(errors).all()


def test_a_tie_is_spatial():
    query, key, value = random_qkv(WAN, seed=5)
    labels, errors = classify_heads(
        query, key, 0 * value, layout=WAN, config=CONFIG, rng=jax.random.key(0)
    )
    np.testing.assert_array_equal(errors, 0)
    assert not labels.any()


def test_new_labels_and_lengths_do_not_recompile():
    before = _classify_heads._cache_size()  # pyright: ignore
    for seed in range(3):
        classify_heads(
            *random_qkv(HUNYUANVIDEO, seed, heads=2),
            layout=HUNYUANVIDEO,
            config=CONFIG,
            rng=jax.random.key(seed),
            text_length=jnp.array([seed, 3], jnp.int32),
        )
    assert _classify_heads._cache_size() == before + 1  # pyright: ignore
