"""Small runs of every family and sampler, for the tests of saved runs."""

from typing import Any

import numpy as np
from flax import nnx

import svg_jax
from svg_jax.attention import SparseAttentionInfo
from svg_jax.models import (
    CogVideoXConfig,
    CogVideoXTransformer,
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    WanConfig,
    WanTransformer,
)
from svg_jax.sampling import CogVideoXPipeline, HunyuanVideoPipeline, WanPipeline
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders
from svg_jax.sampling.records import StepRecord
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.steps import SamplerState

SPARSITY = svg_jax.SparsityConfig(density=0.6, sampled_rows=4, band_multiple=1)
WARMUP = svg_jax.Warmup(steps=0.3)
COGVIDEOX = CogVideoXConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=16,
    num_layers=2,
    sample_width=6,
    sample_height=4,
    sample_frames=9,
    max_text_seq_length=2,
    use_rotary_positional_embeddings=True,
)
WAN = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
)
HUNYUAN_VIDEO = HunyuanVideoConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 6, 6),
)
SIZE = {"height": 32, "width": 48, "num_frames": 9}
RANDOM = np.random.default_rng(0)


def normal(*shape) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


EMBEDS: dict[str, Any] = {"prompt_embeds": normal(1, 2, 16)}
BOTH = EMBEDS | {"negative_prompt_embeds": normal(1, 2, 16)}
POOLED: dict[str, Any] = {
    "pooled_prompt_embeds": normal(1, 8),
    "prompt_attention_mask": np.ones((1, 2), np.int32),
}
RUNS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "CogVideoX, DDIM, guided": (
        *(CogVideoXPipeline, CogVideoXTransformer(COGVIDEOX, rngs=nnx.Rngs(0)), SchedulerConfig()),
        BOTH | {"guidance_interval": (0, 0.7)},
    ),
    "CogVideoX, DPM": (
        *(CogVideoXPipeline, CogVideoXTransformer(COGVIDEOX, rngs=nnx.Rngs(0)), SchedulerConfig()),
        EMBEDS | {"guidance_scale": 1, "scheduler": "dpm"},
    ),
    "Wan, UniPC": (
        *(WanPipeline, WanTransformer(WAN, rngs=nnx.Rngs(0)), SchedulerConfig("unipc", shift=3.0)),
        EMBEDS | {"guidance_scale": 1},
    ),
    "HunyuanVideo, Euler": (
        *(HunyuanVideoPipeline, HunyuanVideoTransformer(HUNYUAN_VIDEO, rngs=nnx.Rngs(0))),
        SchedulerConfig("euler", shift=7.0),
        EMBEDS | POOLED,
    ),
}


def pipeline_of(name) -> tuple[Any, dict[str, Any]]:
    kind, transformer, scheduler, arguments = RUNS[name]
    more: dict[str, Any] = {}
    if kind is HunyuanVideoPipeline:
        more["encoders"] = HunyuanVideoEncoders()
    pipeline = kind(transformer=transformer, scheduler=scheduler, **more)
    sparse = {"sparsity": SPARSITY, "warmup": WARMUP}
    return pipeline, SIZE | arguments | {"num_inference_steps": 6} | sparse


class Killed(Exception):
    pass


def kill_after(step):
    def callback(record):
        if record.step == step:
            raise Killed

    return callback


STATES = {
    "DDIM": SamplerState(normal(1, 2, 3)),
    "DPM": SamplerState(normal(1, 2, 3), None, (normal(1, 2, 3),)),
    "flow": SamplerState(normal(1, 2, 3), normal(1, 2, 3), (normal(1, 2, 3), normal(1, 2, 3))),
}


def records_of(count, entries=2):
    profile = SparseAttentionInfo(
        RANDOM.random((3, entries, 2)) < 0.5,
        np.full((3, entries, 2, 2), np.nan, np.float32),
        normal(3),
    )
    timesteps = [999, 0.1, 749.25]
    return tuple(
        StepRecord(i, timesteps[i], 6.000000000000001, 0.1, i == 0, profile if i else None)
        for i in range(count)
    )
