"""A whole run under one trace: what `jax.jit`, `jax.vmap` and a mesh can be put around."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from svg_jax.attention import StepState, attend_dense
from svg_jax.sampling.denoising import denoise_step, labels_of_entries
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.schedules.steps import StepCoefficients


def sample(transformer: nnx.Module, run: PreparedRun) -> PreparedRun:
    """Run all steps of a schedule as a pure function of arrays, which can be traced.

    It computes what `denoise` does, without records and without a check that latents are finite. A
    stretch of steps of one kind (dense or sparse, guided or not) is one `jax.lax.scan`. Arrays of
    the run may be traced: noise, key, encoded prompts, labels, the schedule's numbers.

        runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run of each seed))
        jax.jit(jax.vmap(partial(sample, transformer)))(runs)

    Args:
        transformer: Model that predicts velocities.
        run: Run before its first step; one of "dpm" has its `sampler_noise`
            (`PreparedRun.with_sampler_noise`).

    Returns:
        The run after the last step.

    Raises:
        ValueError: If the sampler's noise is missing.
    """
    if run.schedule.draws_noise and run.sampler_noise is None:
        raise ValueError(
            f"sampler_noise is missing, which {run.schedule.sampler!r} adds in its steps: pass "
            "run.with_sampler_noise()"
        )
    graphdef, weights = nnx.split(transformer)
    columns = {
        "numbers": _in_float32(run.schedule.coefficients),
        "scale": np.array(run.scales, np.float32),
        "noise": None if run.sampler_noise is None else jnp.asarray(run.sampler_noise, jnp.float32),
        "labels": None if run.labels is None else jnp.asarray(run.labels),
    }
    state = run.state
    for (attention, guided), steps in itertools.groupby(range(len(run.scales)), run.kind_of):

        def take(state, inputs, attention=attention, guided=guided):
            step, inputs = inputs
            told = None
            if attention is not attend_dense:
                labels = inputs["labels"]
                if labels is not None:
                    labels = labels_of_entries(labels, guided, len(state.latents))
                told = StepState(jax.random.fold_in(run.key, step), labels)
            scale = inputs["scale"] if guided else None
            arguments = (inputs["numbers"], run.conditions, scale, inputs["noise"], told)
            return denoise_step(graphdef, attention, weights, state, *arguments)[0], None

        rows = np.array(list(steps))
        of_steps = jax.tree.map(lambda column, rows=rows: column[rows], columns)
        state, _ = jax.lax.scan(take, state, (rows, of_steps))
    return dataclasses.replace(run, state=state)


def _in_float32(table: StepCoefficients) -> StepCoefficients:
    """Turn the numbers of all steps into the dtypes that `Schedule.step` gives them."""
    timestep, *others = table
    kind = jnp.int32 if jnp.issubdtype(timestep.dtype, jnp.integer) else jnp.float32
    values = (None if column is None else jnp.asarray(column, jnp.float32) for column in others)
    return StepCoefficients(jnp.asarray(timestep, kind), *values)
