"""What the CogVideoX transformer promises beside its numbers: joints, gradients, refusals."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.models import CogVideoXConfig, CogVideoXTransformer, VideoLayout, dense_attention

CONFIG = CogVideoXConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=16,
    num_layers=3,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=8,
    use_rotary_positional_embeddings=True,
)
LEARNED = dataclasses.replace(CONFIG, use_learned_positional_embeddings=True)
PATCH_T = dataclasses.replace(CONFIG, patch_size_t=2)
OFS = dataclasses.replace(PATCH_T, ofs_embed_dim=16)


run = nnx.jit(CogVideoXTransformer.__call__, static_argnames=("attend", "remat"))


@cache
def make_model(config=CONFIG, **dtypes):
    """A model with random parameters, its modulations and its last projection too."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: CogVideoXTransformer(config, **dtypes, rngs=nnx.Rngs(0)))

    def random(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(random, nnx.state(model)))
    return model


@cache
def make_inputs(config=CONFIG, frames=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(2))
    latents = jax.random.normal(keys[0], (2, frames, config.in_channels, 8, 8), dtype)
    text = jax.random.normal(keys[1], (2, 8, config.text_embed_dim), dtype)
    return latents, text, jnp.array([999, 20])


def test_an_untrained_model_predicts_zeros():
    model = nnx.jit(lambda: CogVideoXTransformer(CONFIG, rngs=nnx.Rngs(0)))()
    velocity, _ = run(model, *make_inputs())
    np.testing.assert_array_equal(velocity, 0)


def test_every_layer_calls_the_attention_it_is_given_and_its_info_is_stacked():
    state = {"seed": jnp.arange(3), "nothing": None}
    length = jnp.array([8, 5], jnp.int32)

    def attend(query, key, value, *, layout, text_length, layer, step_state):
        assert query.shape == key.shape == value.shape == (2, layout.num_tokens, 2, 16)
        assert layout == VideoLayout(2, 16, text_tokens=8, text_position="first")
        info = {
            "layer": layer,
            "seed": step_state["seed"],
            "length": text_length,
            "norm": jnp.linalg.norm(value, axis=(1, 3)),
        }
        return value, info

    model = make_model()
    _, info = run(model, *make_inputs(), attend=attend, step_state=state, text_length=length)
    np.testing.assert_array_equal(info["layer"], [0, 1, 2])
    np.testing.assert_array_equal(info["seed"], np.tile(np.arange(3), (3, 1)))
    np.testing.assert_array_equal(info["length"], np.tile(length, (3, 1)))
    assert info["norm"].shape == (3, 2, 2)
    assert len(np.unique(info["norm"])) == info["norm"].size


def test_padded_text_does_not_reach_the_video():
    model = make_model()
    latents, text, times = make_inputs()
    garbage = text.at[1, 5:].set(100.0)
    padded = partial(run, model, text_length=jnp.array([8, 5], jnp.int32))
    expected, _ = padded(latents, text, times)
    np.testing.assert_allclose(padded(latents, garbage, times)[0], expected, atol=1e-6)
    assert jnp.abs(run(model, latents, garbage, times)[0] - expected).max() > 1e-3


@cache
def compile_gradient(config, frames, remat):
    """The gradient of a loss by all parameters, compiled; and its arguments."""
    ofs = jnp.full(2, 2.0) if config.ofs_embed_dim else None
    graph, params = nnx.split(make_model(config), nnx.Param)

    def loss(params, *inputs):
        velocity, _ = nnx.merge(graph, params)(*inputs, ofs=ofs, remat=remat)
        return jnp.mean((velocity - inputs[0]) ** 2)

    arguments = (params, *make_inputs(config, frames))
    return jax.jit(jax.grad(loss)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize(("config", "frames"), [(LEARNED, 3), (OFS, 8)])
def test_every_parameter_of_every_layer_learns(config, frames):
    gradient, arguments = compile_gradient(config, frames, remat=True)
    for path, leaf in jax.tree.leaves_with_path(gradient(*arguments)):
        layers = config.num_layers if "blocks" in jax.tree_util.keystr(path) else 1
        size_of_layer = jnp.abs(leaf.reshape(layers, -1)).max(axis=1)
        assert jnp.isfinite(size_of_layer).all(), path
        assert (size_of_layer > 1e-9).all(), path


def test_recomputation_saves_memory_and_changes_nothing():
    kept, arguments = compile_gradient(OFS, 8, remat=False)
    recomputed, _ = compile_gradient(OFS, 8, remat=True)
    before, after = kept.memory_analysis(), recomputed.memory_analysis()
    assert before is not None
    assert after is not None
    assert after.temp_size_in_bytes < before.temp_size_in_bytes / 2
    for ours, theirs in zip(
        jax.tree.leaves(recomputed(*arguments)), jax.tree.leaves(kept(*arguments)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        graph, state = nnx.split(
            nnx.eval_shape(lambda: CogVideoXTransformer(config, rngs=nnx.Rngs(0)))
        )
        forward = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs)[0])
        return forward.lower(state, *make_inputs()).as_text().count("\n")

    assert lines(2) == lines(40)


@pytest.mark.parametrize("residual_dtype", [None, jnp.float32])
def test_dtypes_of_products_residual_stream_and_parameters_are_separate(residual_dtype):
    model = make_model(dtype=jnp.bfloat16, param_dtype=jnp.float32, residual_dtype=residual_dtype)
    seen = []

    def attend(query, key, value, **context):
        seen.append((query.dtype, key.dtype, value.dtype))
        return dense_attention(query, key, value, layout=context["layout"])

    velocity, _ = run(model, *make_inputs(), attend=attend)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 3}
    assert velocity.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    assert model.residual_dtype == (residual_dtype or jnp.bfloat16)


def test_a_float32_residual_stream_is_nearer_to_float32():
    config = dataclasses.replace(CONFIG, num_layers=12)
    exact, _ = run(make_model(config), *make_inputs())

    def error(residual_dtype):
        model = make_model(config, dtype=jnp.bfloat16, residual_dtype=residual_dtype)
        velocity, _ = run(model, *make_inputs())
        return jnp.sqrt(jnp.mean((velocity.astype(jnp.float32) - exact) ** 2))

    assert error(jnp.float32) < error(jnp.bfloat16)


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (CONFIG, (13, 8, 12, 8), VideoLayout(13, 24, 8, "first")),
        (CONFIG, (1, 2, 2, 1), VideoLayout(1, 1, 1, "first")),
        (LEARNED, (5, 8, 8, 8), VideoLayout(5, 16, 8, "first")),
        (PATCH_T, (22, 6, 8, 8), VideoLayout(11, 12, 8, "first")),
    ],
)
def test_layout_counts_tokens(config, size, expected):
    model = nnx.eval_shape(lambda: CogVideoXTransformer(config, rngs=nnx.Rngs(0)))
    assert model.layout(*size) == expected


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (CONFIG, (2, 7, 8, 8), "height=7 must be a positive multiple of 2"),
        (CONFIG, (2, 8, 9, 8), "width=9 must be a positive multiple of 2"),
        (CONFIG, (0, 8, 8, 8), "num_frames=0"),
        (PATCH_T, (3, 8, 8, 8), "num_frames=3 must be a positive multiple of 2"),
        (PATCH_T, (2, 10, 8, 8), "10x8 .* exceed .* 8x8"),
        (LEARNED, (3, 8, 6, 8), "8x8 .* alone, not 8x6"),
        (LEARNED, (3, 8, 8, 7), "8 text tokens, not 7"),
        (CONFIG, (2, 8, 8, 9), "text_tokens=9 must lie between 1 and max_text_seq_length=8"),
        (CONFIG, (2, 8, 8, 0), "text_tokens=0"),
    ],
)
def test_layout_refuses_what_the_model_cannot_take(config, size, message):
    with pytest.raises(ValueError, match=message):
        config.layout(*size)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {"hidden_states": jnp.zeros((2, 2, 5, 8, 8))}, "5 channels .* takes 4"),
        (CONFIG, {"hidden_states": jnp.zeros((2, 2, 4, 8, 7))}, "width=7"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 8, 24))}, "24 features .* takes 16"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 9, 16))}, "text_tokens=9"),
        (CONFIG, {"ofs": jnp.full(2, 2.0)}, "takes no ofs"),
        (OFS, {}, "needs ofs"),
    ],
)
def test_a_call_refuses_what_the_model_cannot_take(config, change, message):
    model = make_model(config)
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    with pytest.raises(ValueError, match=message):
        model(**{**dict(zip(names, make_inputs(config), strict=True)), **change})


def test_a_config_survives_the_way_to_json_and_back():
    values = {**OFS.to_dict(), "_class_name": "CogVideoXTransformer3DModel"}
    assert CogVideoXConfig.from_dict(values) == OFS
    whole = CogVideoXConfig.from_dict({**values, "spatial_interpolation_scale": 2})
    assert type(whole.spatial_interpolation_scale) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_head": 2, "layers": 3}, r"unknown keys \['layers', 'num_head'\]"),
        ({"num_layers": "30"}, "num_layers cannot be '30'"),
        ({"num_layers": True}, "num_layers cannot be True"),
        ({"num_layers": None}, "num_layers cannot be None"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"patch_size_t": 0}, "patch_size_t must be at least 1"),
        ({"activation_fn": "gelu"}, "activation_fn='gelu' is not implemented"),
        ({"timestep_activation_fn": "gelu"}, "timestep_activation_fn"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"freq_shift": 1}, "freq_shift"),
        ({"norm_elementwise_affine": False}, "norm_elementwise_affine"),
        ({"attention_bias": False}, "attention_bias"),
        ({"patch_bias": False}, "patch_bias"),
        ({"patch_size_t": 2}, "patch_size_t goes with rotary"),
        ({"use_learned_positional_embeddings": True}, "without rotary"),
        ({"use_rotary_positional_embeddings": True, "attention_head_dim": 24}, "16 divides"),
        ({"attention_head_dim": 4}, "16 divides"),
        ({"ofs_embed_dim": 256}, "ofs_embed_dim=256 must be time_embed_dim=512"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXConfig.from_dict(values)
