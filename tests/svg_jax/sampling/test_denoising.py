"""The denoising loop: what it compiles, what it tells the model, and what it does when it fails."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.config import SparsityConfig, Warmup
from svg_jax.models import VideoLayout
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.denoising import denoise
from svg_jax.sampling.prepared_run import (
    PreparedRun,
    attends_of,
    guidance_scales,
    labels_of_steps,
)
from svg_jax.sampling.records import SamplingInfo, median_seconds
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.noise import initial_noise, seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import make_schedule

LAYERS, HEADS, HEAD_DIM = 3, 2, 8
LAYOUT = VideoLayout(num_frames=4, tokens_per_frame=16, text_tokens=2, text_position="first")
SHAPE = (1, 4, 3, 4, 4)  # a token is a pixel
SPARSITY = SparsityConfig(density=0.5, sampled_rows=8, band_multiple=1)
HALF = Warmup(steps=0.5)
SPARSE: dict[str, Any] = {"sparsity": SPARSITY, "warmup": HALF}
traces: list[int] = []  # batch entries of each trace of the model


@dataclass(frozen=True)
class ToyConfig:
    num_attention_layers: int = LAYERS
    num_attention_heads: int = HEADS
    name: str = ""


class Toy(nnx.Module):
    """Attention over pixels and two text tokens: the smallest model that keeps the signature."""

    def __init__(self, name=""):
        key = jax.random.key(0)
        width = HEADS * HEAD_DIM
        self.config = ToyConfig(name=name)  # another name is another structure
        self.input = nnx.Param(jax.random.normal(key, (3, 3 * width)))
        self.layers = nnx.Param(jax.random.normal(key, (LAYERS, width, width)) / width)

    def __call__(self, hidden_states, embeds, timestep, *, ofs=None, attend: Any, step_state: Any):
        traces.append(len(hidden_states))
        batch, frames, channels, height, width = hidden_states.shape
        pixels = jnp.moveaxis(hidden_states, 2, -1).reshape(batch, -1, channels)
        tokens = jnp.concatenate([embeds, pixels], axis=1)

        def apply_layer(out, layer):
            weight, index = layer
            query, key, value = jnp.split(tokens @ self.input[...], 3, axis=-1)
            query = query + out @ weight
            heads = [x.reshape(batch, -1, HEADS, HEAD_DIM) for x in (query, key, value)]
            out, info = attend(
                *heads, layout=LAYOUT, text_length=None, layer=index, step_state=step_state
            )
            return out.reshape(batch, -1, HEADS * HEAD_DIM), info

        start = jnp.zeros((batch, LAYOUT.num_tokens, HEADS * HEAD_DIM))
        out, info = jax.lax.scan(apply_layer, start, (self.layers[...], jnp.arange(LAYERS)))
        time = timestep.astype(jnp.float32)[:, None, None] / 1000
        velocity = (out @ self.input[...][:, : HEADS * HEAD_DIM].T)[:, 2:] * (1 + time)
        velocity = jnp.tanh(velocity).reshape(batch, frames, height, width, channels)
        return jnp.moveaxis(velocity, -1, 2), info


def call_toy(model, hidden, timestep, *, text, number, image_features, **attention):
    return model(hidden, text, timestep, ofs=number, **attention)


def conditions(**extra):
    rng = np.random.default_rng(0)
    embeds = {
        name: jnp.asarray(rng.normal(size=(1, 2, 3)).astype(np.float32))
        for name in ("text", "negative_text")
    }
    return Conditions(call=call_toy, channel_axis=2, **embeds | extra)


def run(
    num_steps=4, guidance=1.0, sampler: Any = "ddim", seed=3, state=None, model=None, **options
):
    schedule = make_schedule(SchedulerConfig(), num_steps, sampler)
    if state is None:
        state = initial_state(sampler, jnp.asarray(initial_noise(seed, SHAPE)))
    scales = options.pop("scales", guidance_scales(schedule.timesteps, guidance))
    labels = options.pop("labels", None)
    attention = {name: options.pop(name) for name in ("sparsity", "warmup") if name in options}
    prepared = PreparedRun(
        schedule=schedule,
        state=state,
        conditions=options.pop("conditions", conditions()),
        scales=tuple(scales.tolist()),
        attends=attends_of(CogVideoXSettings(prompt="a", **attention), LAYERS, num_steps),
        labels=labels_of_steps(labels, ToyConfig(), num_steps=num_steps, batch=SHAPE[0]),
        key=seed_key(seed),
        layout=LAYOUT,
    )
    after, steps = denoise(model or Toy(), prepared, **options)
    return after.state, steps


def test_a_run_compiles_a_dense_and_a_sparse_step_and_a_second_run_none():
    traces.clear()
    run(num_steps=8, **SPARSE, model=Toy("of this test"))
    assert traces == [1, 1]
    longer = Warmup(steps=0.7)
    run(num_steps=10, sparsity=SPARSITY, warmup=longer, model=Toy("of this test"), seed=4)
    assert traces == [1, 1]
    run(num_steps=8, **SPARSE, model=Toy("of this test"), guidance=4.0)
    assert traces == [1, 1, 2, 2]
    run(num_steps=6, **SPARSE, model=Toy("of this test"), guidance=5.0)
    assert traces == [1, 1, 2, 2]


def test_warm_up_steps_are_dense_and_the_others_report_what_they_found():
    _, steps = run(num_steps=5, **SPARSE)
    assert [step.profile is None for step in steps] == [True, True, False, False, False]
    profile = steps[-1].profile
    assert profile is not None
    assert profile.labels.shape == (LAYERS, 1, HEADS)
    assert profile.errors.shape == (LAYERS, 1, HEADS, 2)
    assert np.isfinite(profile.errors).all()
    assert (profile.density < 0.6).all()
    assert [step.timestep for step in steps] == [999, 799, 599, 399, 199]


def test_density_one_is_dense():
    dense, _ = run()
    sparse, _ = run(sparsity=SparsityConfig(density=1.0), warmup=Warmup(steps=0.0))
    np.testing.assert_allclose(sparse.latents, dense.latents, atol=1e-5)


def test_guidance_is_that_of_diffusers():
    """Latents after one step under scale w are w·(positive's) + (1 - w)·(negative's)."""
    both = conditions()
    swapped = dataclasses.replace(both, text=both.negative_text)
    positive, _ = run(steps=range(1))
    negative, _ = run(steps=range(1), conditions=swapped)
    guided, _ = run(steps=range(1), guidance=4.0)
    expected = 4 * positive.latents - 3 * negative.latents
    np.testing.assert_allclose(guided.latents, expected, atol=1e-5)


def test_guidance_is_paid_for_in_its_interval_only():
    scales = guidance_scales(np.arange(20), 4.0, interval=(0, 0.3))
    assert scales.tolist() == [4.0] * 6 + [1.0] * 14
    scales = guidance_scales(np.arange(10), 4.0, interval=(0.2, 0.5))
    assert scales.tolist() == [1.0] * 2 + [4.0] * 3 + [1.0] * 5
    traces.clear()
    run(num_steps=4, scales=np.array([4.0, 4.0, 1.0, 1.0]), model=Toy("of that test"))
    assert traces == [2, 1]


@pytest.mark.parametrize("guidance_scale", [1.0, 0.5, 0])
def test_no_guidance_at_a_scale_of_at_most_one(guidance_scale):
    for dynamic in (False, True):
        scales = guidance_scales(np.arange(4), guidance_scale, use_dynamic_cfg=dynamic)
        assert scales.tolist() == [1.0] * 4


def test_dynamic_guidance_is_the_literal_formula():
    """Figures from mpmath with 50 digits; float32 would be off by whole units."""
    timesteps = make_schedule(SchedulerConfig(), 50).timesteps
    scales = guidance_scales(timesteps, 6.0, use_dynamic_cfg=True)
    assert scales[-1] == pytest.approx(1.12339793996898098, abs=1e-12)
    assert scales[0] == pytest.approx(2.29148717488044254, abs=1e-6)
    assert ((scales >= 1) & (scales <= 7)).all()


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddim", SPARSE), ("dpm", {"guidance": 3.0})],
)
def test_a_run_in_two_parts_is_the_run(sampler, options):
    whole, steps = run(num_steps=6, sampler=sampler, **options)
    half, first = run(num_steps=6, sampler=sampler, steps=range(0, 4), **options)
    parts, second = run(num_steps=6, sampler=sampler, steps=range(4, 6), state=half, **options)
    np.testing.assert_array_equal(parts.latents, whole.latents)
    assert [s.step for s in first + second] == [s.step for s in steps]


def test_seeds_and_steps_draw_other_rows_and_noise():
    start = initial_state("ddim", jnp.asarray(initial_noise(0, SHAPE)))
    infos = [SamplingInfo(run(**SPARSE, seed=s, state=start)[1]) for s in (3, 3, 4)]
    errors = [info.profiles[0].errors for info in infos]
    np.testing.assert_array_equal(errors[0], errors[1])
    assert not np.array_equal(errors[0], errors[2])
    state = initial_state("dpm", jnp.asarray(initial_noise(0, SHAPE)))
    finals = [run(sampler="dpm", state=state, seed=seed)[0].latents for seed in (3, 4)]
    assert not np.allclose(finals[0], finals[1])


def test_given_labels_are_used_for_both_halves_of_a_guided_step():
    rng = np.random.default_rng(0)
    labels = rng.random((4, LAYERS, 1, HEADS)) < 0.5
    _, steps = run(guidance=3.0, **SPARSE, labels=labels)
    for step in steps[2:]:
        assert step.profile is not None
        np.testing.assert_array_equal(
            step.profile.labels, np.concatenate([labels[step.step]] * 2, axis=1)
        )
        assert np.isnan(step.profile.errors).all()
    both = rng.random((LAYERS, 2, HEADS)) < 0.5  # for all steps; the negative prompt's first
    _, steps = run(scales=np.array([3.0, 3.0, 3.0, 1.0]), **SPARSE, labels=both)
    found = [step.profile.labels for step in steps if step.profile is not None]
    np.testing.assert_array_equal(found[0], both)
    np.testing.assert_array_equal(found[1], both[:, 1:])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((LAYERS, 3, HEADS), "3 batch entries, not 1 or 2"), ((5, LAYERS, 1, HEADS), "with 4 steps")],
)
def test_labels_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        run(**SPARSE, labels=np.zeros(shape, bool))


def test_image_latents_join_the_channels():
    class Recorder(Toy):
        def __call__(self, hidden_states, *args, **kwargs):
            channels.append(hidden_states.shape[2])
            return super().__call__(
                hidden_states[:, :, :3] + hidden_states[:, :, 3:], *args, **kwargs
            )

    channels: list[int] = []
    plain, _ = run(num_steps=2)
    image = jnp.zeros(SHAPE)
    with_image, _ = run(num_steps=2, model=Recorder(), conditions=conditions(channels=image))
    assert channels == [6]
    np.testing.assert_array_equal(with_image.latents, plain.latents)


def test_progress_is_told_after_every_step():
    seen = []
    _, steps = run(callback_on_step_end=seen.append)
    assert tuple(seen) == steps
    assert [step.first_of_kind for step in steps] == [True, False, False, False]
    assert median_seconds(steps) == np.median([step.seconds for step in steps[1:]])


def broken_model(layer):
    model = Toy()
    model.layers[...] = model.layers[...].at[layer].set(jnp.nan)
    return model


def test_latents_that_stop_being_finite_name_the_step_and_the_layer():
    with pytest.raises(FloatingPointError) as error:
        run(model=broken_model(layer=1))
    assert str(error.value) == (
        "the latents are not finite after step 0 of 4 (timestep 999): "
        "first in the attention input of layer 1 of 3, counted from 0"
    )


def test_a_failure_in_a_sparse_step_is_placed_too():
    state, _ = run(steps=range(0, 2))
    model = broken_model(layer=2)
    with pytest.raises(FloatingPointError, match=r"after step 3 of 4 .* layer 2 of 3"):
        run(model=model, steps=range(3, 4), state=state, **SPARSE)


def test_a_failure_behind_all_attention_says_so():
    with pytest.raises(FloatingPointError, match="attention of all 3 layers is finite"):
        run(scales=np.array([np.inf, 1, 1, 1]))


def test_labels_are_written_for_the_sparse_steps(tmp_path):
    _, steps = run(scales=np.array([1.0, 1.0, 2.0, 1.0]), **SPARSE)
    SamplingInfo(steps).save(tmp_path / "labels.npz")
    with np.load(tmp_path / "labels.npz") as file:
        arrays = dict(file)
    assert arrays["steps"].tolist() == [2, 3]
    assert arrays["labels"].shape == (2, LAYERS, 2, HEADS)
    assert arrays["errors"].shape == (2, LAYERS, 2, HEADS, 2)
    assert np.isnan(arrays["errors"][1, :, 0]).all()  # not guided: no negative prompt
    assert np.isfinite(arrays["errors"][1, :, 1]).all()
    profile = steps[3].profile
    assert profile is not None
    np.testing.assert_array_equal(arrays["labels"][1, :, 1:], profile.labels)
    _, dense = run()
    with pytest.raises(ValueError, match="no step was sparse"):
        SamplingInfo(dense).save(tmp_path / "none.npz")
    assert not (tmp_path / "none.npz").exists()


def test_shares_over_a_run():
    labels = np.zeros((LAYERS, 1, HEADS), bool)
    labels[1] = True
    labels[2, 0, 0] = True
    _, steps = run(**SPARSE, labels=labels)
    info = SamplingInfo(steps)
    assert info.spatial_share is not None
    assert info.spatial_share.tolist() == [1.0, 0.0, 0.5]
    assert 0.3 < info.density < 0.6
    assert SamplingInfo(run()[1]).density == 1
