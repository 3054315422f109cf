"""CogVideoX's two samplers, DDIM and SDE-DPM-Solver++(2M), as tables and pure functions.

A schedule is a table of numbers, made once on the host in float64. A step is a pure function,
linear in its inputs with the coefficients of that table, which enter a jitted step as traced
scalars: neither the number of steps nor the position in the run is ever compiled in. What a step
leaves for the next one is explicit state, and its noise is an argument.

Same arithmetic as diffusers' CogVideoXDDIMScheduler and CogVideoXDPMScheduler (0.42.1), and the
same quirk: a step from `t` leads to `t - 1000 // steps`, whether or not that is the next entry.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.convert.formats.values import shown
from svg_jax.convert.scheduler_config import COGVIDEOX, check_scheduler, field_problem
from svg_jax.sampling.settings import SettingError

Sampler = Literal["ddim", "dpm"]
SAMPLER_OF_CLASS: dict[str, Sampler] = {
    "CogVideoXDDIMScheduler": "ddim",
    "CogVideoXDPMScheduler": "dpm",
}


@dataclass(frozen=True)
class SchedulerConfig:
    """What scheduler_config.json says; field names are diffusers'.

    Attributes:
        sampler: The checkpoint's own sampler; every CogVideoX can be sampled with either.
        num_train_timesteps: Length of the training schedule.
        beta_start: First beta of the "scaled_linear" schedule.
        beta_end: Last beta.
        snr_shift_scale: Divides the signal-to-noise ratio: 3 for CogVideoX-2b, 1 for the others.
        rescale_betas_zero_snr: Whether the last timestep is pure noise.
        set_alpha_to_one: Whether a step past timestep 0 ends at the clean video (else at ᾱ_0).
    """

    sampler: Sampler = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 3.0
    rescale_betas_zero_snr: bool = True
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            problem = field_problem(field.name, getattr(self, field.name))
            if problem is not None:
                raise ValueError(f"{field.name} {problem}")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "SchedulerConfig":
        """Read the dict of scheduler_config.json.

        Raises:
            ValueError: At values without meaning, and what is not implemented; says all of it.
        """
        found = check_scheduler(entries, COGVIDEOX)
        found.check()
        assert found.class_name is not None
        known = {field.name: found.values[field.name] for field in dataclasses.fields(cls)[1:]}
        for name in ("beta_start", "beta_end", "snr_shift_scale"):
            known[name] = float(known[name])
        return cls(sampler=SAMPLER_OF_CLASS[found.class_name], **known)


class StepCoefficients(NamedTuple):
    """The numbers of a step, or of all steps stacked.

    With velocity v, the clean video is estimated as x0 = alpha·x - sigma·v, and the step goes to
    latents·x + denoised·x0 + previous_denoised·x0_of_the_step_before + noise·ε.
    """

    timestep: Any
    alpha: Any
    sigma: Any
    latents: Any
    denoised: Any
    previous_denoised: Any
    noise: Any


@dataclass(frozen=True, eq=False)
class Schedule:
    """All steps of a run, noise first.

    Attributes:
        sampler: Which step function the coefficients are for.
        coefficients: Float64 arrays [num_steps]; timesteps are int64.
    """

    sampler: Sampler
    coefficients: StepCoefficients

    @property
    def timesteps(self) -> np.ndarray:
        """The timesteps, int64 [num_steps], falling."""
        return self.coefficients.timestep

    @property
    def draws_noise(self) -> bool:
        """Whether every step adds noise of its own."""
        return self.sampler == "dpm"

    @property
    def num_steps(self) -> int:
        """Number of steps, each one call of the model (two under guidance)."""
        return len(self.timesteps)

    def step(self, index: int) -> StepCoefficients:
        """The coefficients of one step as float32 scalars (the timestep int32), ready for jit."""
        timestep, *others = (column[index] for column in self.coefficients)
        return StepCoefficients(np.int32(timestep), *(np.float32(value) for value in others))


class SamplerState(NamedTuple):
    """What one step hands to the next.

    Attributes:
        latents: Float32 [batch, frames, channels, height, width].
        denoised: DPM's estimate of the clean latents at the step before, same shape; DDIM has None.
    """

    latents: Any
    denoised: Any


def alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
    """ᾱ of every training timestep, float64 [num_train_timesteps].

    The SNR shift comes before the rescaling to zero terminal SNR (arXiv 2305.08891, algorithm 1).
    """
    betas = (
        np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    )
    alphas = np.cumprod(1 - betas)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return alphas


def _timesteps(config: SchedulerConfig, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps with "trailing" spacing, and those that their steps lead to (negative: clean)."""
    total = config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise SettingError("num_inference_steps", f"must be 1 to {total}: got {shown(num_steps)}")
    # numpy's arange returns an entry too many where total / num_steps rounds down (61 steps, say).
    timesteps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps].astype(np.int64) - 1
    return timesteps, timesteps - total // num_steps


def _alphas_of_steps(
    config: SchedulerConfig, timesteps: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    table = alphas_cumprod(config)
    final = 1.0 if config.set_alpha_to_one else table[0]
    return table[timesteps], np.where(targets >= 0, table[targets], final)


def ddim_schedule(config: SchedulerConfig, num_steps: int) -> Schedule:
    """Deterministic DDIM (arXiv 2010.02502, η = 0).

    Raises:
        ValueError: Unless 1 ≤ num_steps ≤ num_train_timesteps.
    """
    timesteps, targets = _timesteps(config, num_steps)
    alpha, target_alpha = _alphas_of_steps(config, timesteps, targets)
    scale = np.sqrt((1 - target_alpha) / (1 - alpha))
    zeros = np.zeros(num_steps)
    return Schedule(
        "ddim",
        StepCoefficients(
            timestep=timesteps,
            alpha=np.sqrt(alpha),
            sigma=np.sqrt(1 - alpha),
            latents=scale,
            denoised=np.sqrt(target_alpha) - np.sqrt(alpha) * scale,
            previous_denoised=zeros,
            noise=zeros,
        ),
    )


def dpm_schedule(config: SchedulerConfig, num_steps: int) -> Schedule:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), first order in the first step and in a last one.

    Raises:
        ValueError: Unless 1 ≤ num_steps ≤ num_train_timesteps.
    """
    timesteps, targets = _timesteps(config, num_steps)
    alpha, target_alpha = _alphas_of_steps(config, timesteps, targets)
    # ᾱ = 0 at the start and ᾱ = 1 at the end put λ at ∓∞, where every coefficient has its limit.
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = np.log(np.sqrt(alpha / (1 - alpha)))
        width = np.log(np.sqrt(target_alpha / (1 - target_alpha))) - log_snr
        last_width = log_snr - np.concatenate([[np.nan], log_snr[:-1]])
        extrapolation = width / (2 * last_width)
    denoised = -np.expm1(-2 * width) * np.sqrt(target_alpha)
    first_order = (np.arange(num_steps) == 0) | (targets < 0)
    extrapolation = np.where(first_order, 0.0, extrapolation)
    return Schedule(
        "dpm",
        StepCoefficients(
            timestep=timesteps,
            alpha=np.sqrt(alpha),
            sigma=np.sqrt(1 - alpha),
            latents=np.sqrt((1 - target_alpha) / (1 - alpha)) * np.exp(-width),
            denoised=denoised * (1 + extrapolation),
            previous_denoised=-denoised * extrapolation,
            noise=np.sqrt(1 - target_alpha) * np.sqrt(-np.expm1(-2 * width)),
        ),
    )


def make_schedule(
    config: SchedulerConfig, num_steps: int, sampler: Sampler | None = None
) -> Schedule:
    """The schedule of `sampler`, by default the checkpoint's own.

    Raises:
        SettingError: At another sampler or number of steps, or one that makes no finite schedule.
    """
    make = {"ddim": ddim_schedule, "dpm": dpm_schedule}.get(sampler or config.sampler)
    if make is None:
        raise SettingError("scheduler", f"is 'ddim' or 'dpm': got {sampler!r}")
    with np.errstate(divide="ignore", invalid="ignore"):
        schedule = make(config, num_steps)
    check_finite_steps(schedule.coefficients, num_steps)
    return schedule


def check_finite_steps(coefficients: tuple[Any, ...], num_steps: int) -> None:
    """SettingError if a step's numbers are not finite, as those of steps that lie too close are."""
    if not all(np.isfinite(np.float32(column)).all() for column in coefficients):
        raise SettingError(
            "num_inference_steps",
            f"of {num_steps} makes no finite steps with this scheduler and its shift: take fewer",
        )


def initial_state(sampler: Sampler, latents: Float[Array, "*shape"]) -> SamplerState:
    """The state before the first step, from initial noise."""
    return SamplerState(latents, None if sampler == "ddim" else jnp.zeros_like(latents))


def ddim_step(
    state: SamplerState, velocity: Float[Array, "*shape"], coefficients: StepCoefficients
) -> SamplerState:
    """One DDIM step. Latents and velocity are float32 and of one shape."""
    c = coefficients
    denoised = c.alpha * state.latents - c.sigma * velocity
    return SamplerState(c.latents * state.latents + c.denoised * denoised, None)


def dpm_step(
    state: SamplerState,
    velocity: Float[Array, "*shape"],
    coefficients: StepCoefficients,
    noise: Float[Array, "*shape"],
) -> SamplerState:
    """One step of SDE-DPM-Solver++(2M) with the given standard normal noise."""
    c = coefficients
    denoised = c.alpha * state.latents - c.sigma * velocity
    latents = (
        c.latents * state.latents
        + c.denoised * denoised
        + c.previous_denoised * state.denoised
        + c.noise * noise
    )
    return SamplerState(latents, denoised)


def initial_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise, drawn on the host: `Generator(Philox(seed))`, in C order.

    The same seed gives the same noise on every device, and the first video of a batch does not
    depend on how many others there are.
    """
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


def step_noise(seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """DPM's noise of a step, from a stream of its own, so that a run can start at any step."""
    stream = np.random.SeedSequence(seed, spawn_key=(step,))
    return np.random.Generator(np.random.Philox(stream)).standard_normal(shape, dtype=np.float32)


def image_noise_of(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise that an image's latents are drawn with, from a stream of its own."""
    stream = np.random.SeedSequence(seed, spawn_key=(0, 0))  # the steps' keys are of one number
    return np.random.Generator(np.random.Philox(stream)).standard_normal(shape, dtype=np.float32)


def step_key(seed: int, step: int) -> jax.Array:
    """The PRNG key of a step, from which the sampled query rows are drawn.

    Made of both halves of a seed of up to 64 bits, by one algorithm: neither jax_enable_x64 nor
    jax_default_prng_impl changes what a seed gives.
    """
    halves = np.array([seed >> 32, seed], dtype=object) & 0xFFFFFFFF
    key = jax.random.wrap_key_data(jnp.asarray(halves.astype(np.uint32)), impl="threefry2x32")
    return jax.random.fold_in(key, step)
