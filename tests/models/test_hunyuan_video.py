"""What the HunyuanVideo transformer promises beside its numbers: joints, gradients, refusals."""

import dataclasses
import json
import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.attention import StepState, attend_sparse
from svg_jax.config import SparsityConfig
from svg_jax.models import (
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    VideoLayout,
    dense_attention,
)

CONFIG = HunyuanVideoConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=3,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 6, 6),
)
REPLACE = dataclasses.replace(CONFIG, image_condition_type="token_replace")
CONCAT = dataclasses.replace(
    CONFIG, in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"
)
LAYERS = CONFIG.num_layers + CONFIG.num_single_layers
LENGTH = np.array([6, 4], np.int32)


run = nnx.jit(HunyuanVideoTransformer.__call__, static_argnames=("attend", "remat"))


@cache
def make_model(config=CONFIG, **dtypes):
    """A model with random parameters, its modulations and its last projection too."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: HunyuanVideoTransformer(config, **dtypes, rngs=nnx.Rngs(0)))

    def random(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(random, nnx.state(model)))
    return model


@cache
def model_inputs(config=CONFIG) -> dict[str, Any]:
    """What a call needs: two frames of 4x4 tokens, and six text tokens."""
    keys = jax.random.split(jax.random.key(2), 3)
    inputs = {
        "hidden_states": jax.random.normal(keys[0], (2, config.in_channels, 2, 8, 8)),
        "encoder_hidden_states": jax.random.normal(keys[1], (2, 6, config.text_embed_dim)),
        "timestep": jnp.array([999.0, 20.0]),
        "pooled_projections": jax.random.normal(keys[2], (2, config.pooled_projection_dim)),
    }
    if config.guidance_embeds:
        inputs["guidance"] = jnp.array([6016.0, 1000.0])
    return inputs


def test_an_untrained_model_predicts_zeros():
    model = nnx.jit(lambda: HunyuanVideoTransformer(REPLACE, rngs=nnx.Rngs(0)))()
    velocity, _ = run(model, **model_inputs(REPLACE))
    np.testing.assert_array_equal(velocity, 0)


def test_layers_of_both_stacks_are_counted_on_and_their_infos_are_one_stack():
    state = {"seed": jnp.arange(3), "nothing": None}

    def attend(query, key, value, *, layout, text_length, layer, step_state):
        assert query.shape == key.shape == value.shape == (2, 38, 2, 16)
        assert layout == VideoLayout(2, 16, 6, "last")
        norm = jnp.linalg.norm(value, axis=(1, 3))
        info = {"layer": layer, "seed": step_state["seed"], "length": text_length, "norm": norm}
        return value, info

    inputs = {**model_inputs(), "text_length": jnp.asarray(LENGTH)}
    _, info = run(make_model(), **inputs, attend=attend, step_state=state)
    np.testing.assert_array_equal(info["layer"], np.arange(LAYERS))
    np.testing.assert_array_equal(info["seed"], np.tile(np.arange(3), (LAYERS, 1)))
    np.testing.assert_array_equal(info["length"], np.tile(LENGTH, (LAYERS, 1)))
    assert info["norm"].shape == (LAYERS, 2, 2)
    assert len(np.unique(info["norm"])) == info["norm"].size


def test_sparse_attention_of_density_one_is_dense_and_of_less_is_not():
    graph, weights = nnx.split(make_model())
    inputs = {**model_inputs(), "text_length": jnp.asarray(LENGTH)}
    rows = np.arange(38) < 32 + LENGTH[:, None]

    def forward(attend, state):
        outs = []

        def recorded(query, key, value, *, layer, **context):
            out, info = attend(query, key, value, layer=layer, **context)
            return out, (info, out)

        @jax.jit  # nnx.jit would rebuild the state with leaves that are no arrays
        def forward(weights, inputs, state):
            return nnx.merge(graph, weights)(**inputs, attend=recorded, step_state=state)

        velocity, (info, outs) = forward(weights, inputs, state)
        return velocity, info, np.asarray(outs)[:, rows]  # of video and real text

    def sparse(density):
        config = SparsityConfig(density=density, sampled_rows=4, band_multiple=4)
        return forward(attend_sparse(config, LAYERS), StepState(jax.random.key(0)))

    dense, _, dense_outs = forward(dense_attention, None)
    velocity, info, outs = sparse(1.0)
    np.testing.assert_allclose(velocity, dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outs, dense_outs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(info.density, np.ones(LAYERS))
    velocity, info, _ = sparse(0.5)
    assert jnp.abs(velocity - dense).max() > 1e-3
    assert info.labels.shape == (LAYERS, 2, 2)
    assert (info.density < 1).all()


@pytest.mark.parametrize("config", [CONFIG, REPLACE, CONCAT])
def test_text_behind_its_length_does_not_reach_the_video(config):
    model, inputs = make_model(config), model_inputs(config)
    text, length = inputs["encoder_hidden_states"], jnp.asarray(LENGTH)
    garbage = {**inputs, "encoder_hidden_states": text.at[1, 4:].set(100.0)}
    expected, _ = run(model, **inputs, text_length=length)
    velocity, _ = run(model, **garbage, text_length=length)
    np.testing.assert_allclose(velocity, expected, atol=1e-6)
    shorter, _ = run(model, **{**inputs, "encoder_hidden_states": text[:, :4]})
    np.testing.assert_allclose(velocity[1], shorter[1], rtol=1e-4, atol=1e-5)
    assert jnp.abs(run(model, **garbage)[0] - expected).max() > 1e-3


def test_rows_of_padding_stay_finite_and_so_do_the_gradients_through_them():
    inputs = {**model_inputs(), "text_length": jnp.array([6, 1], jnp.int32)}
    graph, params = nnx.split(make_model(), nnx.Param)

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
    gradient, arguments = compile_gradient(REPLACE, remat=True)
    stacks = {
        "refiner": REPLACE.num_refiner_layers,
        "double_blocks": REPLACE.num_layers,
        "single_blocks": REPLACE.num_single_layers,
    }
    for path, leaf in jax.tree.leaves_with_path(gradient(*arguments)):
        name = jax.tree_util.keystr(path)
        in_stack = [layers for stack, layers in stacks.items() if stack in name]
        layers = in_stack[0] if in_stack and "blocks" in name else 1
        size_of_layer = jnp.abs(leaf.reshape(layers, -1)).max(axis=1)
        assert jnp.isfinite(size_of_layer).all(), path
        if "refiner" in name and "key" in name and "bias" in name:
            continue  # the softmax does not see a bias that all keys have
        assert (size_of_layer > 1e-9).all(), path


def test_recomputation_saves_memory_and_changes_nothing():
    kept, arguments = compile_gradient(REPLACE, remat=False)
    recomputed, _ = compile_gradient(REPLACE, remat=True)
    before, after = kept.memory_analysis(), recomputed.memory_analysis()
    assert before is not None
    assert after is not None
    assert after.temp_size_in_bytes < before.temp_size_in_bytes
    for ours, theirs in zip(
        jax.tree.leaves(recomputed(*arguments)), jax.tree.leaves(kept(*arguments)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_program_does_not_grow_with_depth():
    def lines(double, single, refiner):
        config = dataclasses.replace(
            CONFIG,
            num_layers=double,
            num_single_layers=single,
            num_refiner_layers=refiner,
        )
        graph, state = nnx.split(
            nnx.eval_shape(lambda: HunyuanVideoTransformer(config, rngs=nnx.Rngs(0)))
        )
        forward = jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs)[0])
        return forward.lower(state, model_inputs()).as_text().count("\n")

    # Stacks of one depth would share some of the program's functions.
    assert lines(3, 4, 5) == lines(20, 40, 6)


@pytest.mark.parametrize("residual_dtype", [None, jnp.float32])
def test_dtypes_of_products_residual_stream_and_parameters_are_separate(residual_dtype):
    model = make_model(
        REPLACE, dtype=jnp.bfloat16, param_dtype=jnp.float32, residual_dtype=residual_dtype
    )
    seen = []

    def attend(query, key, value, **context):
        seen.append((query.dtype, key.dtype, value.dtype))
        return dense_attention(query, key, value, layout=context["layout"])

    velocity, _ = run(model, **model_inputs(REPLACE), attend=attend)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 3}
    assert velocity.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    assert model.residual_dtype == (residual_dtype or jnp.bfloat16)


def test_a_float32_residual_stream_is_nearer_to_float32():
    config = dataclasses.replace(CONFIG, num_layers=6, num_single_layers=12)
    exact, _ = run(make_model(config), **model_inputs())

    def error(residual_dtype):
        model = make_model(config, dtype=jnp.bfloat16, residual_dtype=residual_dtype)
        velocity, _ = run(model, **model_inputs())
        return jnp.sqrt(jnp.mean((velocity.astype(jnp.float32) - exact) ** 2))

    assert error(jnp.float32) < error(jnp.bfloat16)


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
