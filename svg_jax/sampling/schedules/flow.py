"""The two samplers of flow matching, Euler and UniPC, as tables and pure functions.

As in `svg_jax.sampling.schedules.diffusion`: a schedule is a table of numbers made once on the
host, and a step is a pure function, linear in latents, velocity and what earlier steps left, with
that table's numbers as traced scalars.

HunyuanVideo is sampled with Euler, Wan with UniPC (arXiv 2302.04867), both along the straight path
x = (1 − σ)·clean + σ·noise, whose velocity is noise − clean. Same arithmetic as diffusers'
FlowMatchEulerDiscreteScheduler, given HunyuanVideo's sigmas, and UniPCMultistepScheduler with
flow_prediction (0.42.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.convert.formats.values import Number, shown
from svg_jax.convert.scheduler_config import FLOW, check_scheduler
from svg_jax.sampling.schedules.diffusion import check_finite_steps
from svg_jax.sampling.settings import SettingError

FlowSampler = Literal["euler", "unipc"]
NUM_TRAIN_TIMESTEPS = 1000
_SHIFTS = Number(0.01, 1000)

_CLASSES: dict[str, tuple[FlowSampler, str]] = {
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift"),
    "UniPCMultistepScheduler": ("unipc", "flow_shift"),
}


@dataclass(frozen=True)
class FlowConfig:
    """What scheduler_config.json says of a flow-matching model.

    Attributes:
        sampler: The checkpoint's own sampler.
        shift: Moves the steps towards noise: σ → shift·σ / (1 + (shift − 1)·σ). 7 for HunyuanVideo;
            5 for Wan at 720p, 3 at 480p.
    """

    sampler: FlowSampler
    shift: float = 1.0

    def __post_init__(self) -> None:
        problem = _SHIFTS.problem(self.shift)
        if problem is not None:
            raise SettingError("shift", problem)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "FlowConfig":
        """Read the dict of scheduler_config.json.

        Raises:
            ValueError: At values without meaning, and what is not implemented; says all of it.
        """
        found = check_scheduler(entries, FLOW)
        found.check()
        assert found.class_name is not None
        sampler, shift = _CLASSES[found.class_name]
        return cls(sampler=sampler, shift=float(found.values[shift]))


class FlowCoefficients(NamedTuple):
    """The numbers of a step, or of all steps stacked.

    With velocity v the clean video is estimated as x0 = x − sigma·v. What came in is corrected to
    keep·x + last·x_before + now·x0 + earlier·x0_before + earliest·x0_before_that, where x_before is
    a corrected one, too. From there the step goes to next_latents·x + next_now·x0 +
    next_earlier·x0_before.
    """

    timestep: Any
    sigma: Any
    keep: Any
    last: Any
    now: Any
    earlier: Any
    earliest: Any
    next_latents: Any
    next_now: Any
    next_earlier: Any


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """All steps of a run, noise first.

    Attributes:
        coefficients: Arrays [num_steps], float64; the timesteps are what the model is told, float32
            of whole numbers (UniPC) or not (Euler).
    """

    coefficients: FlowCoefficients

    @property
    def timesteps(self) -> np.ndarray:
        """The timesteps, float32 [num_steps], falling from 1000."""
        return self.coefficients.timestep

    @property
    def draws_noise(self) -> bool:
        """Whether every step adds noise of its own: neither of these samplers does."""
        return False

    @property
    def num_steps(self) -> int:
        """Number of steps, each one call of the model (two under guidance)."""
        return len(self.timesteps)

    def step(self, index: int) -> FlowCoefficients:
        """The coefficients of one step as float32 scalars, ready for jit."""
        return FlowCoefficients(*(np.float32(column[index]) for column in self.coefficients))


class FlowState(NamedTuple):
    """What one step hands to the next: float32 arrays of one shape.

    Attributes:
        latents: Where the run stands.
        last: The latents before, as corrected (UniPC).
        denoised: The estimates of the clean latents at the step before and at the one before that
            (UniPC).
    """

    latents: Any
    last: Any
    denoised: tuple[Any, Any]


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _check_steps(num_steps: int) -> None:
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise SettingError(
            "num_inference_steps", f"must be 1 to {NUM_TRAIN_TIMESTEPS}: got {shown(num_steps)}"
        )


def euler_schedule(shift: float, num_steps: int) -> FlowSchedule:
    """Euler's steps from σ = 1 to 0, evenly spaced before the shift.

    Raises:
        ValueError: Unless 1 ≤ num_steps ≤ 1000.
    """
    _check_steps(num_steps)
    spaced = np.linspace(1.0, 0.0, num_steps + 1)[:-1].astype(np.float32)
    sigmas = _shifted(spaced, shift)  # in float32, as released
    following = np.append(sigmas[1:], np.float32(0)).astype(np.float64)
    exact = sigmas.astype(np.float64)
    zeros = np.zeros(num_steps)
    return FlowSchedule(
        FlowCoefficients(
            timestep=sigmas * np.float32(NUM_TRAIN_TIMESTEPS),
            sigma=exact,
            keep=zeros + 1,
            last=zeros,
            now=zeros,
            earlier=zeros,
            earliest=zeros,
            # x + (σ' − σ)·v, in terms of the estimate x0 = x − σ·v.
            next_latents=following / exact,
            next_now=1 - following / exact,
            next_earlier=zeros,
        )
    )


def unipc_schedule(shift: float, num_steps: int) -> FlowSchedule:
    """UniPC of second order with B(h) = e^h − 1, corrected in all steps but the first.

    The first step and the last are of first order.

    Raises:
        ValueError: Unless 1 ≤ num_steps ≤ 1000.
    """
    _check_steps(num_steps)
    spaced = _shifted(np.linspace(1.0, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1], shift)
    if abs(spaced[0] - 1) < 1e-6:
        spaced[0] -= 1e-6  # or log(1 − σ) would be −∞
    sigmas = np.append(spaced, 0.0).astype(np.float32)
    with np.errstate(divide="ignore"):
        # In float32, as released: 1 − .999999 is not what it is in float64.
        log_snr = (np.log(1 - sigmas) - np.log(sigmas)).astype(np.float64)
    alpha, sigma = (1 - sigmas).astype(np.float64), sigmas.astype(np.float64)
    orders = [min(2, num_steps - step, step + 1) for step in range(num_steps)]
    rows = []
    for step in range(num_steps):
        keep, last, now, earlier, earliest = 1.0, 0.0, 0.0, 0.0, 0.0
        if step > 0:
            width = log_snr[step] - log_snr[step - 1]
            gain = np.expm1(-width)
            ratio, share = 0.0, 0.5
            if orders[step - 1] == 2:
                spread = (log_snr[step - 2] - log_snr[step - 1]) / width
                first = gain / -width - 1
                second = first / -width - 0.5
                ratio, share = np.linalg.solve(
                    [[1.0, 1.0], [spread, 1.0]], [first / gain, 2 * second / gain]
                )
                ratio /= spread
            keep, last = 0.0, sigma[step] / sigma[step - 1]
            now = -alpha[step] * gain * share
            earlier = -alpha[step] * gain * (1 - ratio - share)
            earliest = -alpha[step] * gain * ratio
        width = log_snr[step + 1] - log_snr[step]
        gain = -alpha[step + 1] * np.expm1(-width)
        ratio = 0.0
        if orders[step] == 2:
            ratio = 0.5 * width / (log_snr[step - 1] - log_snr[step])
        rows.append(
            (
                np.trunc(NUM_TRAIN_TIMESTEPS * spaced[step]),
                *(sigma[step], keep, last, now, earlier, earliest),
                *(sigma[step + 1] / sigma[step], gain * (1 - ratio), gain * ratio),
            )
        )
    return FlowSchedule(FlowCoefficients(*np.array(rows).T))


def make_flow_schedule(
    config: FlowConfig,
    num_steps: int,
    *,
    sampler: str | None = None,
    shift: float | None = None,
) -> FlowSchedule:
    """The schedule of a checkpoint, or with another sampler or shift than its own."""
    make = {"euler": euler_schedule, "unipc": unipc_schedule}.get(sampler or config.sampler)
    if make is None:
        raise SettingError("scheduler", f"is 'euler' or 'unipc': got {sampler!r}")
    with np.errstate(divide="ignore", invalid="ignore"):
        schedule = make(config.shift if shift is None else shift, num_steps)
    check_finite_steps(schedule.coefficients, num_steps)
    return schedule


def initial_flow_state(latents: Float[Array, "*shape"]) -> FlowState:
    """The state before the first step, from initial noise."""
    zeros = jnp.zeros_like(latents)
    return FlowState(latents, zeros, (zeros, zeros))


def flow_step(
    state: FlowState, velocity: Float[Array, "*shape"], coefficients: FlowCoefficients
) -> FlowState:
    """One step of either sampler. Latents and velocity are float32 and of one shape."""
    c = coefficients
    earlier, earliest = state.denoised
    denoised = state.latents - c.sigma * velocity
    corrected = (
        c.keep * state.latents
        + c.last * state.last
        + c.now * denoised
        + c.earlier * earlier
        + c.earliest * earliest
    )
    latents = c.next_latents * corrected + c.next_now * denoised + c.next_earlier * earlier
    return FlowState(latents, corrected, (denoised, earlier))
