"""What the Wan transformer promises beside its numbers: joints, gradients, refusals."""

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.attention import StepState, attend_sparse
from svg_jax.config import SparsityConfig
from svg_jax.models import VideoLayout, WanConfig, WanTransformer, dense_attention

CONFIG = WanConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=48,
    num_layers=3,
    rope_max_seq_len=32,
)
IMAGE = dataclasses.replace(
    CONFIG, in_channels=9, image_dim=8, added_kv_proj_dim=32, pos_embed_seq_len=10
)


run = nnx.jit(WanTransformer.__call__, static_argnames=("attend", "remat"))


@cache
def make_model(config=CONFIG, **dtypes):
    """A model with random parameters, its last projection too."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: WanTransformer(config, **dtypes, rngs=nnx.Rngs(0)))

    def random(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(random, nnx.state(model)))
    return model


@cache
def model_inputs(config=CONFIG) -> dict[str, Any]:
    """What a call needs: two frames of 4x4 tokens, six text tokens, two images of five."""
    keys = jax.random.split(jax.random.key(2), 3)
    inputs = {
        "hidden_states": jax.random.normal(keys[0], (2, config.in_channels, 2, 8, 8)),
        "encoder_hidden_states": jax.random.normal(keys[1], (2, 6, config.text_dim)),
        "timestep": jnp.array([999.0, 20.0]),
    }
    if config.image_dim is not None:
        image = jax.random.normal(keys[2], (2, 10, config.image_dim))
        inputs["encoder_hidden_states_image"] = image
    return inputs


def test_an_untrained_model_predicts_zeros():
    model = nnx.jit(lambda: WanTransformer(IMAGE, rngs=nnx.Rngs(0)))()
    velocity, _ = run(model, **model_inputs(IMAGE))
    np.testing.assert_array_equal(velocity, 0)


def test_every_layer_calls_the_attention_it_is_given_and_its_info_is_stacked():
    state = {"seed": jnp.arange(3), "nothing": None}

    def attend(query, key, value, *, layout, text_length, layer, step_state):
        assert query.shape == key.shape == value.shape == (2, 32, 2, 16)
        assert layout == VideoLayout(2, 16)
        assert text_length is None
        norm = jnp.linalg.norm(value, axis=(1, 3))
        return value, {"layer": layer, "seed": step_state["seed"], "norm": norm}

    _, info = run(make_model(), **model_inputs(), attend=attend, step_state=state)
    np.testing.assert_array_equal(info["layer"], [0, 1, 2])
    np.testing.assert_array_equal(info["seed"], np.tile(np.arange(3), (3, 1)))
    assert info["norm"].shape == (3, 2, 2)
    assert len(np.unique(info["norm"])) == info["norm"].size


def test_sparse_attention_of_density_one_is_dense_and_of_less_is_not():
    graph, weights = nnx.split(make_model())
    dense, _ = run(make_model(), **model_inputs())

    def sparse(density):
        config = SparsityConfig(density=density, sampled_rows=4, band_multiple=4)
        attend = attend_sparse(config, CONFIG.num_layers)

        @jax.jit  # nnx.jit would rebuild the state with leaves that are no arrays
        def forward(weights, inputs, state):
            return nnx.merge(graph, weights)(**inputs, attend=attend, step_state=state)

        return forward(weights, model_inputs(), StepState(jax.random.key(0)))

    velocity, info = sparse(1.0)
    np.testing.assert_allclose(velocity, dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(info.density, 1)
    velocity, info = sparse(0.3)
    assert jnp.abs(velocity - dense).max() > 1e-3
    assert info.labels.shape == (3, 2, 2)
    assert (info.density < 1).all()


def test_text_behind_its_length_does_not_reach_the_video():
    inputs = model_inputs(IMAGE)
    text = inputs["encoder_hidden_states"]
    garbage = {**inputs, "encoder_hidden_states": text.at[1, 4:].set(100.0)}
    length = jnp.array([6, 4], jnp.int32)
    expected, _ = run(make_model(IMAGE), **inputs, text_length=length)
    velocity, _ = run(make_model(IMAGE), **garbage, text_length=length)
    np.testing.assert_allclose(velocity, expected, atol=1e-6)
    shorter, _ = run(make_model(IMAGE), **{**inputs, "encoder_hidden_states": text[:, :4]})
    np.testing.assert_allclose(velocity[1], shorter[1], rtol=1e-4, atol=1e-5)
    assert jnp.abs(run(make_model(IMAGE), **garbage)[0] - expected).max() > 1e-3


def test_one_time_for_all_tokens_may_be_given_in_any_way():
    inputs = model_inputs()
    expected, _ = run(make_model(), **inputs)
    for times in (2, 32):
        timestep = jnp.tile(inputs["timestep"][:, None], (1, times))
        velocity, _ = run(make_model(), **{**inputs, "timestep": timestep})
        np.testing.assert_allclose(velocity, expected, rtol=1e-4, atol=1e-5)
    whole, _ = run(make_model(), **{**inputs, "timestep": jnp.array([999, 20])})
    np.testing.assert_array_equal(whole, expected)


@cache
def compile_gradient(config, remat):
    """The gradient of a loss by all parameters, compiled; and its arguments."""
    graph, params = nnx.split(make_model(config), nnx.Param)

    def loss(params, inputs):
        velocity, _ = nnx.merge(graph, params)(**inputs, remat=remat)
        return jnp.mean((velocity - 1) ** 2)

    arguments = (params, model_inputs(config))
    return jax.jit(jax.grad(loss)).lower(*arguments).compile(), arguments


def test_every_parameter_of_every_layer_learns():
    gradient, arguments = compile_gradient(IMAGE, remat=True)
    for path, leaf in jax.tree.leaves_with_path(gradient(*arguments)):
        layers = IMAGE.num_layers if "blocks" in jax.tree_util.keystr(path) else 1
        size_of_layer = jnp.abs(leaf.reshape(layers, -1)).max(axis=1)
        assert jnp.isfinite(size_of_layer).all(), path
        # The softmax does not see a bias that all keys have; the norm of the keys does.
        assert (size_of_layer > 1e-9).all(), path


def test_recomputation_saves_memory_and_changes_nothing():
    kept, arguments = compile_gradient(IMAGE, remat=False)
    recomputed, _ = compile_gradient(IMAGE, remat=True)
    before, after = kept.memory_analysis(), recomputed.memory_analysis()
    assert before is not None
    assert after is not None
    assert after.temp_size_in_bytes < before.temp_size_in_bytes
    for ours, theirs in zip(
        jax.tree.leaves(recomputed(*arguments)), jax.tree.leaves(kept(*arguments)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        graph, state = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))
        forward = jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs)[0])
        return forward.lower(state, model_inputs()).as_text().count("\n")

    assert lines(2) == lines(40)


@pytest.mark.parametrize("residual_dtype", [None, jnp.float32])
def test_dtypes_of_products_residual_stream_and_parameters_are_separate(residual_dtype):
    model = make_model(
        IMAGE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, residual_dtype=residual_dtype
    )
    seen = []

    def attend(query, key, value, **context):
        seen.append((query.dtype, key.dtype, value.dtype))
        return dense_attention(query, key, value, layout=context["layout"])

    velocity, _ = run(model, **model_inputs(IMAGE), attend=attend)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 3}
    assert velocity.dtype == jnp.bfloat16
    assert model.residual_dtype == (residual_dtype or jnp.bfloat16)


def test_a_float32_residual_stream_is_nearer_to_float32():
    config = dataclasses.replace(CONFIG, num_layers=12)
    exact, _ = run(make_model(config), **model_inputs())

    def error(residual_dtype):
        model = make_model(config, dtype=jnp.bfloat16, residual_dtype=residual_dtype)
        velocity, _ = run(model, **model_inputs())
        return jnp.sqrt(jnp.mean((velocity.astype(jnp.float32) - exact) ** 2))

    assert error(jnp.float32) < error(jnp.bfloat16)


def test_layout_counts_tokens_and_has_no_text():
    model = nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    assert model.layout(13, 8, 12, 512) == VideoLayout(13, 24)
    assert model.layout(1, 2, 2) == VideoLayout(1, 1)
    other = dataclasses.replace(CONFIG, patch_size=(2, 3, 1))
    assert other.layout(4, 9, 5) == VideoLayout(2, 15)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 7, 8), "height=7 must be a positive multiple of 2"),
        ((2, 8, 9), "width=9 must be a positive multiple of 2"),
        ((0, 8, 8), "num_frames=0"),
        ((33, 8, 8), "33x4x4 tokens .* exceed the 32"),
        ((2, 8, 66), "2x4x33 tokens .* exceed the 32"),
    ],
)
def test_layout_refuses_what_the_model_cannot_take(size, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.layout(*size)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {"hidden_states": jnp.zeros((2, 5, 2, 8, 8))}, "5 channels .* takes 4"),
        (CONFIG, {"hidden_states": jnp.zeros((2, 4, 2, 8, 7))}, "width=7"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 6, 24))}, "24 features .* takes 16"),
        (CONFIG, {"timestep": jnp.zeros(3)}, r"timestep is \[3\] and must be \[2\] or"),
        (CONFIG, {"timestep": jnp.zeros(())}, r"timestep is \[\] and"),
        (CONFIG, {"timestep": jnp.zeros((2, 16))}, r"\[2, 2\] or \[2, 32\]"),
        (CONFIG, {"timestep": jnp.zeros((1, 32))}, r"timestep is \[1, 32\]"),
        (CONFIG, {"text_length": jnp.zeros(3, int)}, r"text_length is \[3\] and must be \[2\]"),
        (CONFIG, {"encoder_hidden_states_image": jnp.zeros((2, 10, 8))}, "takes no encoder_hidden"),
        (IMAGE, {"encoder_hidden_states_image": None}, "needs encoder_hidden_states_image"),
        (IMAGE, {"encoder_hidden_states_image": jnp.zeros((2, 10, 9))}, "9 features .* takes 8"),
        (IMAGE, {"encoder_hidden_states_image": jnp.zeros((2, 5, 8))}, "5 tokens .* takes 10"),
    ],
)
def test_a_call_refuses_what_the_model_cannot_take(config, change, message):
    with pytest.raises(ValueError, match=message):
        make_model(config)(**{**model_inputs(config), **change})


def test_a_config_survives_the_way_to_json_and_back():
    text = json.dumps({**IMAGE.to_dict(), "_class_name": "WanTransformer3DModel"})
    assert WanConfig.from_dict(json.loads(text)) == IMAGE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_size": [-1, -1]}, r"unknown keys \['window_size'\]"),
        ({"patch_size": 2}, "patch_size cannot be 2"),
        ({"patch_size": [2, 2]}, r"patch_size cannot be \[2, 2\]"),
        ({"patch_size": [1, 2, 2.0]}, r"patch_size cannot be \[1, 2, 2.0\]"),
        ({"patch_size": [0, 2, 2]}, "patch_size must be at least 1"),
        ({"num_layers": "40"}, "num_layers cannot be '40'"),
        ({"out_channels": None}, "out_channels cannot be None"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False is not implemented"),
        ({"qk_norm": None}, "qk_norm=None is not implemented"),
        ({"attention_head_dim": 15}, "attention_head_dim must be even"),
        ({"freq_dim": 255}, "freq_dim must be even"),
        ({"image_dim": 1280}, "added_kv_proj_dim=None must be the width"),
        ({"added_kv_proj_dim": 5120}, "null where there is none"),
        ({"image_dim": 1280, "added_kv_proj_dim": 1280}, "of 5120"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len without image_dim"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.from_dict(values)
