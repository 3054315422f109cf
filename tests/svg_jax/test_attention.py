"""sparse_attention: what each head attends to, what it reports, and how models take it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.attention import StepState, attend_dense, attend_sparse, sparse_attention
from svg_jax.config import SparsityConfig, Warmup
from svg_jax.masks import sparse_mask
from svg_jax.models import VideoLayout
from svg_jax.token_order import token_major_position

COGVIDEOX = VideoLayout(num_frames=5, tokens_per_frame=27, text_tokens=7, text_position="first")
HUNYUANVIDEO = VideoLayout(num_frames=5, tokens_per_frame=27, text_tokens=7)
WAN = VideoLayout(num_frames=5, tokens_per_frame=27)
FAMILIES = [COGVIDEOX, HUNYUANVIDEO, WAN]
CONFIG = SparsityConfig(density=0.4, sampled_rows=16, band_multiple=8)


def random_qkv(layout, batch=2, heads=4, head_dim=32):
    shape = (3, batch, layout.num_tokens, heads, head_dim)
    return 2 * jax.random.normal(jax.random.key(0), shape)


def masked_attention(qkv, kept):
    """Softmax attention in float64 under kept [batch, heads, S, S]."""
    query, key, value = (np.asarray(x, np.float64).swapaxes(1, 2) for x in qkv)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    weights = np.where(kept, np.exp(scores - scores.max()), 0)
    return (weights / weights.sum(-1, keepdims=True) @ value).swapaxes(1, 2)


@pytest.mark.parametrize("layout", FAMILIES)
def test_each_head_attends_under_its_own_pattern(layout):
    qkv = random_qkv(layout)
    labels = jnp.array([[False, True, False, True], [True, True, False, False]])
    out, info = sparse_attention(*qkv, layout=layout, config=CONFIG, labels=labels)

    mask, position = sparse_mask(layout, CONFIG), np.arange(layout.num_tokens)
    orders = np.stack([position, token_major_position(position, layout)])
    kept = mask.keep(orders[:, :, None], orders[:, None, :])[np.asarray(labels, int)]
    np.testing.assert_allclose(out, masked_attention(qkv, kept), rtol=1e-4, atol=1e-5)
    assert float(info.density) == pytest.approx(kept.mean(), rel=1e-6)
    np.testing.assert_array_equal(info.labels, labels)
    assert np.isnan(info.errors).all()


def test_padded_text_is_not_attended_and_stays_finite():
    query, key, value = random_qkv(HUNYUANVIDEO)
    length = jnp.array([3, 7], jnp.int32)
    labels = jnp.array([[False, True, False, True]] * 2)
    arguments = {"layout": HUNYUANVIDEO, "config": CONFIG, "labels": labels, "text_length": length}
    out, _ = sparse_attention(query, key, value, **arguments)
    padded = HUNYUANVIDEO.video_tokens + 3
    other, _ = sparse_attention(
        query, key.at[0, padded:].set(50.0), value.at[0, padded:].set(50.0), **arguments
    )
    np.testing.assert_array_equal(out[0, :padded], other[0, :padded])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("layout", FAMILIES)
def test_density_one_is_exactly_dense(layout):
    qkv = random_qkv(layout)
    config = SparsityConfig(density=1)
    out, info = sparse_attention(*qkv, layout=layout, config=config, rng=jax.random.key(0))
    dense = jax.jit(partial(attend_dense, layout=layout, text_length=None))
    dense, _ = dense(*qkv, layer=jnp.int32(0), step_state=None)
    np.testing.assert_array_equal(out, dense)
    assert float(info.density) == 1


def test_text_that_is_first_may_be_padded_too():
    qkv = random_qkv(COGVIDEOX)
    length = jnp.array([2, 7], jnp.int32)
    out, _ = sparse_attention(
        *qkv,
        layout=COGVIDEOX,
        config=SparsityConfig(density=1.0),
        rng=jax.random.key(0),
        text_length=length,
    )
    position = np.arange(COGVIDEOX.num_tokens)
    real = (position[None, :] >= 7) | (position[None, :] < np.asarray(length)[:, None])
    expected = masked_attention(qkv, np.broadcast_to(real[:, None, None, :], (2, 4, 142, 142)))
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], rtol=1e-4, atol=1e-5)


def scan_over_layers(attend, layers, step_state):
    query, key, value = random_qkv(WAN)

    def body(hidden, layer):
        return attend(
            hidden, key, value, layout=WAN, text_length=None, layer=layer, step_state=step_state
        )

    return jax.jit(lambda: jax.lax.scan(body, query, jnp.arange(layers, dtype=jnp.int32)))()


def test_the_first_layers_stay_dense_and_infos_are_stacked():
    state = StepState(rng=jax.random.key(3))
    attend = attend_sparse(CONFIG, 4, warmup=Warmup(layers=0.5))
    _, info = scan_over_layers(attend, 4, state)
    assert info.labels.shape == (4, 2, 4)
    assert info.errors.shape == (4, 2, 4, 2)
    np.testing.assert_array_equal(np.isnan(info.errors).any((1, 2, 3)), [True, True, False, False])
    np.testing.assert_array_equal(info.density == 1, [True, True, False, False])


def test_given_labels_are_used_layer_by_layer():
    labels = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 2, 4))
    state = StepState(rng=jax.random.key(3), labels=labels)
    _, info = scan_over_layers(attend_sparse(CONFIG, 3), 3, state)
    np.testing.assert_array_equal(info.labels, labels)


def test_each_layer_and_each_key_draws_other_rows():
    errors = [
        scan_over_layers(attend_sparse(CONFIG, 2), 2, StepState(rng=jax.random.key(seed)))[1].errors
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(errors[0], errors[1])
    assert (errors[0] != errors[2]).any()


def test_equal_settings_give_one_callable():
    assert attend_sparse(SparsityConfig(), 4) is attend_sparse(SparsityConfig(), 4)


def test_a_layers_attention_does_not_depend_on_the_dense_steps():
    short, long = (
        attend_sparse(CONFIG, 4, warmup=Warmup(steps=steps, layers=0.25)) for steps in (0.1, 0.9)
    )
    assert short is long
    assert attend_sparse(CONFIG, 4) is attend_sparse(CONFIG, 4, warmup=Warmup())
    assert attend_sparse(CONFIG, 4) is not short


def test_profiling_needs_a_key():
    with pytest.raises(ValueError, match="rng"):
        sparse_attention(*random_qkv(WAN), layout=WAN, config=CONFIG)


def test_arrays_must_fit_the_layout():
    with pytest.raises(ValueError, match="142 tokens"):
        sparse_attention(*random_qkv(COGVIDEOX), layout=WAN, config=CONFIG, rng=jax.random.key(0))
