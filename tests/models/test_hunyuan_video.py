"""What HunyuanVideo's transformer alone promises: padding, token_replace, what it refuses."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_transformers import CONCAT, REPLACE, make_model, model_inputs, run
from random_transformers import PLAIN_HUNYUAN_VIDEO as CONFIG

from svg_jax.models import (
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    VideoLayout,
    dense_attention,
)


def test_rows_of_padding_stay_finite_and_so_do_the_gradients_through_them():
    inputs = {**model_inputs(CONFIG), "text_length": jnp.array([6, 1], jnp.int32)}
    graph, params = nnx.split(make_model(CONFIG), nnx.Param)

    def loss(params, attend):
        velocity, norms = nnx.merge(graph, params)(**inputs, attend=attend)
        return jnp.mean(velocity**2), norms

    def attend(query, key, value, **context):
        context = {name: context[name] for name in ("layout", "text_length")}
        out, _ = dense_attention(query, key, value, **context)
        return out, sum(jnp.abs(x).sum() for x in (query, key, value))  # of padding, too

    gradient, norms = jax.jit(jax.grad(partial(loss, attend=attend), has_aux=True))(params)
    assert jnp.isfinite(norms).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_first_frame_of_token_replace_alone_does_not_see_the_time_in_its_modulation():
    """Without attention each token's velocity depends on its own input and modulation."""

    def attend(query, key, value, **context):
        return jnp.zeros_like(value), None

    def velocities(config):
        inputs = model_inputs(config)
        later = {**inputs, "timestep": inputs["timestep"] / 2, "guidance": inputs["guidance"] / 2}
        # The last modulation is by the time for all frames: a constant leaves the layers' own.
        model = nnx.merge(*nnx.split(make_model(config)))
        model.output_modulation.kernel[...] = jnp.zeros_like(model.output_modulation.kernel[...])
        return (run(model, **x, attend=attend)[0] for x in (inputs, later))

    now, later = velocities(REPLACE)
    np.testing.assert_array_equal(now[:, :, 0], later[:, :, 0])
    assert jnp.abs(now[:, :, 1] - later[:, :, 1]).max() > 1e-3
    now, later = velocities(CONFIG)
    assert jnp.abs(now[:, :, 0] - later[:, :, 0]).max() > 1e-3


def test_no_product_of_hidden_states_is_float32_in_bfloat16():
    """Float32 arrays of that size may stand inside a fusion, but a product keeps its operands."""
    model = nnx.eval_shape(
        lambda: HunyuanVideoTransformer(
            REPLACE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    graph, state = nnx.split(model)
    tokens = model.layout(2, 8, 8, 6).num_tokens

    def attend(query, key, value, **context):
        return value, None

    def forward(state, inputs):
        return nnx.merge(graph, state)(**inputs, attend=attend)[0]

    text = jax.jit(forward).lower(state, model_inputs(REPLACE)).as_text()
    products = [
        re.findall(r"tensor<([^>]*)>", line) for line in text.splitlines() if "dot_general" in line
    ]
    large = re.compile(rf"2x({tokens}|{tokens - 6})x\d")
    dtypes = [x.rsplit("x", 1)[1] for product in products for x in product if large.match(x)]
    assert len(dtypes) >= 10
    assert set(dtypes) == {"bf16"}


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (CONFIG, (33, 90, 160, 256), VideoLayout(33, 3600, 256, "last")),
        (REPLACE, (1, 2, 2, 1), VideoLayout(1, 1, 1, "last")),
        (
            dataclasses.replace(CONFIG, patch_size=3, patch_size_t=2),
            (4, 9, 6, 7),
            VideoLayout(2, 6, 7, "last"),
        ),
    ],
)
def test_layout_counts_tokens(config, size, expected):
    model = nnx.eval_shape(lambda: HunyuanVideoTransformer(config, rngs=nnx.Rngs(0)))
    assert model.layout(*size) == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 7, 8, 6), "height=7 must be a positive multiple of 2"),
        ((2, 8, 9, 6), "width=9 must be a positive multiple of 2"),
        ((0, 8, 8, 6), "num_frames=0"),
        ((2, 8, 8, 0), "text_tokens=0 must be at least 1"),
    ],
)
def test_layout_refuses_what_the_model_cannot_take(size, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.layout(*size)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {"hidden_states": jnp.zeros((2, 9, 2, 8, 8))}, "9 channels .* takes 4"),
        (
            CONCAT,
            {"hidden_states": jnp.zeros((2, 4, 2, 8, 8))},
            "4 channels .* takes 9.*_concat",
        ),
        (CONFIG, {"hidden_states": jnp.zeros((2, 4, 2, 8, 7))}, "width=7"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 6, 24))}, "24 features .* takes 16"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 0, 16))}, "text_tokens=0"),
        (CONFIG, {"timestep": jnp.zeros(3)}, r"timestep is \[3\] and must be \[2\]"),
        (CONFIG, {"timestep": jnp.zeros(())}, r"timestep is \[\] and"),
        (REPLACE, {"timestep": jnp.zeros((2, 2))}, r"timestep is \[2, 2\]"),
        (CONFIG, {"pooled_projections": jnp.zeros((2, 9))}, r"is \[2, 9\] and must be \[2, 8\]"),
        (CONFIG, {"pooled_projections": jnp.zeros(8)}, r"pooled_projections is \[8\]"),
        (CONFIG, {"guidance": None}, "needs guidance"),
        (CONFIG, {"guidance": jnp.zeros(())}, r"guidance is \[\] and must be \[2\]"),
        (CONCAT, {"guidance": jnp.zeros(2)}, "takes no guidance"),
        (CONFIG, {"text_length": jnp.zeros(3, int)}, r"text_length is \[3\] and must be \[2\]"),
        (CONFIG, {"text_length": jnp.zeros((2, 6), int)}, r"text_length is \[2, 6\]"),
    ],
)
def test_a_call_refuses_what_the_model_cannot_take(config, change, message):
    with pytest.raises(ValueError, match=message):
        make_model(config)(**{**model_inputs(config), **change})


@pytest.mark.parametrize("config", [HunyuanVideoConfig(), REPLACE, CONCAT])
def test_a_config_survives_the_way_to_json_and_back(config):
    text = json.dumps({**config.to_dict(), "_class_name": "HunyuanVideoTransformer3DModel"})
    assert HunyuanVideoConfig.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_cond": 2, "layers": 3}, r"unknown keys \['image_cond', 'layers'\]"),
        ({"num_single_layers": "40"}, "num_single_layers cannot be '40'"),
        ({"num_single_layers": 0}, "num_single_layers must be at least 1"),
        ({"guidance_embeds": 1}, "guidance_embeds cannot be 1"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not implemented"),
        ({"image_condition_type": "other"}, "image_condition_type='other' is not implemented"),
        ({"rope_axes_dim": [16, 56]}, r"rope_axes_dim cannot be \[16, 56\]"),
        ({"rope_axes_dim": [16, 56, 58]}, "sum to the attention_head_dim of 128"),
        ({"rope_axes_dim": [17, 55, 56]}, "must be even"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 .* must be positive"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HunyuanVideoConfig.from_dict(values)
