"""The tiny model's architecture, in the files' own words: diffusers' and transformers' configs."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from tiny_data import CAPTION_TOKENS, HEIGHT, NUM_FRAMES, WIDTH, vocabulary

from svg_jax.convert.scheduler_config import COGVIDEOX
from svg_jax.models.cogvideox import CogVideoXConfig, CogVideoXTransformer
from svg_jax.models.t5 import T5Config, T5Encoder
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.diffusion import alphas_cumprod

TEXT_FEATURES = 64

# CogVideoXTransformer3DModel in pixel space: no VAE, a token is a patch of 4x4 pixels of a frame.
TRANSFORMER = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 32,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "max_text_seq_length": CAPTION_TOKENS,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "num_attention_heads": 6,
    "num_layers": 6,
    "ofs_embed_dim": None,
    "out_channels": 3,
    "patch_bias": True,
    "patch_size": 4,
    "patch_size_t": None,
    "sample_frames": NUM_FRAMES,
    "sample_height": HEIGHT,
    "sample_width": WIDTH,
    "spatial_interpolation_scale": 1.0,
    "temporal_compression_ratio": 1,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": TEXT_FEATURES,
    "time_embed_dim": 64,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}

TEXT_ENCODER = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 128,
    "d_kv": 16,
    "d_model": TEXT_FEATURES,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.0,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "use_cache": False,
    "vocab_size": len(vocabulary()),
}

SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def make_transformer(rngs: nnx.Rngs, config: dict[str, Any], dtype: Dtype) -> CogVideoXTransformer:
    """Make a transformer to train: float32 parameters and residual stream, the rest in `dtype`."""
    return CogVideoXTransformer(
        CogVideoXConfig.from_dict(config), dtype=dtype, residual_dtype=jnp.float32, rngs=rngs
    )


def make_text_encoder(rngs: nnx.Rngs, config: dict[str, Any], dtype: Dtype) -> T5Encoder:
    """Make a text encoder to train along with the transformer."""
    return T5Encoder(T5Config.from_dict(config), dtype=dtype, rngs=rngs)


def signal_and_noise() -> tuple[np.ndarray, np.ndarray]:
    """How much of the video and of the noise is in the sample at each of the 1000 timesteps."""
    alpha_bar = alphas_cumprod(SchedulerConfig.from_dict(SCHEDULER, COGVIDEOX))
    return np.sqrt(alpha_bar).astype(np.float32), np.sqrt(1.0 - alpha_bar).astype(np.float32)
