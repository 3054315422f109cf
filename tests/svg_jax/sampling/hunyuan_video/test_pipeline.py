"""What of the HunyuanVideo pipeline is its own: its features, images, guidance and defaults."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hunyuan_video_pipelines import NOISE, SIZE, features, noise, picture
from parity import TOLERANCE, relative_error

from svg_jax.config import PAPER_PRESETS
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.denoising import denoise_step
from svg_jax.sampling.hunyuan_video.conditions import embedded_guidance
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def make(pipelines):
    """Our pipeline of a variant."""
    return lambda variant: pipelines["HunyuanVideo"](variant)[1]


def test_the_transformer_alone_goes_on_from_features(make):
    pipeline = make("replace")
    prompts = {"prompt": "a dog", "negative_prompt": "rain", "image": picture()}
    call = {"num_inference_steps": 2, "true_cfg_scale": 2.0, "latents": noise(), **SIZE}
    run = pipeline.prepare(pipeline.settings(**prompts, **call))
    expected = pipeline(**prompts, **call, output_type="latent")
    assert expected.frames is None

    features = {"image_latents": np.asarray(run.conditions.first_frame)}
    for prefix, text in (("", run.conditions.text), ("negative_", run.conditions.negative_text)):
        tokens = text.lengths.item() + (3 if prefix else 0)  # padding that is left changes nothing
        features |= {
            f"{prefix}prompt_embeds": np.asarray(text.embeds[:, :tokens]),
            f"{prefix}prompt_attention_mask": np.arange(tokens)[None] < text.lengths.item(),
            f"{prefix}pooled_prompt_embeds": np.asarray(text.pooled),
        }
    alone = dataclasses.replace(pipeline, vae=None, encoders=HunyuanVideoEncoders())
    video = alone(**features, **call)
    assert video.frames is None
    assert relative_error(video.latents, expected.latents) < TOLERANCE
    with pytest.raises(ValueError, match="no VAE: pass the image_latents"):
        alone(prompt="a", image=picture(), **call)
    with pytest.raises(ValueError, match="no text encoder: pass prompt_embeds"):
        alone(**prompts | {"image_latents": features["image_latents"]}, **call)


def test_several_images_and_videos_of_each(make):
    pipeline = make("concat")
    images = [picture(1), np.asarray(picture(2))]
    call = {"num_inference_steps": 1, "seed": 5, **SIZE}
    settings = pipeline.settings(**features(2), image=images, num_videos_per_prompt=2, **call)
    run = pipeline.prepare(settings)
    latents = run.conditions.channels[:, :4, 0]
    np.testing.assert_array_equal(latents[0], latents[1])
    assert relative_error(latents[2], latents[1]) > 0.1
    assert not run.conditions.channels[:, :, 1:].any()
    assert run.conditions.channels[:, 4, 0].all()
    noises = run.state.latents
    assert noises.shape == (4, *NOISE)
    assert relative_error(noises[1], noises[0]) > 0.1
    alone = pipeline.prepare(pipeline.settings(**features(), image=images[0], **call))
    np.testing.assert_allclose(noises[:1], alone.state.latents, atol=1e-6)


def test_settings_default_to_the_papers(make):
    pipeline = make("T2V")
    run = pipeline.prepare(pipeline.settings(**features()))
    assert run.state.latents.shape == (1, 4, 33, 90, 160)
    assert run.schedule.num_steps == 50
    assert set(run.scales) == {1.0}
    assert run.conditions.number == 6000
    settings = pipeline.settings(**features(), **SIZE, num_inference_steps=2, flow_shift=3)
    shifted = pipeline.prepare(settings)
    np.testing.assert_allclose(shifted.schedule.timesteps, [1000, 750])
    np.testing.assert_allclose(run.schedule.timesteps[25], 875)


def test_sparsity_defaults_to_the_papers(make):
    pipeline = make("T2V")
    assert pipeline.paper_sparsity() is PAPER_PRESETS["hunyuanvideo-720p"]
    assert pipeline.paper_preset(544, 960) == pipeline.paper_preset(480, 832) == "hunyuanvideo-480p"
    assert pipeline.paper_preset(960, 960) == "hunyuanvideo-720p"


def test_weights_that_are_loaded_again_are_not_compiled_again(make):
    pipeline = make("T2V")
    assert isinstance(pipeline.transformer, Lazy)
    call = {"num_inference_steps": 1, "output_type": "latent", **features(), **SIZE}
    first = pipeline(**call)
    step: Any = denoise_step
    compiled = step._cache_size()
    np.testing.assert_array_equal(pipeline(**call).latents, first.latents)
    assert step._cache_size() == compiled


def test_guidance_is_rounded_as_the_model_computes():
    assert embedded_guidance(6, jnp.bfloat16, takes_one=True) == 6016
    assert embedded_guidance(None, jnp.float32, takes_one=True) == 6000
    assert embedded_guidance(None, jnp.float32, takes_one=False) is None
    with pytest.raises(ValueError, match="takes no guidance_scale: use true_cfg_scale"):
        embedded_guidance(6, jnp.float32, takes_one=False)


LATENTS = np.zeros((1, *NOISE), np.float32)
MASK = np.array([[0, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        ("T2V", {"prompt": "a", "true_cfg_scale": 2.0}, "true_cfg_scale over 1 needs a negative"),
        ("T2V", {"prompt": "a", "max_sequence_length": 0}, "from 1 to 8192: got 0"),
        (
            "T2V",
            {"prompt_embeds": features()["prompt_embeds"]},
            "prompt_embeds need their prompt_attention_mask and pooled_prompt_embeds",
        ),
        ("T2V", {"prompt": "a", "prompt_attention_mask": MASK}, "prompt_attention_mask is for"),
        ("T2V", features() | {"prompt_attention_mask": MASK}, "must have 1 at the tokens of a"),
        ("T2V", features() | {"prompt_attention_mask": MASK[:, :3]}, r"must be that of .*\(1, 5\)"),
        ("T2V", features() | {"pooled_prompt_embeds": np.zeros((2, 8))}, "are 2 for 1 prompts"),
        ("T2V", features() | {"pooled_prompt_embeds": np.full((1, 8), np.nan)}, "not finite"),
        (
            "T2V",
            features() | features(2, "negative_") | {"true_cfg_scale": 2.0},
            "negative_prompt_embeds must be as many as the prompts: got 2 for 1",
        ),
        ("replace", {"prompt": "a"}, "image-to-video checkpoint: pass an image"),
        ("replace", {"prompt": "a", "image": [picture()] * 2}, "one or as many as the prompts"),
        ("replace", {"prompt": "a", "image": picture(), "num_frames": 1}, "at least 5: got 1"),
        ("replace", {"prompt": "a", "image_latents": LATENTS[:, :, :1]}, "reads the image, too"),
        ("replace", {**features(), "image_latents": LATENTS}, "image_latents must have the shape"),
        ("concat", {"prompt": "a", "image": picture(), "guidance_scale": 6}, "no guidance_scale"),
    ],
)
def test_arguments_that_do_not_fit(variant, arguments, message, make):
    pipeline = make(variant)
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(pipeline.settings(**SIZE | arguments))
