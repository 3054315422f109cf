"""The ports against the released code, on random weights: no bias, gain or table is trivial."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, jitted, ported, randomised, relative_error

from svg_jax.convert.tables import cogvideox, t5
from svg_jax.models import (
    CogVideoXConfig,
    CogVideoXTransformer,
    T5Config,
    T5Encoder,
    dense_attention,
)

COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 8,
}
ROTARY = {**COGVIDEOX, "use_rotary_positional_embeddings": True}
LEARNED = {**ROTARY, "in_channels": 8, "use_learned_positional_embeddings": True}
PATCH_T = {**ROTARY, "patch_size_t": 2, "patch_bias": False}
# Variant, and latent frames, height and width.
CASES = {
    "2b": (COGVIDEOX, (3, 8, 12)),
    "2b at another size": (COGVIDEOX, (5, 6, 10)),
    "5b": (ROTARY, (3, 8, 12)),
    "5b, wider": (ROTARY, (2, 6, 20)),
    "5b, higher": (ROTARY, (4, 14, 6)),
    "5b-I2V": (LEARNED, (3, 8, 12)),
    "5b-I2V, other frames": (LEARNED, (2, 8, 12)),
    "1.5-5b": (PATCH_T, (4, 6, 10)),
    "1.5-5b-I2V": ({**PATCH_T, "in_channels": 8, "ofs_embed_dim": 16}, (6, 2, 10)),
    "pixels": ({**ROTARY, "patch_size": 4, "temporal_compression_ratio": 1}, (4, 8, 12)),
}
T5 = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 3,
    "num_layers": 2,
    "vocab_size": 100,
    "feed_forward_proj": "gated-gelu",
}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def cogvideox_pair(variant, seed, dtype=torch.float32):
    reference = randomised(diffusers.CogVideoXTransformer3DModel(**variant), seed, dtype)
    config = CogVideoXConfig.from_dict(dict(reference.config))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: CogVideoXTransformer(
            config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)
        ),
        cogvideox.rules(config),
        reference,
    )
    return reference, model


def cogvideox_inputs(variant, size, seed):
    """Latents, text features and times; the batch has two unlike entries."""
    generator = np.random.default_rng(seed)
    frames, height, width = size
    latents = generator.standard_normal((2, frames, variant["in_channels"], height, width))
    text = generator.standard_normal((2, variant["max_text_seq_length"], variant["text_embed_dim"]))
    return latents.astype(np.float32), text.astype(np.float32), np.array([999, 421], np.int32)


def reference_velocity(reference, latents, text, times):
    """The diffusers model as its pipeline calls it."""
    dtype = reference.dtype
    rotary = None
    if reference.config.use_rotary_positional_embeddings:
        pipeline: Any = SimpleNamespace(transformer=reference, vae_scale_factor_spatial=8)
        frames, _, height, width = latents.shape[1:]
        rotary = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
        )
    ofs = torch.full((1,), 2.0, dtype=dtype) if reference.config.ofs_embed_dim else None
    with torch.no_grad():
        velocity = reference(
            torch.tensor(latents, dtype=dtype),
            torch.tensor(text, dtype=dtype),
            torch.tensor(times),
            ofs=ofs,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    return velocity.float().numpy()


def our_velocity(model, latents, text, times):
    ofs = jnp.full(len(latents), 2.0) if model.config.ofs_embed_dim else None
    inputs = (jnp.asarray(latents), jnp.asarray(text), jnp.asarray(times))
    velocity, _ = jitted(model, *inputs, ofs=ofs)
    assert velocity.dtype == model.dtype
    return np.asarray(velocity.astype(jnp.float32))


@pytest.mark.parametrize(("variant", "size"), CASES.values(), ids=CASES)
def test_cogvideox_equals_diffusers(variant, size):
    reference, model = cogvideox_pair(variant, seed=0)
    inputs = cogvideox_inputs(variant, size, seed=1)
    assert relative_error(our_velocity(model, *inputs), reference_velocity(reference, *inputs)) < (
        TOLERANCE
    )


def test_each_cogvideox_layer_alone_equals_diffusers():
    variant = {**ROTARY, "num_layers": 3}
    reference, model = cogvideox_pair(variant, seed=2)
    latents, text, times = cogvideox_inputs(variant, (3, 8, 12), seed=3)
    calls = []
    for block in reference.transformer_blocks:
        block.register_forward_hook(
            lambda module, args, kwargs, out: calls.append((kwargs, out)), with_kwargs=True
        )
    reference_velocity(reference, latents, text, times)

    layout = model.layout(3, 8, 12, text.shape[1])
    is_text = jnp.arange(layout.num_tokens) < layout.text_tokens
    rotation = model.rotation((3, 4, 6), layout.text_tokens)

    def attend(query, key, value):
        return dense_attention(query, key, value, layout=layout)

    graph, layers = nnx.split(model.blocks)
    assert len(calls) == 3
    for layer, (before, (video, text)) in enumerate(calls):
        block = nnx.merge(graph, jax.tree.map(lambda x, layer=layer: x[layer], layers))
        hidden = torch.cat([before["encoder_hidden_states"], before["hidden_states"]], dim=1)
        conditioning = torch.nn.functional.silu(before["temb"])
        ours, _ = jax.jit(partial(block, attend=attend))(
            jnp.asarray(hidden.numpy()),
            jnp.asarray(conditioning.numpy()),
            is_text,
            rotation,
        )
        assert relative_error(ours, torch.cat([text, video], dim=1).numpy()) < TOLERANCE


@pytest.mark.parametrize("case", ["2b", "5b", "1.5-5b-I2V"])
def test_cogvideox_in_bfloat16_is_as_near_to_float32_as_diffusers(case):
    variant, size = CASES[case]

    def make_inputs(seed):
        *arrays, times = cogvideox_inputs(variant, size, seed)
        return *(np.asarray(jnp.bfloat16(x), np.float32) for x in arrays), times

    ours, theirs = bfloat16_errors(
        lambda seed: cogvideox_pair(variant, seed, torch.bfloat16),
        make_inputs,
        reference_velocity,
        our_velocity,
    )
    assert ours < 1.1 * theirs


def t5_pair(seed, dtype=torch.float32, family="T5"):
    make_config = getattr(transformers, f"{family}Config")
    module = getattr(transformers, f"{family}EncoderModel")(make_config(**T5))
    reference = randomised(module, seed, dtype)
    config = T5Config.from_dict(json.loads(reference.config.to_json_string()))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: T5Encoder(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        t5.rules(config),
        reference,
    )
    return reference, model


def token_ids(seed, num_tokens=40):
    return np.random.default_rng(seed).integers(0, T5["vocab_size"], (2, num_tokens), np.int32)


def reference_features(reference, ids, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        out = reference(torch.tensor(ids), attention_mask=mask)
    return out.last_hidden_state.float().numpy()


def our_features(model, ids, mask=None):
    mask = None if mask is None else jnp.asarray(mask)
    features = jitted(model, jnp.asarray(ids), mask)
    assert features.dtype == model.dtype
    return np.asarray(features.astype(jnp.float32))


@pytest.mark.parametrize("family", ["T5", "UMT5"])
@pytest.mark.parametrize("num_tokens", [1, 7, 226])
def test_t5_equals_transformers(num_tokens, family):
    reference, model = t5_pair(seed=0, family=family)
    ids = token_ids(1, num_tokens)
    error = relative_error(our_features(model, ids), reference_features(reference, ids))
    print(f"{family}, {num_tokens} tokens: {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("family", ["T5", "UMT5"])
def test_t5_with_masked_padding_equals_transformers(family):
    reference, model = t5_pair(seed=0, family=family)
    ids = token_ids(1)
    mask = (np.arange(40) < np.array([[40], [11]])).astype(np.int32)
    features = our_features(model, ids, mask)
    error = relative_error(features, reference_features(reference, ids, mask))
    print(f"{family}: {error:.2e}")
    assert error < TOLERANCE
    assert relative_error(features, our_features(model, ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["T5", "UMT5"])
def test_t5_in_bfloat16_is_as_near_to_float32_as_transformers(family):
    ours, theirs = bfloat16_errors(
        lambda seed: t5_pair(seed, torch.bfloat16, family), lambda s: (token_ids(s),),
        reference_features, our_features,
    )  # fmt: skip
    print(f"{family}: ours {ours:.3e}, transformers {theirs:.3e}")
    assert ours < 1.1 * theirs
