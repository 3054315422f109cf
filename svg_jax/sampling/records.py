"""The records of a run: times, and the findings of sparse attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from svg_jax.attention import SparseAttentionInfo
from svg_jax.convert.files import written_atomically


@dataclass(frozen=True, eq=False)
class StepRecord:
    """Record of a denoising step.

    Attributes:
        step: Index of the step in the whole schedule.
        timestep: Timestep of the schedule.
        guidance_scale: Guidance scale; 1 where the step was not guided.
        seconds: Wall time. The first step of a kind may have compiled its executable.
        first_of_kind: Whether the step was the first of its kind (dense or sparse, guided or not).
        profile: Findings of sparse attention, as numpy's arrays; None in a dense step.
    """

    step: int
    timestep: int | float
    guidance_scale: float
    seconds: float
    first_of_kind: bool
    profile: SparseAttentionInfo | None


@dataclass(frozen=True, eq=False)
class SamplingInfo:
    """Records of a run.

    Attributes:
        steps: Records of all steps, in order.
        seed: Seed of the run; None before the run is decoded.
    """

    steps: tuple[StepRecord, ...]
    seed: int | None = None

    def __repr__(self) -> str:
        sparse = f"{len(self.profiles)} sparse at density {self.density:.3g}"
        return f"SamplingInfo({len(self.steps)} steps, {sparse}, seed {self.seed})"

    @property
    def profiles(self) -> tuple[SparseAttentionInfo, ...]:
        """Findings of the sparse steps."""
        return tuple(step.profile for step in self.steps if step.profile is not None)

    @property
    def density(self) -> float:
        """Computed share of the attention maps, mean over sparse steps and layers; 1 if none."""
        return float(np.mean([profile.density for profile in self.profiles] or [1.0]))

    @property
    def spatial_share(self) -> Float[np.ndarray, " layers"] | None:
        """Share of heads that were spatial, per layer, over all sparse steps; None if none."""
        if not self.profiles:
            return None
        return 1 - np.mean([profile.labels.mean(axis=(1, 2)) for profile in self.profiles], axis=0)

    def save(self, path: str | Path) -> None:
        """Write the findings of the sparse steps as .npz.

        Arrays: `steps` and `timesteps` [n], `labels` bool [n, layers, entries, heads] (True =
        temporal), `errors` [n, layers, entries, heads, 2] and `density` [n, layers]. Where only
        some of these steps were guided, entries of the negative prompt have errors NaN and labels
        False in the others.

        Raises:
            ValueError: If no step was sparse.
            OSError: If the file cannot be written.
        """
        if not self.profiles:
            raise ValueError("no step was sparse: there are no labels to write")
        sparse = [step for step in self.steps if step.profile is not None]
        entries = max(profile.labels.shape[1] for profile in self.profiles)
        arrays: dict[str, Any] = {
            "steps": np.array([step.step for step in sparse]),
            "timesteps": np.array([step.timestep for step in sparse]),
            "labels": np.stack([_widen(p.labels, entries, False) for p in self.profiles]),
            "errors": np.stack([_widen(p.errors, entries, np.nan) for p in self.profiles]),
            "density": np.stack([profile.density for profile in self.profiles]),
        }
        with written_atomically(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)


@dataclass(frozen=True, eq=False)
class VideoOutput:
    """Outcome of a pipeline's call.

    Attributes:
        frames: Pixels, float32 in 0…1 or uint8; None where latents were asked for, or where the
            checkpoint was converted without its VAE.
        latents: Latents, float32 in the transformer's order, without padding frames.
        info: Records of the run.
    """

    frames: (
        Float[np.ndarray, "batch frames height width 3"]
        | UInt8[np.ndarray, "batch frames height width 3"]
        | None
    )
    latents: Float[np.ndarray, "batch _ _ latent_height latent_width"]
    info: SamplingInfo

    def __repr__(self) -> str:
        frames = None if self.frames is None else f"{self.frames.dtype}{list(self.frames.shape)}"
        latents = f"{self.latents.dtype}{list(self.latents.shape)}"
        return f"VideoOutput(frames={frames}, latents={latents}, info={self.info!r})"


def _widen(array: Array | np.ndarray, entries: int, fill: float | bool) -> np.ndarray:
    missing = entries - array.shape[1]
    pad = [(0, 0), (missing, 0)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, pad, constant_values=fill)


def median_seconds(steps: Sequence[StepRecord]) -> float:
    """Compute the median wall time of the steps that did not compile; of all if all may have."""
    seconds = [step.seconds for step in steps if not step.first_of_kind]
    return float(np.median(seconds or [step.seconds for step in steps]))
