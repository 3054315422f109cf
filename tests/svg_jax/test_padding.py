"""What padded text holds never matters: to labels, errors, outputs and gradients, on any path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax import SparsityConfig, VideoLayout, attend_dense, classify_heads, sparse_attention
from svg_jax.kernels import block_sparse_attention, dense_attention
from svg_jax.masks import sparse_mask
from svg_jax.models.attention import cross_attention
from svg_jax.models.attention import dense_attention as model_attention

CONFIG = SparsityConfig(density=0.7, sampled_rows=8, band_multiple=1)
RNG = jax.random.key(1)


def attend_in_all_ways(query, key, value, length, layout):
    """Outputs by name, and what profiling finds."""
    qkv, mask = (query, key, value), sparse_mask(layout, CONFIG)
    video = {"layout": layout, "text_length": length}
    out, info = sparse_attention(*qkv, config=CONFIG, rng=RNG, **video)
    dense, _ = sparse_attention(*qkv, config=SparsityConfig(density=1), **video)
    found = (info.labels, info.errors, classify_heads(*qkv, config=CONFIG, rng=RNG, **video))
    outputs = {
        "sparse": out,
        "density 1": dense,
        "attend_dense": attend_dense(*qkv, layer=jnp.int32(0), step_state=None, **video)[0],
        "a model's default": model_attention(*qkv, **video)[0],
        "oracle": block_sparse_attention(
            *qkv, masks=mask, text_length=length, implementation="reference"
        ),
    }
    if layout.text_position == "last":
        lengths = layout.video_tokens + length
        outputs["cross"] = cross_attention(query[:, :9], key, value, key_length=lengths)
        for name in ("xla", "reference"):
            outputs[f"dense by {name}"] = dense_attention(
                *qkv,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                implementation=name,
            )
    return outputs, found


@pytest.mark.parametrize("position", ["first", "last"])
def test_what_padding_holds_never_matters(position):
    layout = VideoLayout(num_frames=3, tokens_per_frame=8, text_tokens=5, text_position=position)
    length = jnp.array([2, 0, 5], jnp.int32)
    random = np.random.default_rng(0).standard_normal((4, 3, layout.num_tokens, 2, 8), np.float32)
    weight, qkv = random[0], random[1:]
    text = np.arange(layout.num_tokens) - layout.text_start
    padding = (text >= np.asarray(length)[:, None]) & (text >= 0) & (text < layout.text_tokens)
    hostile = np.resize(np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32), qkv.shape[1:])

    @jax.jit
    def attend(query, key, value):
        def loss(query, key, value):
            outputs, found = attend_in_all_ways(query, key, value, length, layout)
            total = sum((x * weight[:, : x.shape[1]]).sum() for x in outputs.values())
            return total, (outputs, found)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

    gradients, (outputs, found) = attend(*jnp.asarray(qkv))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, outputs, found)))
    assert np.asarray(found[0]).any()
    for which in ((0, 1, 2), (2,)):
        poisoned = qkv.copy()
        for n in which:
            poisoned[n][padding] = hostile[padding]
        after, (outputs_after, found_after) = attend(*jnp.asarray(poisoned))
        for name, out in outputs.items():
            np.testing.assert_array_equal(outputs_after[name], out, err_msg=name)
            if name != "cross":
                np.testing.assert_array_equal(np.asarray(out)[padding], 0, err_msg=name)
        for one, other in zip(
            jax.tree.leaves((found, gradients)), jax.tree.leaves((found_after, after)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        assert not any(np.asarray(gradient)[padding].any() for gradient in after)
