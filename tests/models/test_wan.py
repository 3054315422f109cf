"""What Wan's transformer alone promises: times given in any way, what it counts and refuses."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_transformers import IMAGE, make_model, model_inputs, run
from random_transformers import PLAIN_WAN as CONFIG

from svg_jax.models import VideoLayout, WanConfig, WanTransformer


def test_one_time_for_all_tokens_may_be_given_in_any_way():
    inputs = model_inputs(CONFIG)
    expected, _ = run(make_model(CONFIG), **inputs)
    for times in (2, 32):
        timestep = jnp.tile(inputs["timestep"][:, None], (1, times))
        velocity, _ = run(make_model(CONFIG), **{**inputs, "timestep": timestep})
        np.testing.assert_allclose(velocity, expected, rtol=1e-4, atol=1e-5)
    whole, _ = run(make_model(CONFIG), **{**inputs, "timestep": jnp.array([999, 20])})
    np.testing.assert_array_equal(whole, expected)


def test_layout_counts_tokens_and_has_no_text():
    model = nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    assert model.layout(13, 8, 12, 512) == VideoLayout(13, 24)
    assert model.layout(1, 2, 2) == VideoLayout(1, 1)
    other = dataclasses.replace(CONFIG, patch_size=(2, 3, 1))
    assert other.layout(4, 9, 5) == VideoLayout(2, 15)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 7, 8), "height=7 must be a positive multiple of 2"),
        ((2, 8, 9), "width=9 must be a positive multiple of 2"),
        ((0, 8, 8), "num_frames=0"),
        ((33, 8, 8), "33x4x4 tokens .* exceed the 32"),
        ((2, 8, 66), "2x4x33 tokens .* exceed the 32"),
    ],
)
def test_layout_refuses_what_the_model_cannot_take(size, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.layout(*size)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {"hidden_states": jnp.zeros((2, 5, 2, 8, 8))}, "5 channels .* takes 4"),
        (CONFIG, {"hidden_states": jnp.zeros((2, 4, 2, 8, 7))}, "width=7"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 6, 24))}, "24 features .* takes 16"),
        (CONFIG, {"timestep": jnp.zeros(3)}, r"timestep is \[3\] and must be \[2\] or"),
        (CONFIG, {"timestep": jnp.zeros(())}, r"timestep is \[\] and"),
        (CONFIG, {"timestep": jnp.zeros((2, 16))}, r"\[2, 2\] or \[2, 32\]"),
        (CONFIG, {"timestep": jnp.zeros((1, 32))}, r"timestep is \[1, 32\]"),
        (CONFIG, {"text_length": jnp.zeros(3, int)}, r"text_length is \[3\] and must be \[2\]"),
        (CONFIG, {"encoder_hidden_states_image": jnp.zeros((2, 10, 8))}, "takes no encoder_hidden"),
        (IMAGE, {"encoder_hidden_states_image": None}, "needs encoder_hidden_states_image"),
        (IMAGE, {"encoder_hidden_states_image": jnp.zeros((2, 10, 9))}, "9 features .* takes 8"),
        (IMAGE, {"encoder_hidden_states_image": jnp.zeros((2, 5, 8))}, "5 tokens .* takes 10"),
    ],
)
def test_a_call_refuses_what_the_model_cannot_take(config, change, message):
    with pytest.raises(ValueError, match=message):
        make_model(config)(**{**model_inputs(config), **change})


def test_a_config_survives_the_way_to_json_and_back():
    text = json.dumps({**IMAGE.to_dict(), "_class_name": "WanTransformer3DModel"})
    assert WanConfig.from_dict(json.loads(text)) == IMAGE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_size": [-1, -1]}, r"unknown keys \['window_size'\]"),
        ({"patch_size": 2}, "patch_size cannot be 2"),
        ({"patch_size": [2, 2]}, r"patch_size cannot be \[2, 2\]"),
        ({"patch_size": [1, 2, 2.0]}, r"patch_size cannot be \[1, 2, 2.0\]"),
        ({"patch_size": [0, 2, 2]}, "patch_size must be at least 1"),
        ({"num_layers": "40"}, "num_layers cannot be '40'"),
        ({"out_channels": None}, "out_channels cannot be None"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False is not implemented"),
        ({"qk_norm": None}, "qk_norm=None is not implemented"),
        ({"attention_head_dim": 15}, "attention_head_dim must be even"),
        ({"freq_dim": 255}, "freq_dim must be even"),
        ({"image_dim": 1280}, "added_kv_proj_dim=None must be the width"),
        ({"added_kv_proj_dim": 5120}, "null where there is none"),
        ({"image_dim": 1280, "added_kv_proj_dim": 1280}, "of 5120"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len without image_dim"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.from_dict(values)
