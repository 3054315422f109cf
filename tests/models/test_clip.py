"""CLIP's towers against the released code on random weights, and what else they promise."""

import dataclasses
import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, ported, randomised, relative_error

from svg_jax.convert import convert_state, restore_state
from svg_jax.convert.tables import clip
from svg_jax.models import CLIPTextConfig, CLIPTextEncoder, CLIPVisionConfig, CLIPVisionEncoder

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-4,
}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 2}
VISION = {**SIZES, "patch_size": 14, "image_size": 42, "hidden_act": "gelu"}
TEXTS = {
    "released": TEXT,
    "gelu and another end": {**TEXT, "hidden_act": "gelu", "eos_token_id": 5},
}
VISIONS = {
    "ViT-H": VISION,
    "ViT-L": {**VISION, "hidden_act": "quick_gelu", "num_channels": 2, "patch_size": 6},
}

run_text = nnx.jit(CLIPTextEncoder.__call__)
run_vision = nnx.jit(CLIPVisionEncoder.__call__, static_argnames="hidden_state")


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def pair(make, read_config, rules, reference, seed, dtype):
    reference = randomised(reference, seed, dtype)
    config = read_config(json.loads(reference.config.to_json_string()))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: make(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        rules(config),
        reference,
    )
    return reference, model


def text_pair(variant, seed, dtype=torch.float32):
    reference = transformers.CLIPTextModel(transformers.CLIPTextConfig(**variant))
    return pair(
        CLIPTextEncoder, CLIPTextConfig.from_dict, clip.text_rules, reference, seed, dtype
    )  # fmt: skip


def vision_pair(variant, seed, dtype=torch.float32):
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**variant))
    return pair(
        CLIPVisionEncoder, CLIPVisionConfig.from_dict, clip.vision_rules, reference, seed, dtype
    )  # fmt: skip


def token_ids(variant, seed, num_tokens=13):
    """Texts of two lengths, each with its end, and padded with ends as CLIP's tokenizer does."""
    ids = np.random.default_rng(seed).integers(10, 90, (2, num_tokens), np.int32)
    end = 99 if variant["eos_token_id"] == 2 else variant["eos_token_id"]
    is_text = np.arange(num_tokens) < np.array([[num_tokens - 1], [num_tokens // 2]])
    return np.where(is_text, ids, end).astype(np.int32)


def images(variant, seed):
    shape = (2, variant.get("num_channels", 3), variant["image_size"], variant["image_size"])
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference_text(reference, ids):
    with torch.no_grad():
        out = reference(torch.tensor(ids))
    return out.last_hidden_state.float().numpy(), out.pooler_output.float().numpy()


def our_text(model, ids):
    out = run_text(model, jnp.asarray(ids))
    assert {x.dtype for x in out} == {jnp.dtype(model.dtype)}
    return [np.asarray(x.astype(jnp.float32)) for x in out]


def reference_image(reference, pixels, hidden_state=-2):
    with torch.no_grad():
        out = reference(torch.tensor(pixels, dtype=reference.dtype), output_hidden_states=True)
    return out.hidden_states[hidden_state].float().numpy()


def our_image(model, pixels, hidden_state=-2):
    features = run_vision(model, jnp.asarray(pixels), hidden_state=hidden_state)
    assert features.dtype == model.dtype
    return np.asarray(features.astype(jnp.float32))


@pytest.mark.parametrize("num_tokens", [13, 16, 2])
@pytest.mark.parametrize("case", TEXTS)
def test_the_text_tower_equals_transformers(case, num_tokens):
    reference, model = text_pair(TEXTS[case], seed=0)
    ids = token_ids(TEXTS[case], 1, num_tokens)
    for ours, theirs in zip(our_text(model, ids), reference_text(reference, ids), strict=True):
        assert ours.shape == theirs.shape
        error = relative_error(ours, theirs)
        print(f"{case}, {num_tokens} tokens: {error:.2e}")
        assert error < TOLERANCE


@pytest.mark.parametrize("case", VISIONS)
def test_the_vision_tower_equals_transformers_at_every_layer(case):
    reference, model = vision_pair(VISIONS[case], seed=0)
    pixels = images(VISIONS[case], 1)
    for hidden_state in (-2, 0, 1, -1):
        ours = our_image(model, pixels, hidden_state)
        error = relative_error(ours, reference_image(reference, pixels, hidden_state))
        print(f"{case}, hidden state {hidden_state}: {error:.2e}")
        assert error < TOLERANCE
    with torch.no_grad():
        pooled = reference(torch.tensor(pixels)).pooler_output.numpy()
    assert relative_error(model.pool(jnp.asarray(ours)), pooled) < TOLERANCE


def test_the_towers_in_bfloat16_are_as_near_to_float32_as_transformers():
    for make_pair, make_inputs, run_reference, run_ours in (
        (
            partial(text_pair, TEXT),
            partial(token_ids, TEXT),
            lambda *args: reference_text(*args)[0],
            lambda *args: our_text(*args)[0],
        ),
        (
            partial(vision_pair, VISION),
            lambda seed: np.asarray(jnp.bfloat16(images(VISION, seed)), np.float32),
            reference_image,
            our_image,
        ),
    ):
        ours, theirs = bfloat16_errors(
            partial(make_pair, dtype=torch.bfloat16),
            lambda seed, make_inputs=make_inputs: (make_inputs(seed),),
            run_reference,
            run_ours,
        )
        print(f"ours {ours:.3e}, transformers {theirs:.3e}")
        assert ours < 1.1 * theirs


@pytest.mark.parametrize("variant", [TEXT, VISION], ids=["text", "vision"])
def test_tensors_under_the_released_prefix_are_the_same_and_come_back_bit_by_bit(variant):
    is_text = variant is TEXT
    reference, model = (text_pair if is_text else vision_pair)(variant, seed=2)
    rules = (clip.text_rules if is_text else clip.vision_rules)(model.config)
    prefix = "text_model." if is_text else "vision_model."
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    released = {prefix + name: tensor for name, tensor in tensors.items()}
    tree = convert_state(released, rules)
    jax.tree.map(np.testing.assert_array_equal, tree, convert_state(tensors, rules))
    restored = restore_state(tree, rules)
    assert restored.keys() == released.keys()
    for name, tensor in released.items():
        assert restored[name].tobytes() == tensor.tobytes()


@cache
def make_vision(**changes):
    config = CLIPVisionConfig(**{**VISION, **changes})
    return nnx.jit(lambda: CLIPVisionEncoder(config, rngs=nnx.Rngs(0)))()


@cache
def make_text(**changes):
    config = CLIPTextConfig(**{**TEXT, **changes})
    return nnx.jit(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0)))()


def test_layers_above_the_hidden_state_are_not_computed():
    model, pixels = make_vision(), images(VISION, 0)
    graph, state = nnx.split(model)
    broken = jax.tree.map(lambda x: x, state)
    broken.blocks = jax.tree.map(lambda x: x.at[2].set(jnp.nan), broken.blocks)
    broken = nnx.merge(graph, broken)
    assert np.isnan(our_image(broken, pixels, -1)).any()
    np.testing.assert_array_equal(our_image(broken, pixels, -2), our_image(model, pixels, 2))


def test_padding_does_not_reach_a_text():
    ids = token_ids(TEXT, 0)
    features, pooled = our_text(make_text(), ids)
    other = ids.copy()
    other[1, 8:] = 33
    after, pooled_after = our_text(make_text(), other)
    np.testing.assert_array_equal(features[1, :8], after[1, :8])
    np.testing.assert_array_equal(pooled, pooled_after)
    assert np.abs(features[1, 8:] - after[1, 8:]).max() > 1e-3


def test_an_id_beyond_the_vocabulary_gives_no_plausible_features():
    ids = token_ids(TEXT, 0)
    ids[0, 0] = 100
    assert np.isnan(our_text(make_text(), ids)[1][0]).any()


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_gradients_reach_every_parameter(tower):
    graph, params = nnx.split(make_text() if tower == "text" else make_vision(), nnx.Param)

    def loss(params):
        model = nnx.merge(graph, params)
        if isinstance(model, CLIPTextEncoder):
            return jnp.sum(jnp.sin(model(jnp.asarray(token_ids(TEXT, 0)))[0]))
        hidden = model(jnp.asarray(images(VISION, 0)))
        return jnp.sum(jnp.sin(hidden)) + jnp.sum(jnp.sin(model.pool(hidden)))

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        layers = SIZES["num_hidden_layers"] if "blocks" in jax.tree_util.keystr(path) else 1
        assert jnp.isfinite(leaf).all(), path
        # The softmax does not see a bias that all keys have.
        floor = -1 if "'key'" in jax.tree_util.keystr(path) else 1e-7
        assert (jnp.abs(leaf.reshape(layers, -1)).max(axis=1) > floor).all(), path


def test_what_the_towers_cannot_take_is_refused():
    with pytest.raises(ValueError, match="17 tokens exceed the 16"):
        make_text()(jnp.zeros((2, 17), jnp.int32))
    with pytest.raises(ValueError, match=r"\[3, 42, 28\] and this image encoder takes \[3, 42, 42"):
        make_vision()(jnp.zeros((2, 3, 42, 28)))
    for hidden_state in (4, -5):
        with pytest.raises(ValueError, match=f"hidden_state={hidden_state} must be from -4 to 3"):
            make_vision()(jnp.zeros((2, 3, 42, 42)), hidden_state=hidden_state)


def test_released_configs_read_with_their_notes():
    notes = {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "projection_dim": 768,
        "torch_dtype": "float16",
        "transformers_version": "4.48.0",
    }
    text = {
        **CLIPTextConfig(**TEXT).to_dict(),
        **notes,
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
    }
    assert CLIPTextConfig.from_dict(text) == CLIPTextConfig(**TEXT)
    vision = {
        **CLIPVisionConfig(**VISION).to_dict(),
        **notes,
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
    }
    assert CLIPVisionConfig.from_dict(vision) == CLIPVisionConfig(**VISION)


def test_what_a_config_leaves_out_is_as_in_transformers():
    for ours, theirs in (
        (CLIPTextConfig(), transformers.CLIPTextConfig()),
        (CLIPVisionConfig(), transformers.CLIPVisionConfig()),
    ):
        expected = {name: getattr(theirs, name) for name in dataclasses.asdict(ours)}
        assert dataclasses.asdict(ours) == expected


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (CLIPTextConfig, {"model_type": "clip"}, "model_type='clip' is not implemented, only 'cl"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act='relu' .* only 'gelu' and 'quick_ge"),
        (CLIPTextConfig, {"num_attention_heads": 5}, "hidden_size=512 must be a multiple of num_"),
        (CLIPTextConfig, {"eos_token_id": [2, 3]}, r"eos_token_id cannot be \[2, 3\]"),
        (CLIPTextConfig, {"text_config": {}}, r"unknown keys \['text_config'\]"),
        (CLIPVisionConfig, {"model_type": "clip_text_model"}, "only 'clip_vision_model'"),
        (CLIPVisionConfig, {"image_size": 225}, "image_size=225 must be a multiple of patch_size"),
        (CLIPVisionConfig, {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_a_config_of_another_model_is_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(values)
