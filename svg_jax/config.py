"""What a user chooses about sparsity, and the choices of the paper's scripts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from svg_jax.convert.formats.values import is_number


@dataclass(frozen=True)
class SparsityConfig:
    """Where attention is sparse, and how sparse it is.

    Static and hashable, as `VideoLayout` is.

    Attributes:
        density: Kept fraction of the S×S attention map, in (0, 1]; text is part of this budget, the
            first-frame sink comes on top of it. 1 is dense. The official flag `--sparsity` is this
            same kept fraction.
        dense_steps: Share of the sampling steps, from the first on, that stay dense; at least one
            step if it is over 0.
        dense_layers: Share of the layers, from the first on, that stay dense in every step.
        sampled_rows: Query rows that the online profiling looks at, the same in all batch entries.
        first_frame_sink: Whether every token attends to the whole first frame. None follows the
            paper: yes where no text shares the sequence (Wan), no where it does.
        band_multiple: The band's width is rounded to a multiple of this many tokens: down where
            text shares the sequence, up where none does, as the official code does.
    """

    density: float | int = 0.25
    dense_steps: float | int = 0.2
    dense_layers: float | int = 0.0
    sampled_rows: int = 64
    first_frame_sink: bool | None = None
    band_multiple: int = 128

    def __post_init__(self) -> None:
        for name in ("density", "dense_steps", "dense_layers"):
            share: Any = getattr(self, name)
            least = "over 0, to" if name == "density" else "from 0 to"
            if not is_number(share):
                raise ValueError(f"{name} is a number {least} 1: got {_shown(share)}")
            if not 0 <= share <= 1 or (name == "density" and share == 0):
                raise ValueError(f"{name} is a share {least} 1: got {_shown(share)}")
        for name in ("sampled_rows", "band_multiple"):
            count = getattr(self, name)
            if not is_number(count, whole=True) or count < 1:
                raise ValueError(f"{name} is a whole number, at least 1: got {_shown(count)}")
        if not isinstance(self.first_frame_sink, (bool, type(None))):
            shown = _shown(self.first_frame_sink)
            raise ValueError(f"first_frame_sink is True, False or None: got {shown}")


def _shown(value: object) -> str:
    """A value in an error, cut where it is long."""
    return f"{value!r:.60}"


def share_of(share: float | int, count: int) -> int:
    """The first `share` of `count` things, rounded down as the official code does.

    The small term keeps .3·10 = 2.999… from losing a step that the user asked for.
    """
    return math.floor(share * count + 1e-9)


def dense_step_count(config: SparsityConfig, num_inference_steps: int) -> int:
    """Sampling steps that run dense before the first sparse one (the paper's warm-up).

    A warm-up that is asked for is at least one step: in a run of few steps the first ones, which
    settle what the video shows, would else be sparse without a word.
    """
    if config.dense_steps == 0:
        return 0
    return max(share_of(config.dense_steps, num_inference_steps), min(num_inference_steps, 1))


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
