"""The Wan transformer against the released code, in every variant, on random weights."""

import math
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, jitted, ported, randomised, relative_error

from svg_jax.convert import convert_state, restore_state
from svg_jax.convert.tables import wan
from svg_jax.models import WanConfig, WanTransformer, dense_attention
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
    variant, size, times_by = CASES[case]

    def rounded_inputs(seed):
        latents, text, times, image = make_inputs(variant, size, times_by, seed)
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
    restored = restore_state(convert_state(tensors, table), table)
    assert restored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert restored[name].tobytes() == tensor.tobytes(), name
        assert restored[name].shape == tensor.shape


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
