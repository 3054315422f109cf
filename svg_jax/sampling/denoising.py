"""The denoising loop: one jitted pure step, called in order.

All that changes from step to step (coefficients, guidance scale, PRNG key, labels) enters the step
as a traced value. What remains is two executables per shape and guidance mode: a dense one and a
sparse one.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from svg_jax.attention import SparseAttentionInfo, StepState, attend_dense, attend_sparse
from svg_jax.config import SparsityConfig, Warmup, dense_step_count, share_of
from svg_jax.models import Attend
from svg_jax.sampling.conditions import Conditions, predict
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import StepRecord
from svg_jax.sampling.schedules.noise import step_noise
from svg_jax.sampling.schedules.steps import SamplerState, take_step
from svg_jax.sampling.settings import SettingError


def guidance_scales(
    timesteps: np.ndarray,
    guidance_scale: float | int,
    *,
    interval: tuple[float | int, float | int] = (0.0, 1.0),
    use_dynamic_cfg: bool = False,
) -> Float[np.ndarray, " steps"]:
    """The guidance scale of every step, float64; 1 means that the step is not guided at all.

    Args:
        timesteps: Of the schedule.
        guidance_scale: As in diffusers; at most 1 turns guidance off.
        interval: First and last share of the steps that are guided: (0, 0.3) is the first 30 %.
        use_dynamic_cfg: diffusers' formula, literally: it compares the timestep (0 to 999) with the
            number of steps.
    """
    start, end = interval
    num_steps = len(timesteps)
    scales = np.full(num_steps, max(float(guidance_scale), 1.0))
    if use_dynamic_cfg and guidance_scale > 1:
        for step, timestep in enumerate(timesteps.tolist()):
            # In Python's float64: in float32 the cosine of these large angles is noise.
            angle = math.pi * ((num_steps - timestep) / num_steps) ** 5.0
            scales[step] = 1 + guidance_scale * ((1 - math.cos(angle)) / 2)
    scales[: share_of(start, num_steps)] = scales[share_of(end, num_steps) :] = 1.0
    return scales


@dataclass(frozen=True, eq=False)
class StepKinds:
    """Which attention each step of a run has, and whether it is guided.

    Attributes:
        dense_steps: Number of dense steps, the first ones.
        sparse: Attention of the others.
        scales: Guidance scale of every step.
    """

    dense_steps: int
    sparse: Attend
    scales: Sequence[float]

    def of(self, step: int) -> tuple[Attend, bool]:
        """The attention of a step, and whether it is guided."""
        attend = self.sparse if step >= self.dense_steps else attend_dense
        return attend, self.scales[step] != 1


def step_kinds(
    run: PreparedRun,
    config: Any,
    *,
    sparsity: SparsityConfig | None,
    warmup: Warmup | None,
    attend: Attend | None,
    labels: Bool[np.ndarray, "..."] | None,
) -> StepKinds:
    """Tell which attention each step has.

    Args:
        run: The run.
        config: The transformer's config.
        sparsity: Sparse attention after its dense warm-up, or None.
        warmup: Steps and layers that stay dense under it; None is `Warmup()`.
        attend: Attention of all steps in place of it, or None.
        labels: Labels of the run, or None.

    Raises:
        SettingError: If labels do not fit.
    """
    num_steps = len(run.scales)
    if labels is not None:
        check_labels(labels, config, num_steps=num_steps, batch=len(run.state.latents))
    if attend is not None:
        return StepKinds(0, attend, run.scales)
    if sparsity is None:
        return StepKinds(num_steps, attend_dense, run.scales)
    warmup = warmup or Warmup()
    sparse = attend_sparse(sparsity, config.num_attention_layers, warmup=warmup)
    return StepKinds(dense_step_count(warmup, num_steps), sparse, run.scales)


def denoise(
    transformer: nnx.Module,
    run: PreparedRun,
    *,
    sparsity: SparsityConfig | None = None,
    warmup: Warmup | None = None,
    attend: Attend | None = None,
    labels: Bool[np.ndarray, "..."] | None = None,
    steps: range | None = None,
    save: Callable[[SamplerState, StepRecord], None] | None = None,
    callback_on_step_end: Callable[[StepRecord], None] | None = None,
) -> tuple[PreparedRun, tuple[StepRecord, ...]]:
    """Run the steps of a schedule, or some of them, one after the other from the host.

    Args:
        transformer: Predicts velocities.
        run: The run, in the state before the first of the steps.
        sparsity: Sparse attention after its dense warm-up; None is dense throughout.
        warmup: Steps and layers that stay dense under `sparsity`; None is `Warmup()`.
        attend: Attention of all steps in place of both; hashable, its `step_state` a `StepState`.
        labels: Labels to use in place of profiling, True = temporal: bool [layers, entries, heads],
            or with a leading axis for all steps of the schedule. Entries are those of a guided
            step ([negative, positive]), or the positive ones alone for both.
        steps: Which steps of the schedule to run.
        save: Called with the state after each step and its record, once it is known to be finite
            and the next step is on its way.
        callback_on_step_end: Called with the record of each step.

    Returns:
        The run after the last step, and a record of each.

    Raises:
        FloatingPointError: If latents are not finite after a step; says which step and layer.
        ValueError: If labels do not fit.
    """
    schedule, state = run.schedule, run.state
    steps = range(schedule.num_steps) if steps is None else steps
    graphdef, weights = nnx.split(transformer)
    config: Any = transformer.config  # pyright: ignore[reportAttributeAccessIssue]
    kinds = step_kinds(run, config, sparsity=sparsity, warmup=warmup, attend=attend, labels=labels)
    records: list[StepRecord] = []
    seen = set()
    upcoming = unsaved = None
    try:
        for step in steps:
            started = time.perf_counter()
            kind = kinds.of(step)
            attention = kind[0]
            inputs = _inputs_of(run, step, kind, labels) if upcoming is None else upcoming
            arguments = (weights, state, *inputs)
            after, info, is_finite = denoise_step(graphdef, attention, *arguments)
            # The host saves the step before, and readies the next, while the device is at this one.
            if save is not None and unsaved is not None:
                save(*unsaved)
                unsaved = None
            upcoming = None
            if step + 1 in steps:
                upcoming = _inputs_of(run, step + 1, kinds.of(step + 1), labels)
            if not isinstance(info, SparseAttentionInfo):
                info = None
            info, is_finite = jax.device_get((info, is_finite))
            if not is_finite:
                place = f"step {step} of {schedule.num_steps} (timestep {schedule.timesteps[step]})"
                raise FloatingPointError(_diagnose(place, graphdef, attention, *arguments))
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


def _inputs_of(
    run: PreparedRun,
    step: int,
    kind: tuple[Attend, bool],
    labels: Bool[np.ndarray, "..."] | None,
) -> tuple[Any, ...]:
    """What a step takes beside weights and state, on the device."""
    attend, guided = kind
    noise = step_state = None
    if run.sampler_noise is not None:
        noise = jnp.asarray(run.sampler_noise[step], jnp.float32)
    elif run.schedule.draws_noise:
        noise = step_noise(run.seed, step, run.state.latents.shape)
    if attend is not attend_dense:
        given = None
        if labels is not None:
            layers = labels if labels.ndim == 3 else labels[step]
            given = jnp.asarray(labels_of_entries(layers, guided, len(run.state.latents)))
        step_state = StepState(jax.random.fold_in(run.key, step), given)
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


def labels_of_entries(labels: np.ndarray, guided: bool, batch: int) -> np.ndarray:
    """Labels [..., entries, heads] for the entries of a step.

    Args:
        labels: Labels for [negative, positive] entries, or for the positive ones.
        guided: Whether the step has both.
        batch: Number of videos.
    """
    if guided and labels.shape[-2] == batch:
        return np.concatenate([labels, labels], axis=-2)
    return labels if guided else labels[..., -batch:, :]


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
