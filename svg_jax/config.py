"""What a user chooses about sparsity, and the choices of the paper's scripts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class SparsityConfig:
    """Where attention is sparse, and how sparse it is.

    Static and hashable, as `VideoLayout` is.

    Attributes:
        density: Kept fraction of the S×S attention map, in (0, 1]; text is part of this budget, the
            first-frame sink comes on top of it. 1 is dense. The official flag `--sparsity` is this
            same kept fraction.
        dense_steps: Share of the sampling steps, from the first on, that stay dense.
        dense_layers: Share of the layers, from the first on, that stay dense in every step.
        sampled_rows: Query rows that the online profiling looks at, per batch entry.
        first_frame_sink: Whether every token attends to the whole first frame. None follows the
            paper: yes where no text shares the sequence (Wan), no where it does.
        band_multiple: The band's width is rounded to a multiple of this many tokens: down where
            text shares the sequence, up where none does, as the official code does.
    """

    density: float = 0.25
    dense_steps: float = 0.2
    dense_layers: float = 0.0
    sampled_rows: int = 64
    first_frame_sink: bool | None = None
    band_multiple: int = 128

    def __post_init__(self) -> None:
        if not self.density > 0:
            raise ValueError(f"density is the kept share of attention, over 0: got {self.density}")
        for name in ("dense_steps", "dense_layers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1: got {getattr(self, name)}")
        for name in ("sampled_rows", "band_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1: got {getattr(self, name)}")


def share_of(share: float | int, count: int) -> int:
    """The first `share` of `count` things, rounded down as the official code does.

    The small term keeps .3·10 = 2.999… from losing a step that the user asked for.
    """
    return math.floor(share * count + 1e-9)


def dense_step_count(config: SparsityConfig, num_inference_steps: int) -> int:
    """Sampling steps that run dense before the first sparse one (the paper's warm-up)."""
    return share_of(config.dense_steps, num_inference_steps)


def dense_layer_count(config: SparsityConfig, num_layers: int) -> int:
    """Layers that run dense in every step."""
    return share_of(config.dense_layers, num_layers)


PAPER_PRESETS: Mapping[str, SparsityConfig] = MappingProxyType(
    {
        "wan-t2v-720p": SparsityConfig(density=0.30, dense_steps=0.20, dense_layers=0.03),
        "wan-i2v-720p": SparsityConfig(density=0.30, dense_steps=0.35, dense_layers=0.03),
        "wan-i2v-480p": SparsityConfig(density=0.30, dense_steps=0.20, dense_layers=0.03),
        "hunyuanvideo-720p": SparsityConfig(density=0.25, dense_steps=0.10, dense_layers=0.03),
        "hunyuanvideo-480p": SparsityConfig(density=0.20, dense_steps=0.04, dense_layers=0.0),
        "cogvideox1.5-i2v": SparsityConfig(
            density=0.25, dense_steps=0.20, dense_layers=0.025, sampled_rows=32
        ),
    }
)
"""The settings of the official scripts, by model and size."""
