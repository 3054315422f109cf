"""The LLaVA encoder against the released code on random weights, and what else it promises."""

import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as diffusers_i2v
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, ported, randomised, relative_error

from svg_jax.convert.tables import llava
from svg_jax.models import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaEncoder

TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "patch_size": 7,
    "image_size": 14,
}
IMAGE, PATCHES = 98, 4
CONFIG = LlavaConfig(LlamaConfig(**TEXT), CLIPVisionConfig(**VISION), image_token_index=IMAGE)

run = nnx.jit(LlavaEncoder.__call__, static_argnames="hidden_state")


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def pair(seed, dtype=torch.float32):
    rope = {"rope_theta": 500_000.0, "rope_type": "default"}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, rope_parameters=rope),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
    )
    reference = randomised(transformers.LlavaForConditionalGeneration(config), seed, dtype)
    config = LlavaConfig.from_dict(json.loads(reference.config.to_json_string()))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: LlavaEncoder(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        llava.rules(config),
        reference,
        unused=["lm_head.weight"],
    )
    return reference, model


def make_inputs(seed):
    """Ids, images and masks of two texts, the second shorter and its image elsewhere."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 90, (2, 15), np.int32)
    ids[0, 2 : 2 + PATCHES] = IMAGE
    ids[1, [4, 5, 6, 8]] = IMAGE
    mask = np.arange(15) < np.array([[15], [11]])
    pixels = generator.standard_normal((2, 3, 14, 14))
    pixels = np.asarray(jnp.bfloat16(pixels), np.float32)
    return ids, pixels, mask.astype(np.int32)


def reference_features(reference, ids, pixels, mask, hidden_state=-3, positions=None):
    with torch.no_grad():
        out = reference(
            torch.tensor(ids),
            torch.tensor(pixels, dtype=reference.dtype),
            torch.tensor(mask),
            position_ids=positions,
            output_hidden_states=True,
        )
    return out.hidden_states[hidden_state].float().numpy()


def our_features(model, ids, pixels, mask, hidden_state=-3):
    features = run(model, *map(jnp.asarray, (ids, pixels, mask)), hidden_state=hidden_state)
    assert features.dtype == model.dtype
    return np.asarray(features.astype(jnp.float32))


@pytest.mark.parametrize("hidden_state", [-3, 0, -1])
def test_it_equals_transformers(hidden_state):
    reference, model = pair(seed=0)
    inputs = make_inputs(1)
    theirs = reference_features(reference, *inputs, hidden_state)
    error = relative_error(our_features(model, *inputs, hidden_state), theirs)
    print(f"hidden state {hidden_state}: {error:.2e}")
    assert error < TOLERANCE


def test_it_equals_transformers_at_all_tokens_that_diffusers_does_not_pad():
    # The pipeline gives padding the position 1, which no text can see behind it.
    reference, model = pair(seed=0)
    _, pixels, _ = make_inputs(1)
    pad = 99
    ids = np.random.default_rng(3).integers(0, 90, (2, 12))
    ids[:, 2] = IMAGE
    ids[1, 8:] = pad
    expanded = diffusers_i2v._expand_input_ids_with_image_tokens(
        torch.tensor(ids), torch.tensor(ids != pad), 12, IMAGE, PATCHES, 2, 2 + PATCHES, pad
    )
    ids = expanded["input_ids"].numpy().astype(np.int32)
    mask = expanded["attention_mask"].numpy()
    assert (ids == IMAGE).sum() == 2 * PATCHES
    theirs = reference_features(reference, ids, pixels, mask, positions=expanded["position_ids"])
    ours = our_features(model, ids, pixels, mask)
    assert relative_error(ours[mask], theirs[mask]) < TOLERANCE


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers():
    ours, theirs = bfloat16_errors(
        lambda seed: pair(seed, torch.bfloat16), make_inputs, reference_features, our_features
    )
    print(f"ours {ours:.3e}, transformers {theirs:.3e}")
    assert ours < 1.1 * theirs


@cache
def make_encoder():
    return nnx.jit(lambda: LlavaEncoder(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("places", [PATCHES - 1, PATCHES + 1])
def test_a_text_without_a_place_for_every_patch_gives_no_plausible_features(places):
    ids, pixels, mask = make_inputs(0)
    ids[0, 2 : 2 + PATCHES + 1] = 7
    ids[0, 2 : 2 + places] = IMAGE
    features = our_features(make_encoder(), ids, pixels, mask)
    assert np.isnan(features[0, 2:]).all()
    assert np.isfinite(features[1]).all()


def test_what_it_cannot_take_is_refused():
    ids, pixels, _ = map(jnp.asarray, make_inputs(0))
    with pytest.raises(ValueError, match="1 images and 2 texts: each text must have one"):
        make_encoder()(ids, pixels[:1])
    with pytest.raises(ValueError, match="45 tokens exceed the 40"):
        make_encoder()(jnp.tile(ids, 3), pixels)
    with pytest.raises(ValueError, match=r"\[3, 14, 7\] and this image encoder takes"):
        make_encoder()(ids, pixels[..., :7])
    with pytest.raises(ValueError, match="hidden_state=5 must be from -5 to 4"):
        make_encoder()(ids, pixels, hidden_state=5)


def test_gradients_reach_every_parameter_that_the_features_depend_on():
    graph, params = nnx.split(make_encoder(), nnx.Param)
    inputs = [jnp.asarray(x) for x in make_inputs(0)]
    loss = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(*inputs)))))
    for path, leaf in jax.tree.leaves_with_path(loss(params)):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(leaf).all(), path
        if "output_norm" not in name and "['key']['bias']" not in name:
            assert jnp.abs(leaf).max() > 1e-7, path


def released():
    """The config.json of xtuner/llava-llama-3-8b-v1_1-transformers."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 128257,
        "model_type": "llava",
        "pad_token_id": 128258,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "float16",
            "vocab_size": 128320,
        },
        "torch_dtype": "float16",
        "transformers_version": "4.40.1",
        "vision_config": {
            "architectures": ["CLIPVisionModel"],
            "dropout": 0.0,
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "torch_dtype": "float32",
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def test_the_released_config_reads_with_what_it_leaves_out():
    config = LlavaConfig.from_dict(released())
    assert config.text_config == LlamaConfig(
        vocab_size=128320,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
    )
    assert config.vision_config.num_patches == 576
    assert config.vision_config.hidden_act == "quick_gelu"
    assert config.image_token_index == 128257
    assert LlavaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not implemented, only 'llava'"),
        ({"vision_feature_layer": -1}, "vision_feature_layer=-1 is not implemented, only -2"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer cannot be"),
        ({"vision_feature_select_strategy": "full"}, "strategy='full' is not implemented"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"text_config": None}, "text_config must be a config of its own, not None"),
        ({"text_config": {"model_type": "mistral"}}, "LlamaConfig: model_type='mistral'"),
        ({"vision_config": {"model_type": "siglip"}}, "CLIPVisionConfig: model_type='siglip'"),
        ({"image_token_index": 128320}, "image_token_index=128320 is beyond the vocab_size=128320"),
        ({"tokens": 3}, r"unknown keys \['tokens'\]"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_dict({**released(), **values})
