"""A whole run under one `jax.jit(jax.vmap(...))`, against the loop on the host."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from saved_runs import pipeline_of

from svg_jax import SparsityConfig, Warmup
from svg_jax.sampling import denoise, from_pretrained, sample

SPARSITY = SparsityConfig(density=0.5, sampled_rows=8, band_multiple=1)
SPARSE: dict[str, Any] = {"sparsity": SPARSITY, "warmup": Warmup(steps=0.3)}
SEEDS = (0, 2**63 + 5)
PROMPT = "a red seven moving right"
CALL = {"num_frames": 5, "height": 16, "width": 24, "num_inference_steps": 3}


def stacked(runs):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return from_pretrained("tiny")


def test_seeds_of_the_bundled_model_are_sampled_at_once(pipe):
    call = CALL | {"guidance_interval": (0, 0.4)}
    runs = [pipe.prepare(pipe.settings(PROMPT, seed=seed, **SPARSE, **call)) for seed in SEEDS]
    assert [run.seed for run in runs] == list(SEEDS)
    transformer = pipe.transformer.load()
    at_once = jax.jit(jax.vmap(partial(sample, transformer)))(stacked(runs))
    for index, seed in enumerate(SEEDS):
        video = pipe(PROMPT, seed=seed, **SPARSE, output_type="latent", **call)
        profiles = [step.profile is not None for step in video.info.steps]
        assert profiles == [False, True, True]
        found = pipe.finished_latents(jax.tree.map(lambda leaf, at=index: leaf[at], at_once))
        np.testing.assert_allclose(found, video.latents, rtol=0, atol=2e-5)
    first, second = at_once.state.latents
    assert np.abs(first - second).max() > 0.1


def test_dpm_takes_its_noise_as_an_array_and_labels_as_the_loop_does(pipe):
    transformer, config = pipe.transformer.load(), pipe.transformer.config
    shape = (3, config.num_attention_layers, 1, config.num_attention_heads)
    labels = np.random.default_rng(0).random(shape) < 0.5
    call = CALL | {"scheduler": "dpm", "guidance_scale": 1, "seed": 5, "labels": labels}
    run = pipe.prepare(pipe.settings(PROMPT, **SPARSE, **call))
    with pytest.raises(ValueError, match="sampler_noise is missing, which 'dpm' adds"):
        sample(transformer, run)
    found = jax.jit(partial(sample, transformer))(run.with_sampler_noise())
    expected, steps = denoise(transformer, run)  # whose noise is the seed's
    assert steps[-1].profile is not None
    np.testing.assert_array_equal(steps[-1].profile.labels, labels[-1])
    np.testing.assert_allclose(found.state.latents, expected.state.latents, rtol=0, atol=2e-5)


def test_flow_matching_traces():
    pipe, call = pipeline_of("Wan, UniPC")
    # An untrained model predicts zeros.
    graphdef, weights = nnx.split(pipe.transformer)
    weights = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), weights
    )
    transformer = nnx.merge(graphdef, weights)
    call["num_inference_steps"] = 4
    runs = [pipe.prepare(pipe.settings(**call, seed=seed)) for seed in SEEDS]
    found = jax.jit(jax.vmap(partial(sample, transformer)))(stacked(runs))
    for index, run in enumerate(runs):
        expected, _ = denoise(transformer, run)
        np.testing.assert_allclose(
            found.state.latents[index], expected.state.latents, rtol=0, atol=2e-5
        )
        assert np.abs(expected.state.latents).max() < 100
