"""The dense default attention of the models, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.models import Attend, VideoLayout, dense_attention
from svg_jax.models.attention import cross_attention, frame_causal_attention

FIRST = VideoLayout(3, 5, text_tokens=4, text_position="first")
LAST = VideoLayout(3, 5, text_tokens=4, text_position="last")
LONG = VideoLayout(7, 83, text_tokens=20, text_position="first")  # three blocks of rows, one ragged


def random_inputs(layout, dtype=jnp.float32, batch=2):
    shape = (batch, layout.num_tokens, 3, 8)
    query, key, value = jax.random.normal(jax.random.key(0), (3, *shape), dtype)
    return query, key, value


def formula(query, key, value, is_real):
    """Softmax(Q K^T / sqrt(D)) V over real keys, zero for rows that are not real."""
    return cross_formula(query, key, value, is_real) * is_real[:, :, None, None]


def cross_formula(query, key, value, is_real):
    """Softmax(Q K^T / sqrt(D)) V over real keys, [batch, keys] or [batch, queries, keys]."""
    is_real = is_real.reshape(len(is_real), 1, -1, key.shape[1])
    query, key, value = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * is_real
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def real_tokens(layout, text_length):
    text = np.arange(layout.num_tokens) - layout.text_start
    is_padding = (text >= np.asarray(text_length)[:, None]) & (text < layout.text_tokens)
    return ~is_padding


def test_it_is_an_attend():
    assert isinstance(dense_attention, Attend)


@pytest.mark.parametrize("layout", [FIRST, LAST, LONG, VideoLayout(1, 256), VideoLayout(1, 257)])
def test_without_padding_every_token_sees_every_token(layout):
    inputs = random_inputs(layout)
    out, info = dense_attention(*inputs, layout=layout)
    everything = np.ones((2, layout.num_tokens), bool)
    np.testing.assert_allclose(out, formula(*inputs, everything), atol=1e-5)
    assert info is None


@pytest.mark.parametrize("layout", [FIRST, LAST, LONG])
@pytest.mark.parametrize("text_length", [(4, 4), (0, 3), (1, 2)])
def test_padded_text_is_neither_query_nor_key(layout, text_length):
    inputs = random_inputs(layout)
    attend = jax.jit(lambda q, k, v, n: dense_attention(q, k, v, layout=layout, text_length=n)[0])
    out = attend(*inputs, jnp.array(text_length, jnp.int32))
    expected = formula(*inputs, real_tokens(layout, text_length))
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(("rows", "keys"), [(3, 7), (300, 5), (257, 512)])
@pytest.mark.parametrize("key_length", [None, (1, 5)])
def test_another_sequence_is_attended_to_up_to_its_length(rows, keys, key_length):
    query, _, _ = random_inputs(VideoLayout(1, rows))
    _, key, value = random_inputs(VideoLayout(1, keys))
    length = None if key_length is None else jnp.array(key_length, jnp.int32)
    out = jax.jit(cross_attention)(query, key, value, key_length=length)
    is_real = np.arange(keys) < np.array(key_length or (keys, keys))[:, None]
    np.testing.assert_allclose(out, cross_formula(query, key, value, is_real), atol=1e-5)


def test_16_bit_inputs_lose_no_more_than_their_rounding():
    inputs = random_inputs(LONG, jnp.bfloat16)
    out, _ = dense_attention(*inputs, layout=LONG)
    assert out.dtype == jnp.bfloat16
    everything = np.ones((2, LONG.num_tokens), bool)
    np.testing.assert_allclose(
        np.asarray(out.astype(jnp.float32)), formula(*inputs, everything), atol=2e-3
    )


@pytest.mark.parametrize("layout", [VideoLayout(1, 7), VideoLayout(5, 3), VideoLayout(7, 83)])
def test_frames_attend_to_themselves_and_those_before(layout):
    inputs = random_inputs(layout)
    attend = jax.jit(frame_causal_attention, static_argnames="frame_tokens")
    out = attend(*inputs, frame_tokens=layout.tokens_per_frame)
    frames = np.repeat(np.arange(layout.num_frames), layout.tokens_per_frame)
    is_seen = np.tile(frames[None, :] <= frames[:, None], (2, 1, 1))
    np.testing.assert_allclose(out, cross_formula(*inputs, is_seen), atol=1e-5)


def test_neither_pass_holds_the_scores_of_all_tokens():
    layout = VideoLayout(8, 512)
    inputs = [jax.ShapeDtypeStruct((1, layout.num_tokens, 1, 32), jnp.float32)] * 3

    def loss(*inputs):
        return dense_attention(*inputs, layout=layout)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < layout.num_tokens**2 * 4 / 2


def test_the_scores_of_all_rows_are_not_held_at_once():
    rows, keys, heads = 8192, 512, 8
    shapes = [(1, rows, heads, 16), (1, keys, heads, 16), (1, keys, heads, 16)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(*inputs):
        return cross_attention(*inputs).sum()

    for function in (cross_attention, jax.grad(loss, argnums=(0, 1, 2))):
        memory = jax.jit(function).lower(*inputs).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < heads * rows * keys * 4 / 4


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [257, 512])
@pytest.mark.parametrize("key_length", [None, (31, 256)])
def test_cudnn_attends_to_another_sequence(keys, key_length):
    query, _, _ = random_inputs(VideoLayout(3, 211), jnp.bfloat16)
    _, key, value = random_inputs(VideoLayout(1, keys), jnp.bfloat16)
    length = None if key_length is None else jnp.array(key_length, jnp.int32)
    out = jax.jit(cross_attention)(query, key, value, key_length=length)
    is_real = np.arange(keys) < np.array(key_length or (keys, keys))[:, None]
    expected = cross_formula(query, key, value, is_real)
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), expected, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [FIRST, LAST, LONG])
def test_cudnn_equals_the_formula(layout):
    inputs = random_inputs(layout, jnp.bfloat16)
    length = jnp.array([1, 3], jnp.int32)
    out, _ = dense_attention(*inputs, layout=layout, text_length=length)
    expected = formula(*inputs, real_tokens(layout, length))
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), expected, atol=2e-2)
