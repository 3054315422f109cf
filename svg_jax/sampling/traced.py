"""A whole run under one trace: what `jax.jit`, `jax.vmap` and a mesh can be put around."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from svg_jax.attention import StepState, attend_dense
from svg_jax.config import SparsityConfig, Warmup
from svg_jax.models import Attend
from svg_jax.sampling.denoising import denoise_step, labels_of_entries, step_kinds
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.schedules.steps import StepCoefficients


def sample(
    transformer: nnx.Module,
    run: PreparedRun,
    *,
    sparsity: SparsityConfig | None = None,
    warmup: Warmup | None = None,
    attend: Attend | None = None,
    labels: Bool[np.ndarray, "..."] | None = None,
) -> PreparedRun:
    """Run all steps of a schedule as a pure function of arrays, which traces.

    It computes what `denoise` does, without records and without a look at whether latents stay
    finite. A stretch of steps of one kind (dense or sparse, guided or not) is one `jax.lax.scan`.
    Arrays of the run may be traced: noise, key, encoded prompts, the schedule's numbers.

        runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run of each seed))
        jax.jit(jax.vmap(partial(sample, transformer)))(runs)

    Args:
        transformer: Predicts velocities.
        run: The run before its first step; one of "dpm" has its `sampler_noise`
            (`PreparedRun.with_sampler_noise`).
        sparsity: Sparse attention after its dense warm-up; None is dense throughout.
        warmup: Steps and layers that stay dense under `sparsity`; None is `Warmup()`.
        attend: Attention of all steps in place of both, as in `denoise`.
        labels: Labels to use in place of profiling, as in `denoise`.

    Returns:
        The run after the last step.

    Raises:
        ValueError: If labels do not fit, or the sampler's noise is missing.
    """
    if run.schedule.draws_noise and run.sampler_noise is None:
        raise ValueError(
            f"sampler_noise is missing, which {run.schedule.sampler!r} adds in its steps: pass "
            "run.with_sampler_noise()"
        )
    config: Any = transformer.config  # pyright: ignore[reportAttributeAccessIssue]
    kinds = step_kinds(run, config, sparsity=sparsity, warmup=warmup, attend=attend, labels=labels)
    graphdef, weights = nnx.split(transformer)
    numbers = _in_float32(run.schedule.coefficients)
    noise = None if run.sampler_noise is None else jnp.asarray(run.sampler_noise, jnp.float32)
    state = run.state
    for (attention, guided), steps in itertools.groupby(range(len(run.scales)), kinds.of):
        rows = np.array(list(steps))
        given = None
        if labels is not None and attention is not attend_dense:
            given = labels_of_entries(labels, guided, len(state.latents))
            given = np.broadcast_to(given, (len(run.scales), *given.shape[-3:]))[rows]

        def take(state, inputs, attention=attention):
            step, numbers, scale, noise, given = inputs
            told = None
            if attention is not attend_dense:
                told = StepState(jax.random.fold_in(run.key, step), given)
            arguments = (weights, state, numbers, run.conditions, scale, noise, told)
            return denoise_step(graphdef, attention, *arguments)[0], None

        scales = np.array(run.scales, np.float32) if guided else None
        columns = (numbers, scales, noise)
        of_steps = jax.tree.map(lambda column, rows=rows: column[rows], columns)
        state, _ = jax.lax.scan(take, state, (rows, *of_steps, given))
    return dataclasses.replace(run, state=state)


def _in_float32(table: StepCoefficients) -> StepCoefficients:
    """The numbers of all steps as `Schedule.step` gives them."""
    timestep, *others = table
    kind = jnp.int32 if jnp.issubdtype(timestep.dtype, jnp.integer) else jnp.float32
    values = (None if column is None else jnp.asarray(column, jnp.float32) for column in others)
    return StepCoefficients(jnp.asarray(timestep, kind), *values)
