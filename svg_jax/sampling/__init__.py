"""From a prompt to a video: schedulers, the denoising loop, one pipeline per family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "CogVideoXPipeline": "svg_jax.sampling.cogvideox.pipeline",
    "HunyuanVideoPipeline": "svg_jax.sampling.hunyuan_video.pipeline",
    "VideoOutput": "svg_jax.sampling.records",
    "VideoPipeline": "svg_jax.sampling.pipeline",
    "WanPipeline": "svg_jax.sampling.wan.pipeline",
    "denoise": "svg_jax.sampling.denoising",
    "from_pretrained": "svg_jax.sampling.loading",
    "sample": "svg_jax.sampling.traced",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the settings are read without jax."""
    if name not in _HOME:
        raise AttributeError(f"module 'svg_jax.sampling' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(__all__)
