"""All that the steps of a run need, as one pytree."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from svg_jax.models import VideoLayout
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.schedules.noise import seed_of, step_noise
from svg_jax.sampling.schedules.steps import SamplerState
from svg_jax.sampling.schedules.tables import Schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class PreparedRun:
    """What `prepare` makes of a run's settings, and what the loop carries on; a pytree.

    Runs of one shape and guidance can be stacked, leaf by leaf, and given to `jax.vmap`.

    Attributes:
        schedule: All steps.
        state: Initial noise, or where the run stands.
        conditions: Encoded prompts and image.
        scales: Static: guidance scale of every step; 1 means that the step is not guided.
        key: PRNG key of the rows that profiling samples; tells the seed, too.
        layout: Static: where video and text stand in the transformer's sequence.
        padding_frames: Static: leading latent frames that are dropped at the end (CogVideoX-1.5).
        sampler_noise: What DPM adds, [steps, *shape of the latents], in place of the seed's.
    """

    schedule: Schedule
    state: SamplerState
    conditions: Conditions
    scales: tuple[float, ...] = field(metadata={"static": True})
    key: Any
    layout: VideoLayout = field(metadata={"static": True})
    padding_frames: int = field(default=0, metadata={"static": True})
    sampler_noise: Any = None

    @cached_property
    def seed(self) -> int:
        """Seed of all random numbers after the initial noise.

        Kept, since reading a key waits for what the device is at: for a step, within the loop.
        """
        return seed_of(self.key)

    def with_sampler_noise(self) -> "PreparedRun":
        """Draw what its sampler adds in every step, if it adds any and has none yet."""
        if not self.schedule.draws_noise or self.sampler_noise is not None:
            return self
        steps, shape = range(self.schedule.num_steps), self.state.latents.shape
        noise = np.stack([step_noise(self.seed, step, shape) for step in steps])
        return dataclasses.replace(self, sampler_noise=noise)
