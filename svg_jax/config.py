"""What a user chooses about sparsity, and the choices of the paper's scripts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from svg_jax.convert.formats.values import is_number, shown

_MOVED = {"dense_steps": "steps", "dense_layers": "layers"}  # from SparsityConfig to Warmup


@dataclass(frozen=True)
class SparsityConfig:
    """How sparse attention is, where it is sparse.

    Static and hashable, as `VideoLayout` is.

    Attributes:
        density: Share of the attention map to compute, above 0; 1 is dense. Text counts; a
            first-frame sink comes on top. Called --sparsity in the paper's code.
        sampled_rows: Number of query rows sampled to tell spatial heads from temporal ones; the
            same rows for all batch entries.
        first_frame_sink: Whether every token attends to the whole first frame, as in the paper
            for Wan only; None is the model's own, which its `VideoLayout` tells.
        band_multiple: Round the band's width to a multiple of this many tokens, up or down as the
            layout's `band_rounding` says.
    """

    density: float | int = 0.25
    sampled_rows: int = 64
    first_frame_sink: bool | None = None
    band_multiple: int = 128

    def __new__(cls, *values: Any, **fields: Any) -> "SparsityConfig":
        """Refuse what has become a `Warmup`, in the new words."""
        if moved := {_MOVED[name]: value for name, value in fields.items() if name in _MOVED}:
            names = " and ".join(name for name in fields if name in _MOVED)
            shares = ", ".join(f"{name}={shown(value)}" for name, value in moved.items())
            is_or_are = "is no field" if len(moved) == 1 else "are no fields"
            raise TypeError(f"{names} {is_or_are} of SparsityConfig: pass warmup=Warmup({shares})")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_share("density", self.density, above_zero=True)
        for name in ("sampled_rows", "band_multiple"):
            count = getattr(self, name)
            if not is_number(count, whole=True) or count < 1:
                raise ValueError(f"{name} is a whole number, at least 1: got {shown(count)}")
        if not isinstance(self.first_frame_sink, (bool, type(None))):
            raise ValueError(
                f"first_frame_sink is True, False or None: got {shown(self.first_frame_sink)}"
            )


@dataclass(frozen=True)
class Warmup:
    """What stays dense in a sparse run: its first steps, and the first layers of all steps.

    Static and hashable, as `SparsityConfig` is.

    Attributes:
        steps: Share of the sampling steps, from the first on, that stay dense, from 0 to 1; if
            above 0, at least one step.
        layers: Share of the layers, from the first on, that stay dense in every step, from 0 to 1.
    """

    steps: float | int = 0.2
    layers: float | int = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "layers"):
            _check_share(f"warmup.{name}", getattr(self, name))


class Preset(NamedTuple):
    """How sparse a run is, and what of it stays dense: the arguments of a pipeline's call.

    Attributes:
        sparsity: Settings of sparse attention.
        warmup: Its dense warm-up.
    """

    sparsity: SparsityConfig
    warmup: Warmup


def _check_share(name: str, share: Any, *, above_zero: bool = False) -> None:
    least = "over 0, to" if above_zero else "from 0 to"
    if not is_number(share):
        raise ValueError(f"{name} is a number {least} 1: got {shown(share)}")
    if not 0 <= share <= 1 or (above_zero and share == 0):
        raise ValueError(f"{name} is a share {least} 1: got {shown(share)}")


def share_of(share: float | int, count: int) -> int:
    """Count the first `share` of `count` things, rounded down as the official code does.

    The small term keeps .3·10 = 2.999… from losing a step that the user asked for.
    """
    return math.floor(share * count + 1e-9)


def dense_step_count(warmup: Warmup, num_inference_steps: int) -> int:
    """Count the steps that run dense before the first sparse one (the paper's warm-up).

    A warm-up that is asked for is at least one step: in a run of few steps the first ones, which
    settle what the video shows, would else be sparse without a word.
    """
    if warmup.steps == 0:
        return 0
    return max(share_of(warmup.steps, num_inference_steps), min(num_inference_steps, 1))


def dense_layer_count(warmup: Warmup, num_layers: int) -> int:
    """Count the layers that run dense in every step."""
    return share_of(warmup.layers, num_layers)


PAPER_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "wan-t2v-720p": Preset(SparsityConfig(density=0.30), Warmup(steps=0.20, layers=0.03)),
        "wan-i2v-720p": Preset(SparsityConfig(density=0.30), Warmup(steps=0.35, layers=0.03)),
        "wan-i2v-480p": Preset(SparsityConfig(density=0.30), Warmup(steps=0.20, layers=0.03)),
        "hunyuanvideo-720p": Preset(SparsityConfig(density=0.25), Warmup(steps=0.10, layers=0.03)),
        "hunyuanvideo-480p": Preset(SparsityConfig(density=0.20), Warmup(steps=0.04, layers=0.0)),
        "cogvideox1.5-i2v": Preset(
            SparsityConfig(density=0.25, sampled_rows=32), Warmup(steps=0.20, layers=0.025)
        ),
    }
)
"""The settings of the official scripts, by model and size."""
