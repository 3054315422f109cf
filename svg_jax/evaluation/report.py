"""What a comparison of dense and sparse attention found, as data and as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from svg_jax.convert.files import written_atomically


@dataclass(frozen=True)
class ComparisonReport:
    """Dense and sparse attention from the same noise, over the same schedule.

    Attributes:
        prompt: Prompt of both videos.
        seed: Seed of the noise.
        pattern: "svg" (online profiling), or the labels that all heads were given.
        num_inference_steps: Denoising steps of the run.
        dense_steps: Steps of the warm-up, which both runs share.
        guided_steps: Steps that paid for guidance.
        requested_density: What was asked for; None of an attention of one's own.
        density: Computed share of the attention maps in sparse steps, exact; None if not known.
        latents: Shape of the latents, in the transformer's order.
        num_tokens: Length of the sequence that attention runs over, text included.
        psnr: PSNR of the sparse video against the dense one, dB; None where there are no pixels.
        ssim: SSIM of the sparse video against the dense one; None, too, where frames are too small
            for it.
        dense_seconds: Median wall time of a dense step after the warm-up.
        sparse_seconds: Median wall time of a sparse step.
        spatial_share: Share of spatial heads, by layer.
        implementation: Kernel of block-sparse attention that ran.
        dtype: Dtype of matrix products and attention.
        device: Device that it ran on.
        versions: Versions of the packages that it ran with.
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
        """How many times faster a sparse step is than a dense one."""
        return self.dense_seconds / self.sparse_seconds

    def to_json(self) -> str:
        """All attributes and the speed-up; an infinite PSNR (equal videos) is null."""
        values = dataclasses.asdict(self) | {"speed_up": self.speed_up}
        if values["psnr"] == float("inf"):
            values["psnr"] = None
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `to_json`, whole or not at all."""
        with written_atomically(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
