"""Small transformers of every family with random weights, and inputs of theirs."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_configs import COGVIDEOX, HUNYUAN_VIDEO, WAN_T2V

from svg_jax.models import (
    CogVideoXConfig,
    CogVideoXTransformer,
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    WanConfig,
    WanTransformer,
    dense_attention,
)

Config = CogVideoXConfig | WanConfig | HunyuanVideoConfig
MODELS: dict[type, Any] = {
    CogVideoXConfig: CogVideoXTransformer,
    WanConfig: WanTransformer,
    HunyuanVideoConfig: HunyuanVideoTransformer,
}

PLAIN_COGVIDEOX = CogVideoXConfig.from_dict(COGVIDEOX | {"num_layers": 3})
LEARNED = dataclasses.replace(PLAIN_COGVIDEOX, use_learned_positional_embeddings=True)
PATCH_T = dataclasses.replace(PLAIN_COGVIDEOX, patch_size_t=2)
OFS = dataclasses.replace(PATCH_T, ofs_embed_dim=16)

PLAIN_WAN = WanConfig.from_dict(WAN_T2V | {"num_layers": 3, "rope_max_seq_len": 32})
IMAGE = dataclasses.replace(
    PLAIN_WAN, in_channels=9, image_dim=8, added_kv_proj_dim=32, pos_embed_seq_len=10
)

PLAIN_HUNYUAN_VIDEO = HunyuanVideoConfig.from_dict(
    HUNYUAN_VIDEO | {"num_single_layers": 3, "num_refiner_layers": 2}
)
REPLACE = dataclasses.replace(PLAIN_HUNYUAN_VIDEO, image_condition_type="token_replace")
CONCAT = dataclasses.replace(
    PLAIN_HUNYUAN_VIDEO, in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"
)


@partial(nnx.jit, static_argnames=("attend", "remat"))
def run(model, *, attend=dense_attention, remat=False, **inputs):
    """What a model predicts, and its layers' info."""
    return model(**inputs, attend=attend, remat=remat)


def shape_of(config: Config, **dtypes) -> Any:
    """A model of shapes alone."""
    return nnx.eval_shape(lambda: MODELS[type(config)](config, **dtypes, rngs=nnx.Rngs(0)))


@cache
def make_model(config: Config, **dtypes) -> Any:
    """A model with random parameters, its modulations and its last projection too."""
    rng = np.random.default_rng(0)
    model = shape_of(config, **dtypes)

    def random(path, leaf):
        gain = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(random, nnx.state(model)))
    return model


@cache
def model_inputs(config: Any) -> dict[str, Any]:
    """What a call needs: frames of 4x4 tokens, and some text, of a batch of two unlike entries."""
    keys = jax.random.split(jax.random.key(2), 3)
    normal = jax.random.normal
    if isinstance(config, CogVideoXConfig):
        frames = 8 if config.ofs_embed_dim else 3 if config == LEARNED else 2
        inputs = {
            "hidden_states": normal(keys[0], (2, frames, config.in_channels, 8, 8)),
            "encoder_hidden_states": normal(keys[1], (2, 8, config.text_embed_dim)),
            "timestep": jnp.array([999, 20]),
        }
        return inputs | ({"ofs": jnp.full(2, 2.0)} if config.ofs_embed_dim else {})
    inputs = {
        "hidden_states": normal(keys[0], (2, config.in_channels, 2, 8, 8)),
        "timestep": jnp.array([999.0, 20.0]),
    }
    if isinstance(config, WanConfig):
        inputs["encoder_hidden_states"] = normal(keys[1], (2, 6, config.text_dim))
        if config.image_dim is not None:
            inputs["encoder_hidden_states_image"] = normal(keys[2], (2, 10, config.image_dim))
        return inputs
    inputs["encoder_hidden_states"] = normal(keys[1], (2, 6, config.text_embed_dim))
    inputs["pooled_projections"] = normal(keys[2], (2, config.pooled_projection_dim))
    return inputs | ({"guidance": jnp.array([6016.0, 1000.0])} if config.guidance_embeds else {})


def stacks_of(config: Any) -> dict[str, int]:
    """The number of layers of each stack, by a word in its parameters' names."""
    if isinstance(config, HunyuanVideoConfig):
        return {
            "refiner": config.num_refiner_layers,
            "double_blocks": config.num_layers,
            "single_blocks": config.num_single_layers,
        }
    return {"blocks": config.num_layers}


def num_layers(config: Any) -> int:
    """The number of layers that call the attention over the video."""
    return config.num_layers + getattr(config, "num_single_layers", 0)
