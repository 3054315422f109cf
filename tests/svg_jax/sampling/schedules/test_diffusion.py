"""CogVideoX's samplers against diffusers' own classes, over whole runs."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sizes import slow_but

from svg_jax.convert.scheduler_config import COGVIDEOX
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.noise import initial_noise, step_noise
from svg_jax.sampling.schedules.steps import initial_state, take_step
from svg_jax.sampling.schedules.tables import make_schedule

GOLDENS = json.loads((Path(__file__).parents[3] / "data" / "scheduler_goldens.json").read_text())
START = np.sin(np.arange(16, dtype=np.float32)).reshape(1, 1, 1, 4, 4)
RELEASED = {
    "_class_name": "CogVideoXDDIMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def toy_velocity(x, timestep):
    """The goldens' model, computed in float32 by numpy for both sides."""
    x = np.asarray(x, np.float32)
    return np.float32(0.3) * x + np.float32(0.1) * np.cos(x) * np.float32(timestep / 1000)


def sample(schedule, noise_of_step):
    state = initial_state(schedule.sampler, jax.numpy.asarray(START))
    for index, timestep in enumerate(schedule.timesteps):
        velocity = jax.numpy.asarray(toy_velocity(state.latents, timestep))
        noise = jax.numpy.asarray(noise_of_step(index)) if schedule.draws_noise else None
        state = jax.jit(take_step)(state, velocity, schedule.step(index), noise)
    return np.asarray(state.latents)


def sample_with_diffusers(sampler, snr_shift_scale, num_steps, noise_of_step, monkeypatch):
    torch = pytest.importorskip("torch")
    from diffusers.schedulers import scheduling_dpm_cogvideox as dpm_module
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    entries = {k: v for k, v in RELEASED.items() if not k.startswith("_")}
    cls = CogVideoXDDIMScheduler if sampler == "ddim" else dpm_module.CogVideoXDPMScheduler
    scheduler: Any = cls(**entries | {"snr_shift_scale": snr_shift_scale})
    scheduler.set_timesteps(num_steps)
    x, old, before = torch.from_numpy(START), None, None
    for index, t in enumerate(scheduler.timesteps):
        velocity = torch.from_numpy(toy_velocity(x.numpy(), int(t)))
        if sampler == "ddim":
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        else:
            noise = torch.from_numpy(noise_of_step(index))
            monkeypatch.setattr(dpm_module, "randn_tensor", lambda *_, noise=noise, **__: noise)
            x, old = scheduler.step(velocity, old, t, before, x, return_dict=False)
        x, before = x.float(), t
    return scheduler, x.numpy()


@pytest.mark.parametrize("case", GOLDENS["cases"])
def test_golden(case):
    golden = GOLDENS["cases"][case]
    name, snr, steps = case.split()
    config = SchedulerConfig(snr_shift_scale=float(snr.partition("=")[2]))
    sampler = "ddim" if "DDIM" in name else "dpm"
    schedule = make_schedule(config, int(steps.partition("=")[2]), sampler)
    assert schedule.timesteps.tolist() == golden["timesteps"]
    final = sample(schedule, lambda _: np.zeros_like(START))
    np.testing.assert_allclose(final.ravel(), golden["toy_final"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", slow_but([1, 7, 50], [1, 4, 7, 20, 30, 50]))
def test_a_whole_run_is_diffusers(sampler, snr_shift_scale, num_steps, monkeypatch):
    config = SchedulerConfig(snr_shift_scale=snr_shift_scale)
    schedule = make_schedule(config, num_steps, sampler)

    def noise_of_step(index):
        return step_noise(5, index, START.shape)

    theirs, expected = sample_with_diffusers(
        sampler, snr_shift_scale, num_steps, noise_of_step, monkeypatch
    )
    assert schedule.timesteps.tolist() == theirs.timesteps.tolist()
    np.testing.assert_allclose(sample(schedule, noise_of_step), expected, rtol=0, atol=1e-6)


@given(num_steps=st.integers(1, 1000), sampler=st.sampled_from(["ddim", "dpm"]))
def test_every_number_of_steps_has_a_finite_falling_schedule(num_steps, sampler):
    schedule = make_schedule(SchedulerConfig(), num_steps, sampler)
    assert schedule.num_steps == num_steps
    assert schedule.timesteps[0] == 999
    assert (np.diff(schedule.timesteps) < 0).all()
    assert schedule.timesteps[-1] >= 0
    columns = [column for column in schedule.coefficients if column is not None]
    assert len(columns) == {"ddim": 5, "dpm": 7}[sampler]
    assert all(np.isfinite(column).all() for column in columns)


@given(num_steps=st.integers(1, 200))
def test_ddim_reproduces_the_noising_process_when_the_model_is_right(num_steps):
    """With the true velocity of x = α·x0 + σ·ε every step stays on x0 and ε exactly."""
    table = make_schedule(SchedulerConfig(), num_steps).coefficients
    clean, noise = 0.3, -1.7
    x = table.alpha * clean + table.sigma * noise
    after = table.next_latents * x + table.next_now * clean
    np.testing.assert_allclose(
        after[:-1], x[1:], atol=0.05
    )  # 1000 // N is not always the next entry
    if 1000 % num_steps == 0:
        np.testing.assert_allclose(after[:-1], x[1:], atol=1e-12)
        np.testing.assert_allclose(after[-1], clean, atol=1e-12)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(num_steps):
    with pytest.raises(ValueError, match="num_inference_steps must be 1 to 1000"):
        make_schedule(SchedulerConfig(), num_steps)


def test_the_released_config_is_read():
    config = SchedulerConfig.from_dict(
        RELEASED | {"_class_name": "CogVideoXDPMScheduler"}, COGVIDEOX
    )
    assert config == SchedulerConfig(sampler="dpm", snr_shift_scale=3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "names the scheduler 'EulerDiscreteScheduler'"),
        ({"prediction_type": "epsilon"}, "only 'v_prediction' is implemented"),
        ({"beta_schedule": "linear"}, "only 'scaled_linear' is implemented"),
        ({"timestep_spacing": "leading"}, "only 'trailing' is implemented"),
        ({"steps_offset": 1}, "steps_offset to 1"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"flow_shift": 5.0, "sigma": 1}, "unknown keys: flow_shift, sigma"),
    ],
)
def test_what_is_not_implemented_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig.from_dict(RELEASED | change, COGVIDEOX)


@pytest.mark.parametrize("key", ["prediction_type", "timestep_spacing"])
def test_a_missing_key_has_the_meaning_that_diffusers_gives_it(key):
    """Its defaults are not CogVideoX's: a config without these keys describes another sampler."""
    with pytest.raises(ValueError, match=f"sets {key}"):
        SchedulerConfig.from_dict({k: v for k, v in RELEASED.items() if k != key}, COGVIDEOX)


def test_noise_depends_on_seed_and_step_and_not_on_the_batch():
    shape = (2, 3, 4)
    np.testing.assert_array_equal(initial_noise(1, shape), initial_noise(1, (5, 3, 4))[:2])
    draws = [initial_noise(1, shape), initial_noise(2, shape)]
    draws += [step_noise(1, 0, shape), step_noise(1, 1, shape), step_noise(2, 0, shape)]
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    assert initial_noise(0, (10_000,)).std() == pytest.approx(1, abs=0.02)


def test_the_noise_of_a_seed_is_pinned():
    """A published seed must mean the same video for ever."""
    pinned = [-0.24822916090488434, -0.02676701545715332, -1.9444162845611572]
    assert initial_noise(0, (3,)).tolist() == pinned
