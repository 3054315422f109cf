"""What the CogVideoX transformer counts and refuses."""

import jax.numpy as jnp
import pytest
from flax import nnx
from random_transformers import LEARNED, OFS, PATCH_T, make_model, model_inputs
from random_transformers import PLAIN_COGVIDEOX as CONFIG

from svg_jax.models import CogVideoXConfig, CogVideoXTransformer, VideoLayout


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (CONFIG, (13, 8, 12, 8), VideoLayout(13, 24, 8, "first")),
        (CONFIG, (1, 2, 2, 1), VideoLayout(1, 1, 1, "first")),
        (LEARNED, (5, 8, 8, 8), VideoLayout(5, 16, 8, "first")),
        (PATCH_T, (22, 6, 8, 8), VideoLayout(11, 12, 8, "first")),
    ],
)
def test_layout_counts_tokens(config, size, expected):
    model = nnx.eval_shape(lambda: CogVideoXTransformer(config, rngs=nnx.Rngs(0)))
    assert model.layout(*size) == expected


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (CONFIG, (2, 7, 8, 8), "height=7 must be a positive multiple of 2"),
        (CONFIG, (2, 8, 9, 8), "width=9 must be a positive multiple of 2"),
        (CONFIG, (0, 8, 8, 8), "num_frames=0"),
        (PATCH_T, (3, 8, 8, 8), "num_frames=3 must be a positive multiple of 2"),
        (PATCH_T, (2, 10, 8, 8), "10x8 .* exceed .* 8x8"),
        (LEARNED, (3, 8, 6, 8), "8x8 .* alone, not 8x6"),
        (LEARNED, (3, 8, 8, 7), "8 text tokens, not 7"),
        (CONFIG, (2, 8, 8, 9), "text_tokens=9 must lie between 1 and max_text_seq_length=8"),
        (CONFIG, (2, 8, 8, 0), "text_tokens=0"),
    ],
)
def test_layout_refuses_what_the_model_cannot_take(config, size, message):
    with pytest.raises(ValueError, match=message):
        config.layout(*size)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {"hidden_states": jnp.zeros((2, 2, 5, 8, 8))}, "5 channels .* takes 4"),
        (CONFIG, {"hidden_states": jnp.zeros((2, 2, 4, 8, 7))}, "width=7"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 8, 24))}, "24 features .* takes 16"),
        (CONFIG, {"encoder_hidden_states": jnp.zeros((2, 9, 16))}, "text_tokens=9"),
        (CONFIG, {"ofs": jnp.full(2, 2.0)}, "takes no ofs"),
        (OFS, {"ofs": None}, "needs ofs"),
    ],
)
def test_a_call_refuses_what_the_model_cannot_take(config, change, message):
    with pytest.raises(ValueError, match=message):
        make_model(config)(**{**model_inputs(config), **change})


def test_a_config_survives_the_way_to_json_and_back():
    values = {**OFS.to_dict(), "_class_name": "CogVideoXTransformer3DModel"}
    assert CogVideoXConfig.from_dict(values) == OFS
    whole = CogVideoXConfig.from_dict({**values, "spatial_interpolation_scale": 2})
    assert type(whole.spatial_interpolation_scale) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_head": 2, "layers": 3}, r"unknown keys \['layers', 'num_head'\]"),
        ({"num_layers": "30"}, "num_layers cannot be '30'"),
        ({"num_layers": True}, "num_layers cannot be True"),
        ({"num_layers": None}, "num_layers cannot be None"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"patch_size_t": 0}, "patch_size_t must be at least 1"),
        ({"activation_fn": "gelu"}, "activation_fn='gelu' is not implemented"),
        ({"timestep_activation_fn": "gelu"}, "timestep_activation_fn"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"freq_shift": 1}, "freq_shift"),
        ({"norm_elementwise_affine": False}, "norm_elementwise_affine"),
        ({"attention_bias": False}, "attention_bias"),
        ({"patch_bias": False}, "patch_bias"),
        ({"patch_size_t": 2}, "patch_size_t goes with rotary"),
        ({"use_learned_positional_embeddings": True}, "without rotary"),
        ({"use_rotary_positional_embeddings": True, "attention_head_dim": 24}, "16 divides"),
        ({"attention_head_dim": 4}, "16 divides"),
        ({"ofs_embed_dim": 256}, "ofs_embed_dim=256 must be time_embed_dim=512"),
    ],
)
def test_a_config_of_another_model_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXConfig.from_dict(values)
