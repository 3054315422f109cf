"""The denoising loop: one jitted pure step, called in order.

All that changes from step to step (coefficients, guidance scale, PRNG key, labels) enters the step
as a traced value. What remains is two executables per shape and guidance mode: a dense one and a
sparse one.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from svg_jax.attention import SparseAttentionInfo, StepState, attend_dense, attend_sparse
from svg_jax.config import SparsityConfig, Warmup, dense_step_count, share_of
from svg_jax.models import Attend
from svg_jax.sampling.records import HeadProfile, StepRecord
from svg_jax.sampling.schedules.noise import step_key, step_noise
from svg_jax.sampling.schedules.steps import SamplerState, take_step
from svg_jax.sampling.schedules.tables import Schedule
from svg_jax.sampling.settings import SettingError


@runtime_checkable
class Conditions(Protocol):
    """What a model is told beside latents and timestep; a pytree, one class for each family."""

    def velocity(
        self,
        model: Any,
        latents: Array,
        timestep: Array,
        scale: Array | None,
        *,
        attend: Attend,
        step_state: Any,
    ) -> tuple[Array, Any]:
        """The model's prediction in float32, and the info of `attend` stacked over layers.

        Under a scale it is guided, and the model sees entries [negative, positive].
        """
        ...


def guided_velocity(velocity: Array, scale: Array | None) -> Array:
    """Classifier-free guidance, in float32, of predictions [negative, positive]; None is none."""
    velocity = velocity.astype(jnp.float32)
    if scale is None:
        return velocity
    negative, positive = jnp.split(velocity, 2)
    return negative + scale * (positive - negative)


def guidance_scales(
    timesteps: np.ndarray,
    guidance_scale: float | int,
    *,
    guidance_interval: tuple[float | int, float | int] = (0.0, 1.0),
    use_dynamic_cfg: bool = False,
) -> Float[np.ndarray, " steps"]:
    """The guidance scale of every step, float64; 1 means that the step is not guided at all.

    Args:
        timesteps: Of the schedule.
        guidance_scale: As in diffusers; at most 1 turns guidance off.
        guidance_interval: From which share of the steps to which they are guided: (0, 0.3) is the
            first 30 %.
        use_dynamic_cfg: diffusers' formula, literally: it compares the timestep (0 to 999) with the
            number of steps.
    """
    start, end = guidance_interval
    num_steps = len(timesteps)
    scales = np.full(num_steps, max(float(guidance_scale), 1.0))
    if use_dynamic_cfg and guidance_scale > 1:
        for step, timestep in enumerate(timesteps.tolist()):
            # In Python's float64: in float32 the cosine of these large angles is noise.
            angle = math.pi * ((num_steps - timestep) / num_steps) ** 5.0
            scales[step] = 1 + guidance_scale * ((1 - math.cos(angle)) / 2)
    scales[: share_of(start, num_steps)] = scales[share_of(end, num_steps) :] = 1.0
    return scales


def denoise(
    transformer: nnx.Module,
    state: SamplerState,
    schedule: Schedule,
    conditions: Conditions,
    *,
    scales: Float[np.ndarray, " steps"],
    sparsity: SparsityConfig | None = None,
    warmup: Warmup | None = None,
    attend: Attend | None = None,
    labels: Bool[np.ndarray, "..."] | None = None,
    seed: int = 0,
    sampler_noise: Float[Array | np.ndarray, "..."] | None = None,
    steps: range | None = None,
    save: Callable[[SamplerState, StepRecord], None] | None = None,
    callback_on_step_end: Callable[[StepRecord], None] | None = None,
) -> tuple[SamplerState, tuple[StepRecord, ...]]:
    """Runs the steps of a schedule, or some of them.

    Args:
        transformer: Predicts velocities.
        state: Latents, float32 in the transformer's order, and the sampler's history.
        schedule: All steps of the run.
        conditions: Text and image that the model is told, of the transformer's family.
        scales: Guidance scale of every step of the schedule (`guidance_scales`).
        sparsity: Sparse attention after its dense warm-up; None is dense throughout.
        warmup: Steps and layers that stay dense under `sparsity`; None is `Warmup()`.
        attend: Attention of all steps in place of both; hashable, its `step_state` a `StepState`.
        labels: Labels to use in place of profiling, True = temporal: bool [layers, entries, heads],
            or with a leading axis for all steps of the schedule. Entries are those of a guided
            step ([negative, positive]), or the positive ones alone for both.
        seed: Of the rows that profiling samples and of DPM's noise.
        sampler_noise: What DPM adds, [steps of the schedule, *shape of the latents], in place of
            the seed's.
        steps: Which steps of the schedule to run; `state` is that before the first of them.
        save: Called with the state after each step and its record, once it is known to be finite
            and the next step is on its way.
        callback_on_step_end: Called with the record of each step.

    Returns:
        The state after the last step, and a record of each.

    Raises:
        FloatingPointError: If latents are not finite after a step; says which step and layer.
        ValueError: If labels do not fit.
    """
    steps = range(schedule.num_steps) if steps is None else steps
    config: Any = transformer.config  # pyright: ignore[reportAttributeAccessIssue]
    graphdef, weights = nnx.split(transformer)
    dense_steps = schedule.num_steps
    sparse: Attend = attend_dense
    if labels is not None:
        batch, num_steps = len(state.latents), schedule.num_steps
        check_labels(labels, config, num_steps=num_steps, batch=batch)
    if attend is not None:
        dense_steps, sparse = 0, attend
    elif sparsity is not None:
        warmup = warmup or Warmup()
        dense_steps = dense_step_count(warmup, schedule.num_steps)
        sparse = attend_sparse(sparsity, config.num_attention_layers, warmup=warmup)

    def inputs_of(step: int) -> tuple[Attend, tuple[Any, ...]]:
        """The attention of a step, and what else it takes, on the device."""
        is_sparse, guided = step >= dense_steps, bool(scales[step] != 1)
        noise = step_state = None
        if schedule.draws_noise:
            noise = step_noise(seed, step, state.latents.shape)
            if sampler_noise is not None:
                noise = jnp.asarray(sampler_noise[step], jnp.float32)
        if is_sparse:
            given = None
            if labels is not None:
                layers = labels if labels.ndim == 3 else labels[step]
                given = _labels_of_entries(layers, guided, len(state.latents))
            step_state = StepState(step_key(seed, step), given)
        scale = np.float32(scales[step]) if guided else None
        inputs = (schedule.step(step), conditions, scale, noise, step_state)
        return sparse if is_sparse else attend_dense, jax.device_put(inputs)

    records: list[StepRecord] = []
    kinds = set()
    upcoming = unsaved = None
    try:
        for step in steps:
            started = time.perf_counter()
            attention, inputs = inputs_of(step) if upcoming is None else upcoming
            arguments = (weights, state, *inputs)
            after, info, is_finite = denoise_step(graphdef, attention, *arguments)
            # The host saves the step before, and readies the next, while the device is at this one.
            if save is not None and unsaved is not None:
                save(*unsaved)
                unsaved = None
            upcoming = inputs_of(step + 1) if step + 1 in steps else None
            found = ()
            if isinstance(info, SparseAttentionInfo):
                found = (info.labels, info.errors, info.density)
            found, is_finite = jax.device_get((found, is_finite))
            if not is_finite:
                place = f"step {step} of {schedule.num_steps} (timestep {schedule.timesteps[step]})"
                raise FloatingPointError(_diagnose(place, graphdef, attention, *arguments))
            state = after
            kind = (attention, scales[step] != 1)
            record = StepRecord(
                step=step,
                timestep=schedule.timesteps[step].item(),
                guidance_scale=float(scales[step]),
                seconds=time.perf_counter() - started,
                first_of_kind=kind not in kinds,
                profile=HeadProfile(*found) if found else None,
            )
            kinds.add(kind)
            records.append(record)
            unsaved = state, record
            if callback_on_step_end is not None:
                callback_on_step_end(record)
    finally:
        if save is not None and unsaved is not None:
            save(*unsaved)
    return state, tuple(records)


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
    """One step of a run, compiled once per shape, `attend` and guidance mode.

    Nothing is donated: latents are small, and those of before the step tell why it failed.

    Args:
        graphdef: Structure of the transformer (`nnx.split`); static.
        attend: The attention of every layer; static, so it must be the same object in every call.
        weights: The transformer's parameters.
        state: Before the step.
        coefficients: Of the step, as the schedule of `state`'s sampler has them.
        conditions: What the model is told.
        scale: Guidance scale; None runs the model on the prompt alone.
        noise: Standard normal noise of latents' shape, for DPM; None for the other samplers.
        step_state: For `attend`.

    Returns:
        The state after the step, the info of `attend` stacked over layers, and whether all latents
        are finite.
    """
    velocity, info = conditions.velocity(
        nnx.merge(graphdef, weights),
        state.latents,
        coefficients.timestep,
        scale,
        attend=attend,
        step_state=step_state,
    )
    state = take_step(state, velocity, coefficients, noise)
    return state, info, jnp.isfinite(state.latents).all()


def check_labels(labels: np.ndarray, config: Any, *, num_steps: int, batch: int) -> None:
    """Check the shape of given labels.

    Args:
        labels: Labels of a run.
        config: The transformer's config.
        num_steps: Number of steps in the schedule.
        batch: Number of videos.

    Raises:
        SettingError: If they do not fit.
    """
    layers, heads = config.num_attention_layers, config.num_attention_heads
    if labels.ndim not in (3, 4) or (labels.ndim == 4 and len(labels) != num_steps):
        raise SettingError(
            "labels",
            "are [layers, entries, heads] or [steps, layers, entries, heads] with "
            f"{num_steps} steps: got {labels.shape}",
        )
    if labels.shape[-2] not in (batch, 2 * batch):
        raise SettingError(
            "labels", f"have {labels.shape[-2]} batch entries, not {batch} or {2 * batch}"
        )
    if (labels.shape[-3], labels.shape[-1]) != (layers, heads):
        raise SettingError(
            "labels", f"are of {layers} layers and {heads} heads: got {labels.shape}"
        )


def _labels_of_entries(labels: np.ndarray, guided: bool, batch: int) -> Array:
    entries = labels.shape[1]
    if guided and entries == batch:
        labels = np.concatenate([labels, labels], axis=1)
    return jnp.asarray(labels if guided else labels[:, -batch:])


def _diagnose(place: str, graphdef, attend: Attend, *arguments) -> str:
    """Repeats a step that failed and says where its numbers first stop being finite."""

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
