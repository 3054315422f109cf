"""One step of any sampler: a pure function, linear in its inputs.

The numbers of a step enter a jitted step as traced scalars: neither the number of steps nor the
position in the run is ever compiled in. What a step leaves for the next one is explicit state, and
its noise is an argument.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from svg_jax.sampling.settings.run import SamplerName

_ESTIMATES = {"ddim": 0, "dpm": 1, "euler": 2, "unipc": 2}  # that a sampler keeps


class StepCoefficients(NamedTuple):
    """The numbers of a step, or of all steps stacked; None is a term that a sampler lacks.

    With velocity v the clean video is estimated as x0 = alpha·x − sigma·v. What came in is
    corrected to x' = keep·x + last·x'_before + now·x0 + earlier·x0_before +
    earliest·x0_before_that. From there the step goes to next_latents·x' + next_now·x0 +
    next_earlier·x0_before + noise·ε.

    Attributes:
        timestep: Timestep that the model takes.
        alpha: Factor of the latents in the estimate; None is 1.
        sigma: Factor of the velocity in the estimate.
        keep: Factor of the latents in the corrected ones; None corrects nothing.
        last: Factor of the last step's corrected latents in the corrected ones.
        now: Factor of the estimate in the corrected ones.
        earlier: Factor of the last step's estimate in the corrected ones.
        earliest: Factor of the estimate before that in the corrected ones.
        next_latents: Factor of the corrected latents in the next ones.
        next_now: Factor of the estimate in the next ones.
        next_earlier: Factor of the last step's estimate in the next ones.
        noise: Factor of standard normal noise in the next ones.
    """

    timestep: Any
    alpha: Any
    sigma: Any
    keep: Any = None
    last: Any = None
    now: Any = None
    earlier: Any = None
    earliest: Any = None
    next_latents: Any = None
    next_now: Any = None
    next_earlier: Any = None
    noise: Any = None


class SamplerState(NamedTuple):
    """State that one step hands to the next: float32 arrays of one shape.

    Attributes:
        latents: Latents after the step.
        last: Latents before the step, as corrected; None with samplers that correct nothing.
        denoised: Estimates of the clean latents, the last step's first: as many as the sampler
            needs.
    """

    latents: Any
    last: Any = None
    denoised: tuple[Any, ...] = ()


def initial_state(sampler: SamplerName, latents: Float[Array, "*shape"]) -> SamplerState:
    """Make the state before the first step.

    Args:
        sampler: Name of the sampler, on which the kept estimates depend.
        latents: Initial noise.
    """
    zeros, count = jnp.zeros_like(latents), _ESTIMATES[sampler]
    return SamplerState(latents, zeros if count == 2 else None, (zeros,) * count)


def take_step(
    state: SamplerState,
    velocity: Float[Array, "*shape"],
    coefficients: StepCoefficients,
    noise: Float[Array, "*shape"] | None = None,
) -> SamplerState:
    """Take one step of the sampler that state and coefficients are of.

    Args:
        state: State before the step.
        velocity: Prediction of the model, float32, of the latents' shape.
        coefficients: Numbers of the step as float32 scalars.
        noise: Standard normal noise for a sampler that adds some; else None.
    """
    c, latents = coefficients, state.latents
    denoised = (latents if c.alpha is None else c.alpha * latents) - c.sigma * velocity
    corrected = latents
    if c.keep is not None:
        earlier, earliest = state.denoised
        corrected = (
            c.keep * latents
            + c.last * state.last
            + c.now * denoised
            + c.earlier * earlier
            + c.earliest * earliest
        )
    after = c.next_latents * corrected + c.next_now * denoised
    if c.next_earlier is not None:
        after = after + c.next_earlier * state.denoised[0]
    if c.noise is not None:
        after = after + c.noise * noise
    kept = (denoised, *state.denoised)[: len(state.denoised)]
    return SamplerState(after, None if state.last is None else corrected, kept)
