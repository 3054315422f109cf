"""HunyuanVideo's transformer: variants, inputs and layers, for the tests of transformers."""

from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from tiny_configs import HUNYUAN_VIDEO
from transformer_family import Family, Inputs, as_array, layers_of, recorded_calls

from svg_jax.convert.tables import hunyuan_video
from svg_jax.models import HunyuanVideoConfig, HunyuanVideoTransformer, dense_attention
from svg_jax.models.patches import token_grid

T2V = {**HUNYUAN_VIDEO, "num_single_layers": 3, "num_refiner_layers": 2}
REPLACE = {**T2V, "image_condition_type": "token_replace"}
CONCAT = {
    **T2V,
    "in_channels": 9,
    "guidance_embeds": False,
    "image_condition_type": "latent_concat",
}
# Variant; latent frames, height and width; text tokens and how many of each entry's are real.
CASES = {
    "T2V": (T2V, (3, 6, 10), 7, (3, 7)),
    "T2V, no padding": (T2V, (3, 6, 10), 7, None),
    "T2V, one text token": (T2V, (1, 10, 2), 5, (1, 4)),
    "T2V, other sizes": (
        {
            **T2V,
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "rope_axes_dim": (2, 4, 6),
            "rope_theta": 100.0,
            "out_channels": 5,
            "num_refiner_layers": 1,
            "num_layers": 1,
            "mlp_ratio": 2.5,
        },
        (5, 2, 6),
        9,
        (9, 2),
    ),
    "T2V, other patch": ({**T2V, "patch_size": 3, "patch_size_t": 2}, (6, 9, 15), 7, (7, 5)),
    "I2V, token_replace": (REPLACE, (3, 6, 10), 7, (3, 7)),
    "I2V, token_replace, one frame": (REPLACE, (1, 6, 10), 7, None),
    "I2V, token_replace, no guidance": (
        {**REPLACE, "guidance_embeds": False, "patch_size_t": 2},
        (4, 6, 2),
        7,
        (6, 5),
    ),
    "I2V, latent_concat": (CONCAT, (3, 6, 10), 7, (4, 6)),
}

RELEASED_GUIDANCE = (6016.0, 1000.0)  # scales 6 and 1, times 1000 in bfloat16


def make_inputs(variant, size, text_tokens, text_length, seed, guidance=(1000.0, 300.0)) -> Inputs:
    """What both are called with, under diffusers' names."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    inputs: Inputs = {
        "hidden_states": normal(2, variant["in_channels"], *size),
        "encoder_hidden_states": normal(2, text_tokens, variant["text_embed_dim"]),
        "timestep": np.array([999.0, 421.0], np.float32),
        "pooled_projections": normal(2, variant["pooled_projection_dim"]),
    }
    if variant.get("guidance_embeds", True):
        inputs["guidance"] = np.array(guidance, np.float32)
    if text_length is not None:
        inputs["text_length"] = np.array(text_length, np.int32)
    return inputs


def reference_velocity(reference, inputs):
    """What diffusers' module predicts, which takes a mask of the text."""
    inputs = {name: torch.tensor(array) for name, array in inputs.items()}
    text_tokens = inputs["encoder_hidden_states"].shape[1]
    length = inputs.pop("text_length", torch.full((2,), text_tokens))
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        inputs[name] = inputs[name].to(reference.dtype)
    with torch.no_grad():
        velocity = reference(
            **inputs,
            encoder_attention_mask=torch.arange(text_tokens)[None] < length[:, None],
            return_dict=False,
        )[0]
    return velocity.float().numpy()


def layers(reference, model, sizes, inputs):
    """Each layer's video and real text, ours and diffusers', of both stacks.

    Rows of padding are nobody's: theirs are attention to the real tokens and ours are not.
    """
    size, text_tokens, text_length = sizes
    layout = model.layout(*size, text_tokens=text_tokens)
    grid = token_grid(*size, patch=model.config.patch_shape)
    rotation = model.rotation(grid, text_tokens)
    length = jnp.array(text_length)
    is_real = np.arange(layout.num_tokens) < layout.video_tokens + np.array(text_length)[:, None]

    def attend(query, key, value):
        return dense_attention(query, key, value, layout=layout, text_length=length)

    modules = [*reference.transformer_blocks, *reference.single_transformer_blocks]
    blocks = [*layers_of(model.double_blocks), *layers_of(model.single_blocks)]
    calls = recorded_calls(modules, lambda: reference_velocity(reference, inputs))
    for block, (given, _, expected) in zip(blocks, calls, strict=True):
        video, text, temb, _, _, replaced, _ = given
        embeddings = [temb] if replaced is None else [replaced, temb]
        conditioning = jax.nn.silu(jnp.stack([jnp.asarray(x.numpy()) for x in embeddings], axis=1))
        step = jax.jit(partial(block, layout=layout, attend=attend))
        ours, _ = step(as_array(video, text), conditioning, rotation)
        yield ours[is_real], as_array(*expected)[is_real]


FAMILY = Family(
    diffusers.HunyuanVideoTransformer3DModel,
    HunyuanVideoTransformer,
    HunyuanVideoConfig,
    hunyuan_video.rules,
    CASES,
    make_inputs,
    reference_velocity,
    layers,
)
