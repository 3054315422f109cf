"""What every family's transformer promises beside its numbers: joints, gradients, dtypes, depth."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_transformers import (
    CONCAT,
    IMAGE,
    LEARNED,
    MODELS,
    OFS,
    PLAIN_COGVIDEOX,
    PLAIN_HUNYUAN_VIDEO,
    PLAIN_WAN,
    REPLACE,
    make_model,
    model_inputs,
    num_layers,
    run,
    shape_of,
    stacks_of,
)

from svg_jax.attention import StepState, attend_sparse
from svg_jax.config import SparsityConfig
from svg_jax.models import VideoLayout, dense_attention


def name_of(value):
    return type(value).__name__ if dataclasses.is_dataclass(value) else None


@pytest.mark.parametrize("config", [PLAIN_COGVIDEOX, IMAGE, REPLACE], ids=name_of)
def test_an_untrained_model_predicts_zeros(config):
    model = nnx.jit(lambda: MODELS[type(config)](config, rngs=nnx.Rngs(0)))()
    velocity, _ = run(model, **model_inputs(config))
    np.testing.assert_array_equal(velocity, 0)


@pytest.mark.parametrize(
    ("config", "layout", "length"),
    [
        (PLAIN_COGVIDEOX, VideoLayout(2, 16, 8, "first"), [8, 5]),
        (PLAIN_WAN, VideoLayout(2, 16), None),
        (PLAIN_HUNYUAN_VIDEO, VideoLayout(2, 16, 6, "last"), [6, 4]),
    ],
    ids=name_of,
)
def test_every_layer_calls_the_attention_it_is_given_and_its_info_is_stacked(
    config, layout, length
):
    state = {"seed": jnp.arange(3), "nothing": None}
    expected, layers = layout, num_layers(config)
    given: dict[str, Any] = {} if length is None else {"text_length": jnp.array(length, jnp.int32)}

    def attend(query, key, value, *, layout, text_length, layer, step_state):
        assert query.shape == key.shape == value.shape == (2, layout.num_tokens, 2, 16)
        assert layout == expected
        assert (text_length is None) == (length is None)
        norm = jnp.linalg.norm(value, axis=(1, 3))
        info = {"layer": layer, "seed": step_state["seed"], "length": text_length, "norm": norm}
        return value, info

    inputs = model_inputs(config) | given
    _, info = run(make_model(config), **inputs, attend=attend, step_state=state)
    np.testing.assert_array_equal(info["layer"], np.arange(layers))
    np.testing.assert_array_equal(info["seed"], np.tile(np.arange(3), (layers, 1)))
    if length is not None:
        np.testing.assert_array_equal(info["length"], np.tile(length, (layers, 1)))
    assert info["norm"].shape == (layers, 2, 2)
    assert len(np.unique(info["norm"])) == info["norm"].size


@pytest.mark.parametrize(
    ("config", "length", "density"),
    [(PLAIN_WAN, None, 0.3), (PLAIN_HUNYUAN_VIDEO, np.array([6, 4], np.int32), 0.5)],
    ids=name_of,
)
def test_sparse_attention_of_density_one_is_dense_and_of_less_is_not(config, length, density):
    graph, weights = nnx.split(make_model(config))
    inputs = model_inputs(config)
    rows = np.full((2, 32), True)
    if length is not None:
        inputs = inputs | {"text_length": jnp.asarray(length)}
        rows = np.arange(38) < 32 + length[:, None]

    def forward(attend, state):
        def recorded(query, key, value, *, layer, **context):
            out, info = attend(query, key, value, layer=layer, **context)
            return out, (info, out)

        @jax.jit  # nnx.jit would rebuild the state with leaves that are no arrays
        def forward(weights, inputs, state):
            return nnx.merge(graph, weights)(**inputs, attend=recorded, step_state=state)

        velocity, (info, outs) = forward(weights, inputs, state)
        return velocity, info, np.asarray(outs)[:, rows]  # of video and real text

    def sparse(density):
        sparsity = SparsityConfig(density=density, sampled_rows=4, band_multiple=4)
        attend = attend_sparse(sparsity, num_layers(config))
        return forward(attend, StepState(jax.random.key(0)))

    dense, _, dense_outs = forward(dense_attention, None)
    velocity, info, outs = sparse(1.0)
    np.testing.assert_allclose(velocity, dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outs, dense_outs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(info.density, np.ones(num_layers(config)))
    velocity, info, _ = sparse(density)
    assert jnp.abs(velocity - dense).max() > 1e-3
    assert info.labels.shape == (num_layers(config), 2, 2)
    assert (info.density < 1).all()


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (PLAIN_COGVIDEOX, [8, 5]),
        (IMAGE, [6, 4]),
        (PLAIN_HUNYUAN_VIDEO, [6, 4]),
        (REPLACE, [6, 4]),
        (CONCAT, [6, 4]),
    ],
    ids=name_of,
)
def test_text_behind_its_length_does_not_reach_the_video(config, length):
    model, inputs = make_model(config), model_inputs(config)
    text, real = inputs["encoder_hidden_states"], length[1]
    length = jnp.array(length, jnp.int32)
    garbage = {**inputs, "encoder_hidden_states": text.at[1, real:].set(100.0)}
    expected, _ = run(model, **inputs, text_length=length)
    velocity, _ = run(model, **garbage, text_length=length)
    np.testing.assert_allclose(velocity, expected, atol=1e-6)
    shorter, _ = run(model, **{**inputs, "encoder_hidden_states": text[:, :real]})
    np.testing.assert_allclose(velocity[1], shorter[1], rtol=1e-4, atol=1e-5)
    assert jnp.abs(run(model, **garbage)[0] - expected).max() > 1e-3


@cache
def compile_gradient(config, remat):
    """The gradient of a loss by all parameters, compiled; and its arguments."""
    graph, params = nnx.split(make_model(config), nnx.Param)

    def loss(params, inputs):
        velocity, _ = nnx.merge(graph, params)(**inputs, remat=remat)
        return jnp.mean((velocity - 1) ** 2)

    arguments = (params, model_inputs(config))
    return jax.jit(jax.grad(loss)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize("config", [LEARNED, OFS, IMAGE, REPLACE], ids=name_of)
def test_every_parameter_of_every_layer_learns(config):
    gradient, arguments = compile_gradient(config, remat=True)
    for path, leaf in jax.tree.leaves_with_path(gradient(*arguments)):
        name = jax.tree_util.keystr(path)
        in_stack = [layers for stack, layers in stacks_of(config).items() if stack in name]
        layers = in_stack[0] if in_stack and "blocks" in name else 1
        size_of_layer = jnp.abs(leaf.reshape(layers, -1)).max(axis=1)
        assert jnp.isfinite(size_of_layer).all(), path
        if "refiner" in name and "key" in name and "bias" in name:
            continue  # the softmax does not see a bias that all keys have, and no norm is before it
        assert (size_of_layer > 1e-9).all(), path


@pytest.mark.parametrize(
    ("config", "share", "atol"),
    [(OFS, 0.5, 1e-7), (IMAGE, 1, 1e-7), (REPLACE, 1, 1e-6)],
    ids=name_of,
)
def test_recomputation_saves_memory_and_changes_nothing(config, share, atol):
    kept, arguments = compile_gradient(config, remat=False)
    recomputed, _ = compile_gradient(config, remat=True)
    before, after = kept.memory_analysis(), recomputed.memory_analysis()
    assert before is not None
    assert after is not None
    assert after.temp_size_in_bytes < before.temp_size_in_bytes * share
    for ours, theirs in zip(
        jax.tree.leaves(recomputed(*arguments)), jax.tree.leaves(kept(*arguments)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)


# Stacks of one depth would share some of the program's functions.
@pytest.mark.parametrize(
    ("config", "shallow", "deep"),
    [
        (PLAIN_COGVIDEOX, (2,), (40,)),
        (PLAIN_WAN, (2,), (40,)),
        (PLAIN_HUNYUAN_VIDEO, (3, 4, 5), (20, 40, 6)),
    ],
    ids=name_of,
)
def test_the_program_does_not_grow_with_depth(config, shallow, deep):
    def lines(depths):
        names = ("num_layers", "num_single_layers", "num_refiner_layers")
        depths = dict(zip(names, depths, strict=False))
        graph, state = nnx.split(shape_of(dataclasses.replace(config, **depths)))
        forward = jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs)[0])
        return forward.lower(state, model_inputs(config)).as_text().count("\n")

    assert lines(shallow) == lines(deep)


@pytest.mark.parametrize("residual_dtype", [None, jnp.float32])
@pytest.mark.parametrize(
    ("config", "param_dtype"),
    [(PLAIN_COGVIDEOX, jnp.float32), (IMAGE, jnp.bfloat16), (REPLACE, jnp.float32)],
    ids=name_of,
)
def test_dtypes_of_products_residual_stream_and_parameters_are_separate(
    config, param_dtype, residual_dtype
):
    dtypes: dict[str, Any] = {
        "dtype": jnp.bfloat16,
        "param_dtype": param_dtype,
        "residual_dtype": residual_dtype,
    }
    model = make_model(config, **dtypes)
    seen = []

    def attend(query, key, value, **context):
        seen.append((query.dtype, key.dtype, value.dtype))
        return dense_attention(query, key, value, layout=context["layout"])

    velocity, _ = run(model, **model_inputs(config), attend=attend)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 3}
    assert velocity.dtype == jnp.bfloat16
    stored = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    # Wan keeps some in float32 whatever the others are.
    assert stored - {jnp.dtype(jnp.float32)} == {jnp.dtype(param_dtype)} - {jnp.dtype(jnp.float32)}
    assert model.residual_dtype == (residual_dtype or jnp.bfloat16)


@pytest.mark.parametrize(
    ("config", "depths"),
    [
        (PLAIN_COGVIDEOX, {"num_layers": 12}),
        (PLAIN_WAN, {"num_layers": 12}),
        (PLAIN_HUNYUAN_VIDEO, {"num_layers": 6, "num_single_layers": 12}),
    ],
    ids=name_of,
)
def test_a_float32_residual_stream_is_nearer_to_float32(config, depths):
    config = dataclasses.replace(config, **depths)
    exact, _ = run(make_model(config), **model_inputs(config))

    def error(residual_dtype):
        model = make_model(config, dtype=jnp.bfloat16, residual_dtype=residual_dtype)
        velocity, _ = run(model, **model_inputs(config))
        return jnp.sqrt(jnp.mean((velocity.astype(jnp.float32) - exact) ** 2))

    assert error(jnp.float32) < error(jnp.bfloat16)
