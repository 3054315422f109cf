"""Figures of a comparison of dense and sparse attention, as data and as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_jax.convert.files import written_atomically


@dataclass(frozen=True)
class ComparisonReport:
    """Figures of two videos, with dense and sparse attention, of the same noise and schedule.

    Attributes:
        prompt: Prompt of both videos.
        seed: Seed of the noise.
        pattern: Labels of the heads: "svg" for online profiling, or the same label for all.
        num_inference_steps: Number of denoising steps of each run.
        dense_steps: Number of steps of the warm-up, which both runs share.
        guided_steps: Number of steps with guidance.
        requested_density: Density of the settings; None for a custom `attend`.
        density: Exact share of the attention maps that sparse steps computed; None if not known.
        latents: Shape of the latents, in the transformer's order.
        num_tokens: Number of tokens in the attention, text included.
        psnr: PSNR of the sparse video against the dense one, dB; None without frames.
        ssim: SSIM of the sparse video against the dense one; None without frames, or if they are
            smaller than its window.
        dense_seconds: Median wall time of a dense step after the warm-up, s.
        sparse_seconds: Median wall time of a sparse step, s.
        spatial_share: Share of spatial heads, by layer.
        implementation: Name of the kernel of block-sparse attention.
        dtype: Dtype of matrix products and attention.
        device: Name of the device.
        versions: Versions of the packages, by name.
    """

    prompt: str
    seed: int
    pattern: str
    num_inference_steps: int
    dense_steps: int
    guided_steps: int
    requested_density: float | None
    density: float | None
    latents: tuple[int, int, int, int]
    num_tokens: int
    psnr: float | None
    ssim: float | None
    dense_seconds: float
    sparse_seconds: float
    spatial_share: tuple[float, ...]
    implementation: str
    dtype: str
    device: str
    versions: dict[str, str]

    @property
    def speed_up(self) -> float:
        """Ratio of the time of a dense step to that of a sparse one."""
        return self.dense_seconds / self.sparse_seconds

    def values(self) -> dict[str, Any]:
        """Collect all attributes and the speed-up for JSON; an infinite PSNR becomes None."""
        values = dataclasses.asdict(self) | {"speed_up": self.speed_up}
        if values["psnr"] == float("inf"):  # of equal videos
            values["psnr"] = None
        return values

    def save(self, path: str | Path) -> None:
        """Write the values to a file as JSON, whole or not at all."""
        text = json.dumps(self.values(), indent=2, allow_nan=False) + "\n"
        with written_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
