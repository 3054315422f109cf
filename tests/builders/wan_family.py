"""Wan's transformer: variants, inputs and layers, for the tests of transformers."""

import math
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from tiny_configs import WAN_T2V
from transformer_family import Family, Inputs, layers_of, recorded_calls

from svg_jax.convert.tables import wan
from svg_jax.models import WanConfig, WanTransformer, dense_attention
from svg_jax.models.rope import video_rotation

T2V = {**WAN_T2V, "patch_size": (1, 2, 2), "rope_max_seq_len": 32}
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


def make_inputs(variant, size, times_by, seed) -> Inputs:
    """Latents, text, times, and images where the variant takes them."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    grid = [axis // patch for axis, patch in zip(size, variant["patch_size"], strict=True)]
    # diffusers takes the last 512 tokens of a context with images for text.
    text_tokens = 512 if "image_dim" in variant else 7
    inputs: Inputs = {
        "hidden_states": normal(2, variant["in_channels"], *size),
        "encoder_hidden_states": normal(2, text_tokens, variant["text_dim"]),
    }
    if "image_dim" in variant:
        inputs["encoder_hidden_states_image"] = normal(2, 10, variant["image_dim"])
    times = {
        "entry": np.array([999.0, 421.0]),
        "frame": generator.uniform(0, 1000, (2, grid[0])),
        "token": generator.uniform(0, 1000, (2, math.prod(grid))),
    }[times_by]
    return {**inputs, "timestep": times.astype(np.float32)}


def reference_velocity(reference, inputs):
    """What diffusers' module predicts, which takes a time a token or an entry."""
    latents, times = inputs["hidden_states"], inputs["timestep"]
    image = inputs.get("encoder_hidden_states_image")
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
            torch.tensor(inputs["encoder_hidden_states"], dtype=dtype),
            None if image is None else torch.tensor(image, dtype=dtype),
            return_dict=False,
        )[0]
    return velocity.float().numpy()


def layers(reference, model, sizes, inputs):
    """Each layer's video, ours and diffusers'."""
    size, _ = sizes
    layout = model.layout(*size)
    grid = (axis // patch for axis, patch in zip(size, model.config.patch_size, strict=True))
    rotation = video_rotation([np.arange(axis) for axis in grid], model.config.rotary_features)
    has_image = "encoder_hidden_states_image" in inputs

    def attend(query, key, value):
        return dense_attention(query, key, value, layout=layout)

    calls = recorded_calls(reference.blocks, lambda: reference_velocity(reference, inputs))
    for block, (given, _, expected) in zip(layers_of(model.blocks), calls, strict=True):
        hidden, context, conditioning = (jnp.asarray(x.numpy()) for x in given[:3])
        if conditioning.ndim == 3:
            conditioning = conditioning[:, None]
        hidden = hidden.reshape(*conditioning.shape[:2], -1, model.config.width)
        image, text = (context[:, :-512], context[:, -512:]) if has_image else (None, context)
        ours, _ = jax.jit(partial(block, attend=attend, text_length=None))(
            hidden, conditioning, text, image=image, rotation=rotation
        )
        yield ours.reshape(expected.shape), expected.numpy()


FAMILY = Family(
    diffusers.WanTransformer3DModel,
    WanTransformer,
    WanConfig,
    wan.rules,
    CASES,
    make_inputs,
    reference_velocity,
    layers,
    keep=tuple(diffusers.WanTransformer3DModel._keep_in_fp32_modules),
)
