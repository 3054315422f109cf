"""The LLaMA encoder against the released code on random weights, and what else it promises."""

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, ported, randomised, relative_error
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from svg_jax.convert.tables import llama
from svg_jax.models import LlamaConfig, LlamaEncoder
from svg_jax.models.rope import text_rotation

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
}
ROPE: dict[str, Any] = {"rope_theta": 500_000.0, "rope_type": "default"}
VARIANTS = {
    "3": {**SIZES, "rope_parameters": ROPE},
    "other heads": {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 10},
}
CONFIG = LlamaConfig(**SIZES, rope_theta=500_000.0)

run = nnx.jit(LlamaEncoder.__call__, static_argnames="hidden_state")


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def pair(variant, seed, dtype=torch.float32):
    reference = transformers.LlamaModel(transformers.LlamaConfig(**variant))
    reference = randomised(reference, seed, dtype)
    config = LlamaConfig.from_dict(json.loads(reference.config.to_json_string()))
    our_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    model = ported(
        lambda: LlamaEncoder(config, dtype=our_dtype, param_dtype=our_dtype, rngs=nnx.Rngs(0)),
        llama.rules(config),
        reference,
    )
    return reference, model


def texts(seed, num_tokens=13):
    """Ids and masks of two texts, the second of them shorter and padded."""
    ids = np.random.default_rng(seed).integers(0, 100, (2, num_tokens), np.int32)
    mask = np.arange(num_tokens) < np.array([[num_tokens], [num_tokens // 2 + 1]])
    return ids, mask.astype(np.int32)


def reference_features(reference, ids, mask, hidden_state=-3):
    with torch.no_grad():
        out = reference(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True)
    return out.hidden_states[hidden_state].float().numpy()


def our_features(model, ids, mask, hidden_state=-3):
    features = run(model, jnp.asarray(ids), jnp.asarray(mask), hidden_state=hidden_state)
    assert features.dtype == model.dtype
    return np.asarray(features.astype(jnp.float32))


@pytest.mark.parametrize(
    ("case", "num_tokens", "hidden_states"),
    [("3", 13, (-3, 0, 1, 3, -1)), ("3", 40, (-3,)), ("3", 1, (-3,)), ("other heads", 13, (-3,))],
)
def test_it_equals_transformers(case, num_tokens, hidden_states):
    reference, model = pair(VARIANTS[case], seed=0)
    inputs = texts(1, num_tokens)
    for hidden_state in hidden_states:
        theirs = reference_features(reference, *inputs, hidden_state)
        error = relative_error(our_features(model, *inputs, hidden_state), theirs)
        print(f"{case}, {num_tokens} tokens, hidden state {hidden_state}: {error:.2e}")
        assert error < TOLERANCE


def test_the_full_size_rotation_equals_transformers():
    config = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_parameters=ROPE
    )  # fmt: skip
    positions = torch.arange(1000)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = text_rotation(1000, 128, theta=500_000.0)
    for table, expected in zip(ours, theirs, strict=True):
        error = np.abs(table - expected[0, :, :64].numpy()).max()
        print(f"{error:.2e}")
        assert error < TOLERANCE


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers():
    ours, theirs = bfloat16_errors(
        lambda seed: pair(VARIANTS["3"], seed, torch.bfloat16),
        texts,
        reference_features,
        our_features,
    )
    print(f"ours {ours:.3e}, transformers {theirs:.3e}")
    assert ours < 1.1 * theirs


@cache
def make_encoder(config=CONFIG):
    return nnx.jit(lambda: LlamaEncoder(config, rngs=nnx.Rngs(0)))()


def test_layers_above_the_hidden_state_are_not_computed():
    model, inputs = make_encoder(), texts(0)
    graph, state = nnx.split(model)
    broken = jax.tree.map(lambda x: x, state)
    broken.blocks = jax.tree.map(lambda x: x.at[2:].set(jnp.nan), broken.blocks)
    broken = nnx.merge(graph, broken)
    assert np.isnan(our_features(broken, *inputs, -2)).any()
    np.testing.assert_array_equal(our_features(broken, *inputs), our_features(model, *inputs, 2))


def test_the_layers_below_the_hidden_state_are_not_copied():
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=1024, head_dim=8)
    graph, state = nnx.split(nnx.eval_shape(lambda: LlamaEncoder(config, rngs=nnx.Rngs(0))))
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids, hidden_state=-2))
    compiled = forward.lower(state, jax.ShapeDtypeStruct((1, 4), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.blocks))
    assert memory.temp_size_in_bytes < size / 2


def test_padding_does_not_reach_a_text_nor_does_its_own_future():
    ids, mask = texts(0)
    other = np.where(mask == 1, ids, 33).astype(np.int32)
    features, same = our_features(make_encoder(), ids, mask), our_features(
        make_encoder(), other, mask
    )  # fmt: skip
    np.testing.assert_array_equal(features[mask == 1], same[mask == 1])
    other[0, 9] = (ids[0, 9] + 1) % 100
    after = our_features(make_encoder(), other, mask)
    np.testing.assert_array_equal(features[0, :9], after[0, :9])
    assert np.abs(features[0, 10:] - after[0, 10:]).min(axis=-1).max() > 0


def test_without_a_mask_all_tokens_count():
    ids, mask = texts(0)
    features = run(make_encoder(), jnp.asarray(ids), hidden_state=-3)
    everything = our_features(make_encoder(), ids, np.ones_like(mask))
    np.testing.assert_array_equal(features, everything)
    assert np.abs(features - our_features(make_encoder(), ids, mask)).max() > 1e-4


def test_gradients_reach_every_parameter():
    graph, params = nnx.split(make_encoder(), nnx.Param)
    ids, mask = map(jnp.asarray, texts(0))
    target = jax.random.normal(jax.random.key(0), (2, 13, 32))
    loss = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(ids, mask) * target)))
    for path, leaf in jax.tree.leaves_with_path(loss(params)):
        layers = CONFIG.num_hidden_layers if "blocks" in jax.tree_util.keystr(path) else 1
        assert jnp.isfinite(leaf).all(), path
        assert (jnp.abs(leaf.reshape(layers, -1)).max(axis=1) > 1e-7).all(), path


def test_an_id_beyond_the_vocabulary_gives_no_plausible_features():
    ids, mask = texts(0)
    ids[0, 0] = 100
    assert np.isnan(our_features(make_encoder(), ids, mask)[0]).all()


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="41 tokens exceed the 40"):
        make_encoder()(jnp.zeros((2, 41), jnp.int32))
    for hidden_state in (5, -6):
        with pytest.raises(ValueError, match=f"hidden_state={hidden_state} must be from -5 to 4"):
            make_encoder()(jnp.zeros((2, 4), jnp.int32), hidden_state=hidden_state)


RELEASED = {
    **SIZES,
    "_name_or_path": "llm",
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pad_token_id": 128258,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.46.3",
    "use_cache": True,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500_000.0, "rope_scaling": None},
        {"rope_theta": 500_000},
        {"rope_parameters": ROPE},
        {"rope_theta": 500_000.0, "rope_parameters": ROPE},
        {"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_a_released_config_reads_with_its_notes_and_either_form_of_theta(rope):
    assert LlamaConfig.from_dict({**RELEASED, **rope}) == CONFIG


def test_what_a_config_leaves_out_is_as_in_transformers():
    theirs = transformers.LlamaConfig().to_dict()
    ours = LlamaConfig()
    fields = dataclasses.asdict(ours)
    assert theirs["rope_parameters"]["rope_theta"] == fields.pop("rope_theta")
    assert theirs["head_dim"] == ours.head_features
    assert theirs["num_key_value_heads"] == ours.key_value_heads
    for name in fields.keys() - {"head_dim", "num_key_value_heads"}:
        assert fields[name] == theirs[name], name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava"}, "model_type='llava' is not implemented, only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"sliding_window": 3}, r"unknown keys \['sliding_window'\]"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"num_attention_heads": 7}, "hidden_size=4096 must be a multiple of num_attention_heads"),
        ({"head_dim": 5}, "head_dim must be even, not 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling=.* only rope_type 'default'"),
        ({"rope_scaling": 2.0}, "rope_scaling=2.0 is not implemented"),
        ({"rope_parameters": {**ROPE, "factor": 8.0}}, "rope_parameters=.*factor"),
        ({"rope_theta": 1e4, "rope_parameters": ROPE}, "rope_theta is 10000.0 and in rope_par"),
        ({"rope_theta": "1e4"}, "rope_theta cannot be '1e4'"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(values)
