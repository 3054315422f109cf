"""CogVideoX's transformer: variants, inputs and layers, for the tests of transformers."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from tiny_configs import COGVIDEOX, COGVIDEOX_2B
from transformer_family import Family, Inputs, as_array, layers_of, recorded_calls

from svg_jax.convert.tables import cogvideox
from svg_jax.models import CogVideoXConfig, CogVideoXTransformer, dense_attention

V2B = COGVIDEOX_2B | {"sample_width": 12}
V5B = COGVIDEOX | {"sample_width": 12}
V5B_I2V = {**V5B, "in_channels": 8, "use_learned_positional_embeddings": True}
V15 = {**V5B, "patch_size_t": 2, "patch_bias": False}
# Variant, and latent frames, height and width.
CASES = {
    "2b": (V2B, (3, 8, 12)),
    "2b at another size": (V2B, (5, 6, 10)),
    "5b": (V5B, (3, 8, 12)),
    "5b, wider": (V5B, (2, 6, 20)),
    "5b, higher": (V5B, (4, 14, 6)),
    "5b-I2V": (V5B_I2V, (3, 8, 12)),
    "5b-I2V, other frames": (V5B_I2V, (2, 8, 12)),
    "1.5-5b": (V15, (4, 6, 10)),
    "1.5-5b-I2V": ({**V15, "in_channels": 8, "ofs_embed_dim": 16}, (6, 2, 10)),
    "pixels": ({**V5B, "patch_size": 4, "temporal_compression_ratio": 1}, (4, 8, 12)),
}


def make_inputs(variant, size, seed) -> Inputs:
    """Latents, text features, times, and the offset where there is one."""
    generator = np.random.default_rng(seed)
    frames, height, width = size
    latents = generator.standard_normal((2, frames, variant["in_channels"], height, width))
    text = generator.standard_normal((2, variant["max_text_seq_length"], variant["text_embed_dim"]))
    inputs: Inputs = {
        "hidden_states": latents.astype(np.float32),
        "encoder_hidden_states": text.astype(np.float32),
        "timestep": np.array([999, 421], np.int32),
    }
    if variant.get("ofs_embed_dim"):
        inputs["ofs"] = np.full(2, 2.0, np.float32)
    return inputs


def reference_velocity(reference, inputs):
    """The diffusers model as its pipeline calls it."""
    dtype = reference.dtype
    rotary = None
    if reference.config.use_rotary_positional_embeddings:
        pipeline: Any = SimpleNamespace(transformer=reference, vae_scale_factor_spatial=8)
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        rotary = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
        )
    with torch.no_grad():
        velocity = reference(
            torch.tensor(inputs["hidden_states"], dtype=dtype),
            torch.tensor(inputs["encoder_hidden_states"], dtype=dtype),
            torch.tensor(inputs["timestep"]),
            ofs=torch.full((1,), 2.0, dtype=dtype) if "ofs" in inputs else None,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    return velocity.float().numpy()


def layers(reference, model, sizes, inputs):
    """Each layer's text and video, ours and diffusers'."""
    (size,) = sizes
    layout = model.layout(*size, inputs["encoder_hidden_states"].shape[1])
    is_text = jnp.arange(layout.num_tokens) < layout.text_tokens
    frames, height, width = size
    rotation = model.rotation((frames, height // 2, width // 2), layout.text_tokens)

    def attend(query, key, value):
        return dense_attention(query, key, value, layout=layout)

    calls = recorded_calls(
        reference.transformer_blocks, lambda: reference_velocity(reference, inputs)
    )
    for block, (_, given, (video, text)) in zip(layers_of(model.blocks), calls, strict=True):
        hidden = as_array(given["encoder_hidden_states"], given["hidden_states"])
        conditioning = jnp.asarray(torch.nn.functional.silu(given["temb"]).numpy())
        ours, _ = jax.jit(partial(block, attend=attend))(hidden, conditioning, is_text, rotation)
        yield ours, as_array(text, video)


FAMILY = Family(
    diffusers.CogVideoXTransformer3DModel,
    CogVideoXTransformer,
    CogVideoXConfig,
    cogvideox.rules,
    CASES,
    make_inputs,
    reference_velocity,
    layers,
    seeds=4,
)
