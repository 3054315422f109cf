"""The samplers of flow matching against diffusers' own classes, over whole runs."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sizes import slow_but

from svg_jax.convert.scheduler_config import FLOW
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.steps import initial_state, take_step
from svg_jax.sampling.schedules.tables import make_schedule

DATA = Path(__file__).parents[3] / "data" / "flow_scheduler_goldens.json"
GOLDENS = json.loads(DATA.read_text())["cases"]
START = np.sin(np.arange(16, dtype=np.float32)).reshape(1, 1, 1, 4, 4)
SAMPLERS: tuple[Any, ...] = ("euler", "unipc")
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
}


def make(sampler, shift, num_steps):
    return make_schedule(SchedulerConfig(sampler, shift=shift), num_steps)


def toy_velocity(x, timestep):
    """The goldens' model, computed in float32 by numpy for both sides."""
    x = np.asarray(x, np.float32)
    return np.float32(0.3) * x + np.float32(0.1) * np.cos(x) * np.float32(timestep / 1000)


def sample(schedule):
    state = initial_state(schedule.sampler, jnp.asarray(START))
    for index, timestep in enumerate(schedule.timesteps):
        velocity = jnp.asarray(toy_velocity(state.latents, timestep))
        state = jax.jit(take_step)(state, velocity, schedule.step(index))
    return np.asarray(state.latents)


def diffusers_scheduler(sampler, shift, num_steps) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if sampler == "euler":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1])
        return scheduler
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("case", GOLDENS)
def test_golden(case):
    shift, steps = (float(x) for x in re.findall(r"shift=([\d.]+) N=(\d+)", case)[0])
    schedule = make("euler" if "Euler" in case else "unipc", shift, int(steps))
    np.testing.assert_allclose(schedule.timesteps, GOLDENS[case]["timesteps"], rtol=2e-7)
    final = sample(schedule).ravel()
    np.testing.assert_allclose(final, GOLDENS[case]["toy_final"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", slow_but([3.0, 7.0], [1.0, 3.0, 7.0, 17.0]))
@pytest.mark.parametrize("num_steps", slow_but([1, 3, 50], [1, 2, 3, 7, 40, 50]))
def test_a_whole_run_is_diffusers(sampler, shift, num_steps):
    torch = pytest.importorskip("torch")
    schedule = make(sampler, shift, num_steps)
    theirs = diffusers_scheduler(sampler, shift, num_steps)
    np.testing.assert_allclose(schedule.timesteps, theirs.timesteps.numpy(), rtol=2e-7)
    x = torch.from_numpy(START)
    for timestep in theirs.timesteps:
        velocity = torch.from_numpy(toy_velocity(x.numpy(), timestep.item()))
        x = theirs.step(velocity, timestep, x, return_dict=False)[0]
    np.testing.assert_allclose(sample(schedule), x.numpy(), rtol=0, atol=1e-6)


@given(st.sampled_from(SAMPLERS), st.integers(1, 1000), st.floats(0.5, 20))
def test_every_number_of_steps_has_a_finite_falling_schedule(sampler, num_steps, shift):
    schedule = make(sampler, shift, num_steps)
    assert schedule.num_steps == num_steps
    columns = [column for column in schedule.coefficients if column is not None]
    assert len(columns) == 10
    assert all(np.isfinite(column).all() for column in columns)
    assert (np.diff(schedule.coefficients.sigma) < 0).all()
    assert (np.diff(schedule.timesteps) <= 0).all()
    assert 999 <= schedule.timesteps[0] <= 1000.001  # rounded, as released
    assert schedule.timesteps[-1] >= 0


@given(st.sampled_from(SAMPLERS), st.integers(1, 60), st.floats(1, 17))
def test_a_model_that_is_right_ends_at_the_clean_video(sampler, num_steps, shift):
    """With the true velocity every estimate is the clean video, and corrections change nothing."""
    schedule = make(sampler, shift, num_steps)
    clean, noise = jnp.full((2,), 0.3), jnp.array([-1.7, 0.6])
    start = (1 - schedule.step(0).sigma) * clean + schedule.step(0).sigma * noise
    state = initial_state(sampler, start)
    for index in range(num_steps):
        state = take_step(state, noise - clean, schedule.step(index))
        if index + 1 < num_steps:
            sigma = schedule.step(index + 1).sigma
            expected = (1 - sigma) * clean + sigma * noise
            np.testing.assert_allclose(state.latents, expected, atol=3e-5)
    np.testing.assert_allclose(state.latents, clean, atol=3e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(sampler, num_steps):
    with pytest.raises(ValueError, match="num_inference_steps must be 1 to 1000"):
        make(sampler, 5.0, num_steps)


def test_configs_that_diffusers_writes_are_read():
    diffusers = pytest.importorskip("diffusers")
    euler = dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0).config)
    euler["_class_name"] = EULER["_class_name"]
    assert SchedulerConfig.from_dict(euler, FLOW) == SchedulerConfig("euler", shift=7.0)
    unipc = dict(diffusers.UniPCMultistepScheduler().config) | UNIPC
    assert SchedulerConfig.from_dict(unipc, FLOW) == SchedulerConfig("unipc", shift=5.0)


def test_a_run_may_use_another_sampler_or_shift():
    config = SchedulerConfig.from_dict(UNIPC, FLOW)
    other = make_schedule(dataclasses.replace(config, shift=2.0), 4, "euler")
    np.testing.assert_array_equal(other.timesteps, make("euler", 2.0, 4).timesteps)
    own = make_schedule(config, 4)
    np.testing.assert_array_equal(own.timesteps, make("unipc", 5.0, 4).timesteps)
    with pytest.raises(ValueError, match="is 'euler' or 'unipc'"):
        make_schedule(config, 4, "ddim")
    with pytest.raises(ValueError, match="is 'ddim' or 'dpm'"):
        make_schedule(SchedulerConfig("dpm"), 4, "unipc")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "names the scheduler 'DDIMScheduler'"),
        ({}, "names the scheduler None"),
        (EULER | {"use_dynamic_shifting": True}, "use_dynamic_shifting to True"),
        (EULER | {"flow_shift": 5.0}, "unknown keys: flow_shift"),
        (EULER | {"shift": 0.0}, "shift, which must be a number from 0.01 to 1000: got 0.0"),
        (UNIPC | {"solver_order": 3}, "only 2 is implemented"),
        (UNIPC | {"prediction_type": "epsilon"}, "only 'flow_prediction' is implemented"),
        (UNIPC | {"disable_corrector": [0]}, "disable_corrector"),
        ({"_class_name": "UniPCMultistepScheduler"}, "sets prediction_type to 'epsilon'"),
    ],
)
def test_what_is_not_implemented_is_said(entries, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig.from_dict(entries, FLOW)
