"""From a prompt to a video: schedulers, the denoising loop, one pipeline per family."""

from svg_jax.sampling.cogvideox import CogVideoXPipeline, VideoOutput
from svg_jax.sampling.denoise import denoise
from svg_jax.sampling.loading import from_pretrained

__all__ = ["CogVideoXPipeline", "VideoOutput", "denoise", "from_pretrained"]
