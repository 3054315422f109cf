"""The schedule of a run: a table of numbers, made once on the host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from svg_jax.convert.formats.values import shown
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.diffusion import ddim_steps, dpm_steps
from svg_jax.sampling.schedules.flow import euler_steps, unipc_steps
from svg_jax.sampling.schedules.steps import StepCoefficients
from svg_jax.sampling.settings import SettingError
from svg_jax.sampling.settings.run import SamplerName

_STEPS: Mapping[str, Callable[[SchedulerConfig, int], StepCoefficients]] = {
    "ddim": ddim_steps,
    "dpm": dpm_steps,
    "euler": euler_steps,
    "unipc": unipc_steps,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Schedule:
    """All steps of a run, noise first.

    Attributes:
        sampler: Name of the sampler that the numbers are for.
        coefficients: Float64 arrays [num_steps]; timesteps are int64 (diffusion) or float32 (flow
            matching; whole numbers with UniPC).
    """

    sampler: SamplerName = field(metadata={"static": True})
    coefficients: StepCoefficients

    @property
    def timesteps(self) -> np.ndarray:
        """Timesteps [num_steps], falling."""
        return self.coefficients.timestep

    @property
    def draws_noise(self) -> bool:
        """Whether every step adds noise of its own."""
        return self.coefficients.noise is not None

    @property
    def num_steps(self) -> int:
        """Number of steps, each one call of the model (two under guidance)."""
        return len(self.timesteps)

    def step(self, index: int) -> StepCoefficients:
        """Take the numbers of a step as float32 scalars for jit; whole timesteps as int32."""
        timestep, *others = self.coefficients
        kind = np.int32 if timestep.dtype.kind == "i" else np.float32
        values = (None if column is None else np.float32(column[index]) for column in others)
        return StepCoefficients(kind(timestep[index]), *values)


def make_schedule(
    config: SchedulerConfig, num_steps: int, sampler: SamplerName | None = None
) -> Schedule:
    """Make the schedule of a checkpoint.

    Args:
        config: Content of scheduler_config.json.
        num_steps: Number of steps.
        sampler: Name of a sampler in place of the checkpoint's own.

    Raises:
        SettingError: At a sampler that the checkpoint is not made for, and at a number of steps
            that is out of range or makes no finite schedule.
    """
    sampler = sampler or config.sampler
    if sampler not in config.samplers:
        names = " or ".join(map(repr, config.samplers))
        raise SettingError("scheduler", f"is {names}: got {sampler!r}")
    total = config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise SettingError("num_inference_steps", f"must be 1 to {total}: got {shown(num_steps)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        coefficients = _STEPS[sampler](config, num_steps)
    columns = [np.float32(column) for column in coefficients if column is not None]
    if not all(np.isfinite(column).all() for column in columns):  # steps that lie too close
        raise SettingError(
            "num_inference_steps",
            f"of {num_steps} makes no finite steps with this scheduler and its shift: take fewer",
        )
    return Schedule(sampler, coefficients)
