"""The two samplers of flow matching, Euler and UniPC, as tables made in float64 on the host.

HunyuanVideo is sampled with Euler, Wan with UniPC (arXiv 2302.04867), both along the straight path
x = (1 − σ)·clean + σ·noise, whose velocity is noise − clean. Same arithmetic as diffusers'
FlowMatchEulerDiscreteScheduler, given HunyuanVideo's sigmas, and UniPCMultistepScheduler with
flow_prediction (0.42.1).
"""

import numpy as np

from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.steps import StepCoefficients


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def euler_steps(config: SchedulerConfig, num_steps: int) -> StepCoefficients:
    """Make the table of Euler's steps from σ = 1 to 0, evenly spaced before the shift."""
    spaced = np.linspace(1.0, 0.0, num_steps + 1)[:-1].astype(np.float32)
    sigmas = _shifted(spaced, config.shift)  # in float32, as released
    following = np.append(sigmas[1:], np.float32(0)).astype(np.float64)
    exact = sigmas.astype(np.float64)
    zeros = np.zeros(num_steps)
    return StepCoefficients(
        timestep=sigmas * np.float32(config.num_train_timesteps),
        alpha=None,
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


def unipc_steps(config: SchedulerConfig, num_steps: int) -> StepCoefficients:
    """Make the table of UniPC of second order with B(h) = e^h − 1.

    All steps but the first are corrected; the first and the last are of first order.
    """
    total = config.num_train_timesteps
    spaced = _shifted(np.linspace(1.0, 1 / total, num_steps + 1)[:-1], config.shift)
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
                np.trunc(total * spaced[step]),
                *(sigma[step], keep, last, now, earlier, earliest),
                *(sigma[step + 1] / sigma[step], gain * (1 - ratio), gain * ratio),
            )
        )
    timestep, *others = np.array(rows).T
    return StepCoefficients(timestep, None, *others)
