"""CogVideoX's two samplers, DDIM and SDE-DPM-Solver++(2M), as tables made in float64 on the host.

Same arithmetic as diffusers' CogVideoXDDIMScheduler and CogVideoXDPMScheduler (0.42.1), and the
same quirk: a step from `t` leads to `t - 1000 // steps`, whether or not that is the next entry.
"""

import numpy as np

from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.steps import StepCoefficients


def alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
    """Compute ᾱ of every training timestep, float64 [num_train_timesteps].

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
    """Space timesteps "trailing"; also those that their steps lead to (negative: clean)."""
    total = config.num_train_timesteps
    # numpy's arange returns an entry too many where total / num_steps rounds down (61 steps, say).
    timesteps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps].astype(np.int64) - 1
    return timesteps, timesteps - total // num_steps


def _alphas_of_steps(
    config: SchedulerConfig, timesteps: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    table = alphas_cumprod(config)
    final = 1.0 if config.set_alpha_to_one else table[0]
    return table[timesteps], np.where(targets >= 0, table[targets], final)


def ddim_steps(config: SchedulerConfig, num_steps: int) -> StepCoefficients:
    """Make the table of deterministic DDIM (arXiv 2010.02502, η = 0)."""
    timesteps, targets = _timesteps(config, num_steps)
    alpha, target_alpha = _alphas_of_steps(config, timesteps, targets)
    scale = np.sqrt((1 - target_alpha) / (1 - alpha))
    return StepCoefficients(
        timestep=timesteps,
        alpha=np.sqrt(alpha),
        sigma=np.sqrt(1 - alpha),
        next_latents=scale,
        next_now=np.sqrt(target_alpha) - np.sqrt(alpha) * scale,
    )


def dpm_steps(config: SchedulerConfig, num_steps: int) -> StepCoefficients:
    """Make the table of SDE-DPM-Solver++(2M) (arXiv 2211.01095).

    The first step, and a last one that ends at the clean video, are of first order.
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
    return StepCoefficients(
        timestep=timesteps,
        alpha=np.sqrt(alpha),
        sigma=np.sqrt(1 - alpha),
        next_latents=np.sqrt((1 - target_alpha) / (1 - alpha)) * np.exp(-width),
        next_now=denoised * (1 + extrapolation),
        next_earlier=-denoised * extrapolation,
        noise=np.sqrt(1 - target_alpha) * np.sqrt(-np.expm1(-2 * width)),
    )
