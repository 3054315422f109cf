"""From a prompt to a video: schedulers, the denoising loop, one pipeline per family."""

from svg_jax.sampling.cogvideox.pipeline import CogVideoXPipeline
from svg_jax.sampling.denoising import denoise
from svg_jax.sampling.hunyuan_video.pipeline import HunyuanVideoPipeline
from svg_jax.sampling.loading import from_pretrained
from svg_jax.sampling.pipeline import VideoOutput, VideoPipeline
from svg_jax.sampling.traced import sample
from svg_jax.sampling.wan.pipeline import WanPipeline

__all__ = [
    "CogVideoXPipeline",
    "HunyuanVideoPipeline",
    "VideoOutput",
    "VideoPipeline",
    "WanPipeline",
    "denoise",
    "from_pretrained",
    "sample",
]
