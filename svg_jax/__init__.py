"""Sparse VideoGen in JAX: training-free sparse attention for video diffusion transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_jax.attention import (
        SparseAttentionInfo,
        StepState,
        attend_dense,
        attend_sparse,
        sparse_attention,
    )
    from svg_jax.classify import classify_heads
    from svg_jax.config import PAPER_PRESETS, SparsityConfig, Warmup
    from svg_jax.media.video import save_video
    from svg_jax.models.attention import Attend
    from svg_jax.models.layout import VideoLayout
    from svg_jax.sampling import from_pretrained

    __version__: str

__all__ = [
    "PAPER_PRESETS",
    "Attend",
    "SparseAttentionInfo",
    "SparsityConfig",
    "StepState",
    "VideoLayout",
    "Warmup",
    "__version__",
    "attend_dense",
    "attend_sparse",
    "classify_heads",
    "from_pretrained",
    "save_video",
    "sparse_attention",
]

_HOME = {
    "PAPER_PRESETS": "svg_jax.config",
    "Attend": "svg_jax.models.attention",
    "SparseAttentionInfo": "svg_jax.attention",
    "StepState": "svg_jax.attention",
    "SparsityConfig": "svg_jax.config",
    "VideoLayout": "svg_jax.models.layout",
    "Warmup": "svg_jax.config",
    "attend_dense": "svg_jax.attention",
    "attend_sparse": "svg_jax.attention",
    "classify_heads": "svg_jax.classify",
    "from_pretrained": "svg_jax.sampling",
    "save_video": "svg_jax.media.video",
    "sparse_attention": "svg_jax.attention",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `svg-jax --help` needs no jax."""
    if name == "__version__":
        from importlib.metadata import version

        value = version("svg-jax")
    elif name in _HOME:
        try:
            value = getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            from svg_jax.extras import missing_package

            raise missing_package(error) from error
    else:
        raise AttributeError(f"module 'svg_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(__all__)
