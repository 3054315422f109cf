"""The T5 encoder: equal to the released code on random weights, and what else it promises."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from parity import TOLERANCE, bfloat16_errors, jitted, ported, randomised, relative_error

from svg_jax.convert.tables import t5
from svg_jax.models import T5Config, T5Encoder

CONFIG = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
UMT5 = dataclasses.replace(CONFIG, model_type="umt5")
run = nnx.jit(T5Encoder.__call__)
IDS = jnp.array([[3, 14, 15, 9, 1, 0, 0], [2, 7, 1, 0, 0, 0, 0]], jnp.int32)

RELEASED = {
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


def t5_pair(seed, dtype=torch.float32, family="T5"):
    make_config = getattr(transformers, f"{family}Config")
    module = getattr(transformers, f"{family}EncoderModel")(make_config(**RELEASED))
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
    return np.random.default_rng(seed).integers(
        0, RELEASED["vocab_size"], (2, num_tokens), np.int32
    )


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


@cache
def make_encoder(config=CONFIG):
    return nnx.jit(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))()


def test_an_untrained_encoder_keeps_the_size_of_its_features():
    features = run(make_encoder(dataclasses.replace(CONFIG, num_layers=6)), IDS)
    assert features.shape == (2, 7, 32)
    assert 0.9 < jnp.std(features) < 1.1


def test_masked_padding_does_not_reach_the_text():
    encoder = make_encoder()
    mask = IDS != 0
    other = jnp.where(mask, IDS, 33)
    text, same = run(encoder, IDS, mask)[mask], run(encoder, other, mask)[mask]
    np.testing.assert_allclose(text, same, atol=1e-5)
    assert jnp.abs(run(encoder, other)[mask] - text).max() > 1e-2


@pytest.mark.parametrize("config", [CONFIG, UMT5], ids=["T5", "UMT5"])
def test_gradients_reach_every_parameter(config):
    graph, params = nnx.split(make_encoder(config), nnx.Param)
    target = jax.random.normal(jax.random.key(0), (2, 7, 32))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(IDS) * target)))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        layers = config.num_layers if "blocks" in jax.tree_util.keystr(path) else 1
        assert jnp.isfinite(leaf).all(), path
        assert (jnp.abs(leaf.reshape(layers, -1)).max(axis=1) > 1e-6).all(), path


def test_an_id_beyond_the_vocabulary_gives_no_plausible_features():
    features = run(make_encoder(), IDS.at[0, 0].set(50))
    assert jnp.isnan(features[0]).any()


def test_float16_is_refused():
    with pytest.raises(ValueError, match="overflows in float16"):
        T5Encoder(CONFIG, dtype=jnp.float16, rngs=nnx.Rngs(0))


def test_the_last_weight_of_a_layer_stays_in_float32_where_the_others_are_float16():
    encoder = nnx.eval_shape(lambda: T5Encoder(CONFIG, param_dtype=jnp.float16, rngs=nnx.Rngs(0)))
    flat, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(encoder)))
    found = {".".join(key.key for key in path) for path, leaf in flat if leaf.dtype == jnp.float32}
    table = t5.rules(CONFIG)
    kept = set(transformers.T5EncoderModel._keep_in_fp32_modules or ())
    assert found == {rule.target for rule in table if kept & set(rule.source.split("."))}


def test_a_type_that_is_known_need_not_be_named_and_must_not_be_another():
    values = CONFIG.to_dict()
    del values["model_type"]
    assert T5Config.from_dict(values) == CONFIG
    assert T5Config.from_dict(values, model_type="umt5") == UMT5
    with pytest.raises(ValueError, match="model_type='t5' and must be 'umt5'"):
        T5Config.from_dict(CONFIG.to_dict(), model_type="umt5")


def test_a_released_config_reads_with_its_notes():
    values = {
        **CONFIG.to_dict(),
        "_name_or_path": "google/t5-v1_1-xxl",
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "model_type": "t5",
        "num_decoder_layers": 24,
        "output_past": True,
        "pad_token_id": 0,
        "scalable_attention": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "T5Tokenizer",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.2",
        "use_cache": True,
    }
    assert T5Config.from_dict(values) == CONFIG


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not implemented"),
        ({"dense_act_fn": "relu"}, "dense_act_fn='relu' is not implemented"),
        ({"model_type": "mt5"}, "model_type='mt5' is not implemented, only 't5' and 'umt5'"),
        ({"d_models": 3}, r"unknown keys \['d_models'\]"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"relative_attention_num_buckets": 6}, "relative_attention_num_buckets"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict(values)
