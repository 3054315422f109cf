"""The Wan transformer: parity with diffusers in every variant, joints, refusals."""

import dataclasses
import json
import math
from functools import cache, partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, jitted, ported, randomised, relative_error

from svg_jax.attention import StepState, attend_sparse
from svg_jax.config import SparsityConfig
from svg_jax.convert import convert_state, restore_state, wan
from svg_jax.models import VideoLayout, WanConfig, WanTransformer, dense_attention
from svg_jax.models.rope import video_rotation

T2V = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
I2V = {**T2V, "in_channels": 9, "image_dim": 8, "added_kv_proj_dim": 32}
FLF2V = {**I2V, "pos_embed_seq_len": 10}
# Variant, latent frames, height and width, and the times: "entry", "frame" or "token" by which
# they are given.
CASES = {
    "T2V": (T2V, (3, 6, 10), "entry"),
    "T2V, other heads": (
        {**T2V, "num_attention_heads": 3, "attention_head_dim": 12, "out_channels": 5},
        (1, 10, 2),
        "entry",
    ),
    "T2V, other patch": ({**T2V, "patch_size": (2, 3, 1)}, (6, 9, 5), "entry"),
    "2.1 I2V": (I2V, (3, 6, 10), "entry"),
    "FLF2V": (FLF2V, (5, 2, 6), "entry"),
    "2.2 I2V": ({**T2V, "in_channels": 9}, (2, 6, 14), "entry"),
    "TI2V": (T2V, (3, 6, 10), "token"),
    "TI2V by frame": (T2V, (3, 6, 10), "frame"),
}
CONFIG = WanConfig.from_dict({**T2V, "num_layers": 3})
IMAGE = WanConfig.from_dict({**FLF2V, "num_layers": 3})


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def pair(variant, seed, dtype=torch.float32):
    module = diffusers.WanTransformer3DModel(**variant)
    reference = randomised(module, seed, dtype, module._keep_in_fp32_modules)
    config = WanConfig.from_dict(dict(reference.config))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: WanTransformer(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        wan.rules(config),
        config.num_layers,
        reference,
    )
    return reference, model


def make_inputs(variant, size, times_by, seed):
    """Latents, text, times and images (or None); the batch has two unlike entries."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    grid = [axis // patch for axis, patch in zip(size, variant["patch_size"], strict=True)]
    latents = normal(2, variant["in_channels"], *size)
    # diffusers takes the last 512 tokens of a context with images for text.
    text = normal(2, 512 if "image_dim" in variant else 7, variant["text_dim"])
    image = normal(2, 10, variant["image_dim"]) if "image_dim" in variant else None
    times = {
        "entry": np.array([999.0, 421.0]),
        "frame": generator.uniform(0, 1000, (2, grid[0])),
        "token": generator.uniform(0, 1000, (2, math.prod(grid))),
    }[times_by]
    return latents, text, times.astype(np.float32), image


def reference_velocity(reference, latents, text, times, image):
    dtype = reference.dtype
    tokens = math.prod(latents.shape[2:]) // math.prod(reference.config.patch_size)
    if times.ndim == 2:
        times = np.repeat(times, tokens // times.shape[1], axis=1)
    if image is not None and reference.config.pos_embed_seq_len:
        image = image.reshape(4, 5, -1)  # each image an entry of its own
    with torch.no_grad():
        velocity = reference(
            torch.tensor(latents, dtype=dtype),
            torch.tensor(times),
            torch.tensor(text, dtype=dtype),
            None if image is None else torch.tensor(image, dtype=dtype),
            return_dict=False,
        )[0]
    return velocity.float().numpy()


def our_velocity(model, latents, text, times, image):
    inputs = map(jnp.asarray, (latents, text, times))
    image = None if image is None else jnp.asarray(image)
    velocity, _ = jitted(model, *inputs, encoder_hidden_states_image=image)
    assert velocity.dtype == model.dtype
    return np.asarray(velocity.astype(jnp.float32))


@pytest.mark.parametrize("case", CASES)
def test_it_equals_diffusers(case):
    variant, *sizes = CASES[case]
    reference, model = pair(variant, seed=0)
    inputs = make_inputs(variant, *sizes, seed=1)
    theirs = reference_velocity(reference, *inputs)
    error = relative_error(our_velocity(model, *inputs), theirs)
    print(f"{case}: {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("case", ["T2V", "2.1 I2V", "TI2V"])
def test_each_layer_alone_equals_diffusers(case):
    variant, size, times_by = CASES[case]
    reference, model = pair({**variant, "num_layers": 3}, seed=2)
    inputs = make_inputs(variant, size, times_by, seed=3)
    calls = []
    for block in reference.blocks:
        block.register_forward_hook(lambda module, args, out: calls.append((args, out)))
    reference_velocity(reference, *inputs)

    layout = model.layout(*size)
    positions = [np.arange(axis) for axis in (3, 3, 5)]
    rotation = video_rotation(positions, model.config.rotary_features)

    def attend(query, key, value):
        return dense_attention(query, key, value, layout=layout)

    graph, layers = nnx.split(model.blocks)
    assert len(calls) == 3
    for layer, ((hidden, context, conditioning, _), expected) in enumerate(calls):
        hidden, context, conditioning = (
            jnp.asarray(x.numpy()) for x in (hidden, context, conditioning)
        )
        if conditioning.ndim == 3:
            conditioning = conditioning[:, None]
        hidden = hidden.reshape(*conditioning.shape[:2], -1, model.config.width)
        image, text = (context[:, :-512], context[:, -512:]) if inputs[3] is not None else (
            None, context,
        )  # fmt: skip
        block = nnx.merge(graph, jax.tree.map(lambda x, layer=layer: x[layer], layers))
        ours, _ = jax.jit(partial(block, attend=attend, text_length=None))(
            hidden, conditioning, text, image=image, rotation=rotation
        )
        error = relative_error(ours.reshape(expected.shape), expected.numpy())
        print(f"{case}, layer {layer}: {error:.2e}")
        assert error < TOLERANCE


@pytest.mark.parametrize("case", ["T2V", "FLF2V", "TI2V"])
def test_in_bfloat16_it_is_as_near_to_float32_as_diffusers(case):
    variant, *sizes = CASES[case]

    def rounded_inputs(seed):
        latents, text, times, image = make_inputs(variant, *sizes, seed)
        image = None if image is None else np.asarray(jnp.bfloat16(image), np.float32)
        return *(np.asarray(jnp.bfloat16(x), np.float32) for x in (latents, text)), times, image

    ours, theirs = bfloat16_errors(
        lambda seed: pair(variant, seed, torch.bfloat16),
        rounded_inputs,
        reference_velocity,
        our_velocity,
        seeds=8,
    )
    print(f"{case}: ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("variant", [T2V, FLF2V], ids=["T2V", "FLF2V"])
def test_the_way_back_gives_every_tensor_bit_for_bit(variant):
    reference = randomised(diffusers.WanTransformer3DModel(**variant), seed=4)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    config = WanConfig.from_dict(dict(reference.config))
    table = wan.rules(config)
    restored = restore_state(convert_state(tensors, table, 2), table, 2)
    assert restored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert restored[name].tobytes() == tensor.tobytes(), name
        assert restored[name].shape == tensor.shape


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
def model_inputs(config=CONFIG):
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
    assert relative_error(velocity, dense) < TOLERANCE
    np.testing.assert_array_equal(info.density, 1)
    velocity, info = sparse(0.3)
    assert relative_error(velocity, dense) > 100 * TOLERANCE
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
        assert relative_error(velocity, expected) < TOLERANCE
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


def test_the_parameters_that_the_released_model_keeps_in_float32_stay_in_it():
    module = diffusers.WanTransformer3DModel(**FLF2V)
    kept = set(module._keep_in_fp32_modules)
    table = wan.rules(WanConfig.from_dict(FLF2V))
    expected = {rule.target for rule in table if kept & set(rule.source.split("."))}
    model = nnx.eval_shape(
        lambda: WanTransformer(
            WanConfig.from_dict(FLF2V), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    flat, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    found = {".".join(key.key for key in path) for path, leaf in flat if leaf.dtype == jnp.float32}
    assert found == expected


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
