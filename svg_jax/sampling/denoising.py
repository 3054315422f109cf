"""The denoising loop: one jitted pure step, called in order.

All that changes from step to step (coefficients, guidance scale, PRNG key, labels) enters the step
as a traced value, which leaves two executables per shape and guidance mode: dense and sparse.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from svg_jax.attention import SparseAttentionInfo, StepState, attend_dense
from svg_jax.models import Attend
from svg_jax.sampling.conditions import Conditions, predict
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import StepRecord
from svg_jax.sampling.schedules.noise import step_noise
from svg_jax.sampling.schedules.steps import SamplerState, take_step
from svg_jax.stages import COMPILING, stage


def denoise(
    transformer: nnx.Module,
    run: PreparedRun,
    *,
    steps: range | None = None,
    save: Callable[[SamplerState, StepRecord], None] | None = None,
    callback_on_step_end: Callable[[StepRecord], None] | None = None,
) -> tuple[PreparedRun, tuple[StepRecord, ...]]:
    """Run the steps of a schedule, or some of them, one after the other from the host.

    Args:
        transformer: Model that predicts velocities.
        run: Run in its state before the first of the steps.
        steps: Steps of the schedule to run; None runs all.
        save: Function that is called with the state after each step and the step's record, once
            the state is known to be finite and the next step has started.
        callback_on_step_end: Function that is called with the record of each step.

    Returns:
        The run after the last step, and a record of each.

    Raises:
        FloatingPointError: If latents are not finite after a step; names the step and layer.
    """
    schedule, state = run.schedule, run.state
    steps = range(schedule.num_steps) if steps is None else steps
    graphdef, weights = nnx.split(transformer)
    records: list[StepRecord] = []
    seen = set()
    upcoming = unsaved = None
    try:
        for step in steps:
            started = time.perf_counter()
            kind = run.kind_of(step)
            name = "dense steps" if kind[0] is attend_dense else "sparse steps"
            with stage(name, "denoising" if kind in seen else COMPILING):
                inputs = _inputs_of(run, step) if upcoming is None else upcoming
                arguments = (weights, state, *inputs)
                after, info, is_finite = denoise_step(graphdef, kind[0], *arguments)
                # The host saves the step before, and readies the next, while the device is at this
                # one.
                if save is not None and unsaved is not None:
                    save(*unsaved)
                    unsaved = None
                upcoming = _inputs_of(run, step + 1) if step + 1 in steps else None
                if not isinstance(info, SparseAttentionInfo):
                    info = None
                info, is_finite = jax.device_get((info, is_finite))
            if not is_finite:
                place = f"step {step} of {schedule.num_steps} (timestep {schedule.timesteps[step]})"
                raise FloatingPointError(_diagnose(place, graphdef, kind[0], *arguments))
            state = after
            record = StepRecord(
                step=step,
                timestep=schedule.timesteps[step].item(),
                guidance_scale=run.scales[step],
                seconds=time.perf_counter() - started,
                first_of_kind=kind not in seen,
                profile=info,
            )
            seen.add(kind)
            records.append(record)
            unsaved = state, record
            if callback_on_step_end is not None:
                callback_on_step_end(record)
    finally:
        if save is not None and unsaved is not None:
            save(*unsaved)
    return dataclasses.replace(run, state=state), tuple(records)


def _inputs_of(run: PreparedRun, step: int) -> tuple[Any, ...]:
    """Put what a step takes beside weights and state onto the device."""
    attend, guided = run.kind_of(step)
    noise = step_state = None
    if run.sampler_noise is not None:
        noise = jnp.asarray(run.sampler_noise[step], jnp.float32)
    elif run.schedule.draws_noise:
        noise = step_noise(run.seed, step, run.state.latents.shape)
    if attend is not attend_dense:
        labels = None
        if run.labels is not None:
            labels = labels_of_entries(run.labels[step], guided, len(run.state.latents))
        step_state = StepState(jax.random.fold_in(run.key, step), labels)
    scale = np.float32(run.scales[step]) if guided else None
    return jax.device_put((run.schedule.step(step), run.conditions, scale, noise, step_state))


@partial(jax.jit, static_argnames=("graphdef", "attend"))
def denoise_step(
    graphdef: Any,
    attend: Attend,
    weights: Any,
    state: SamplerState,
    coefficients: Any,
    conditions: Conditions,
    scale: Float[Array, ""] | None,
    noise: Array | None,
    step_state: Any,
) -> tuple[SamplerState, Any, Bool[Array, ""]]:
    """Compute one step of a run; compiled once per shape, `attend` and guidance mode.

    Nothing is donated: latents are small, and those before a step are needed to tell why it failed.

    Args:
        graphdef: Structure of the transformer (`nnx.split`); static.
        attend: Attention of every layer; static, so it must be the same object in every call.
        weights: Parameters of the transformer.
        state: State before the step.
        coefficients: Numbers of the step, from the schedule of `state`'s sampler.
        conditions: Inputs of the model beside latents and timestep.
        scale: Guidance scale; None runs the model on the prompt alone.
        noise: Standard normal noise of the latents' shape, for DPM; None for the other samplers.
        step_state: State for `attend`.

    Returns:
        The state after the step, the info of `attend` stacked over layers, and whether all latents
        are finite.
    """
    velocity, info = predict(
        nnx.merge(graphdef, weights),
        state.latents,
        coefficients.timestep,
        conditions,
        scale,
        attend=attend,
        step_state=step_state,
    )
    state = take_step(state, velocity, coefficients, noise)
    return state, info, jnp.isfinite(state.latents).all()


def labels_of_entries(
    labels: Bool[Array | np.ndarray, "*steps layers entries heads"], guided: bool, batch: int
) -> Bool[Array, "*steps layers _entries heads"]:
    """Give labels to the batch entries of a step.

    Args:
        labels: Labels of [negative, positive] entries, or of the positive ones alone.
        guided: Whether the step has both.
        batch: Number of videos.
    """
    labels = jnp.asarray(labels)
    if guided and labels.shape[-2] == batch:
        return jnp.concatenate([labels, labels], axis=-2)
    return labels if guided else labels[..., -batch:, :]


def _diagnose(place: str, graphdef, attend: Attend, *arguments) -> str:
    """Repeat a step that failed, and say where its numbers first stop being finite."""

    def watch(query, key, value, **context):
        out, _ = attend(query, key, value, **context)
        inputs_are_finite = [jnp.isfinite(x).all() for x in (query, key, value)]
        return out, (jnp.stack(inputs_are_finite).all(), jnp.isfinite(out).all())

    _, (inputs, outputs), _ = denoise_step(graphdef, watch, *arguments)
    inputs, outputs = np.asarray(inputs), np.asarray(outputs)
    message = f"the latents are not finite after {place}: "
    layers = len(inputs)
    bad = np.flatnonzero(~(inputs & outputs))
    if not len(bad):
        return message + f"the attention of all {layers} layers is finite, what follows it is not"
    first = bad[0]
    what = "output" if inputs[first] else "input"
    return message + f"first in the attention {what} of layer {first} of {layers}, counted from 0"
