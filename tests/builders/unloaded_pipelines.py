"""A pipeline of every family whose weights fail the test that would load them."""

from typing import Any

import numpy as np

from svg_jax.models import CogVideoXConfig, HunyuanVideoConfig, WanConfig
from svg_jax.sampling import CogVideoXPipeline, HunyuanVideoPipeline, WanPipeline
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders
from svg_jax.sampling.schedules.config import SchedulerConfig


def loaded(*_: Any) -> Any:
    raise AssertionError("something was loaded")


def lazy(config: Any) -> Any:
    return Lazy(config, np.dtype(np.float32), loaded)


SMALL: dict[str, Any] = {"num_attention_heads": 2, "in_channels": 4, "out_channels": 4}
COGVIDEOX: dict[str, Any] = SMALL | {
    "attention_head_dim": 16,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 8,
    "use_rotary_positional_embeddings": True,
}
WAN: dict[str, Any] = SMALL | {
    "attention_head_dim": 12,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
HUNYUAN_VIDEO: dict[str, Any] = SMALL | {
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
PIPELINES: dict[str, Any] = {
    "CogVideoX": CogVideoXPipeline(
        transformer=lazy(CogVideoXConfig(**COGVIDEOX)),
        scheduler=SchedulerConfig(),
        text_encoder=lazy(None),
    ),
    "Wan": WanPipeline(
        transformer=lazy(WanConfig(**WAN)),
        scheduler=SchedulerConfig("unipc", shift=3.0),
        text_encoder=lazy(None),
    ),
    "HunyuanVideo": HunyuanVideoPipeline(
        transformer=lazy(HunyuanVideoConfig(**HUNYUAN_VIDEO)),
        scheduler=SchedulerConfig("euler", shift=7.0),
        encoders=HunyuanVideoEncoders(text_encoder=lazy(None), text_encoder_2=lazy(None)),
    ),
}
