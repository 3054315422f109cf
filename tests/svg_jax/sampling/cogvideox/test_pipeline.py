"""What of the CogVideoX pipeline is its own: samplers against diffusers', sizes, its noise."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cogvideox_pipelines import CALL, MODEL_1_5, SCHEDULER, features, noise
from diffusers.schedulers import scheduling_dpm_cogvideox as dpm_module
from sizes import slow_but
from tiny_configs import COGVIDEOX_2B

from svg_jax.config import PAPER_PRESETS, SparsityConfig, Warmup
from svg_jax.models import CogVideoXConfig
from svg_jax.sampling.latents import (
    NO_VAE,
    RELEASED,
    Compression,
    latent_shape,
    to_frames,
    trained_size,
)
from svg_jax.sampling.schedules.noise import step_noise

LATENTS = {"2b": (3, 4, 8, 8), "5b": (3, 4, 8, 8), "1.5": (4, 4, 8, 12), "1.5-I2V": (4, 4, 8, 12)}
NUM_STEPS = 5


@pytest.fixture
def checkpoint(variant, pipelines):
    """A variant's name, diffusers' transformer, and our pipeline of the same weights."""
    theirs, ours, _ = pipelines["CogVideoX"](variant)
    return variant, theirs.transformer, ours


@pytest.fixture
def pipeline(pipelines):
    """Our pipeline of the 5b alone."""
    return pipelines["CogVideoX"]("5b")[1]


def inputs(variant, batch=1):
    rng = np.random.default_rng(1)
    arrays = {
        "latents": rng.normal(size=(batch, *LATENTS[variant])),
        "prompt_embeds": rng.normal(size=(batch, 8, 16)),
        "negative_prompt_embeds": rng.normal(size=(batch, 8, 16)),
    }
    if "I2V" in variant:
        _, *image = LATENTS[variant]
        arrays["image_latents"] = rng.normal(size=(batch, 1, *image))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


class ImageVae(torch.nn.Module):
    """Stands in for the VAE of diffusers' image-to-video pipeline: knows one image's latents."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, latents):
        super().__init__()
        self.latents = torch.from_numpy(latents).permute(0, 2, 1, 3, 4)
        self.config = SimpleNamespace(
            block_out_channels=(1, 1, 1, 1),
            temporal_compression_ratio=4,
            scaling_factor=1.0,
            invert_scale_latents=False,
            latent_channels=4,
        )

    def encode(self, _image):
        distribution = SimpleNamespace(sample=lambda _generator: self.latents)
        return SimpleNamespace(latent_dist=distribution)


def sample_with_diffusers(
    variant, transformer, arrays, sampler, sampler_noise, monkeypatch, **options
):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    image_latents = arrays.get("image_latents")
    tensors.pop("image_latents", None)
    cls = getattr(diffusers, f"CogVideoX{'DDIM' if sampler == 'ddim' else 'DPM'}Scheduler")
    modules = {
        "tokenizer": None,
        "text_encoder": None,
        "transformer": transformer.eval(),
        "scheduler": cls(**SCHEDULER),
        "vae": None,
    }
    size = {"height": 8 * arrays["latents"].shape[3], "width": 8 * arrays["latents"].shape[4]}
    if image_latents is not None:
        modules["vae"] = ImageVae(image_latents)
        pipe: Any = diffusers.CogVideoXImageToVideoPipeline(**modules)
        tensors["image"] = torch.zeros(1, 3, size["height"], size["width"])
    else:
        pipe = diffusers.CogVideoXPipeline(**modules)
    pipe.set_progress_bar_config(disable=True)

    def noise_of_step(*_args, **_kwargs):
        return torch.from_numpy(sampler_noise[scheduler_steps[-1]])

    # diffusers draws twice in most steps and uses the last draw: both are the step's noise here.
    scheduler_steps = [0]
    monkeypatch.setattr(dpm_module, "randn_tensor", noise_of_step)

    def next_step(_pipe, step, _timestep, values):
        scheduler_steps.append(step + 1)
        return values

    return pipe(
        **tensors,
        **size,
        num_frames=9,
        num_inference_steps=NUM_STEPS,
        output_type="latent",
        callback_on_step_end=next_step,
        **options,
    ).frames.numpy()


UNGUIDED, GUIDED = {"guidance_scale": 1.0}, {"guidance_scale": 6.0}
DYNAMIC = GUIDED | {"use_dynamic_cfg": True}


@pytest.mark.parametrize(
    ("variant", "sampler", "options"),
    slow_but(
        [
            ("2b", "ddim", GUIDED),
            ("5b", "dpm", DYNAMIC),
            ("1.5", "ddim", UNGUIDED),
            ("1.5-I2V", "dpm", DYNAMIC),
        ],
        [
            (variant, *run)
            for variant in LATENTS
            for run in (("ddim", GUIDED), ("dpm", DYNAMIC), ("ddim", UNGUIDED))
        ],
    ),
)
def test_latents_are_those_of_diffusers(checkpoint, sampler, options, monkeypatch):
    variant, transformer, pipeline = checkpoint
    arrays = inputs(variant)
    shape = (NUM_STEPS, *arrays["latents"].shape)
    noise = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    expected = sample_with_diffusers(
        variant, transformer, arrays, sampler, noise, monkeypatch, **options
    )
    size = {"height": 8 * arrays["latents"].shape[3], "width": 8 * arrays["latents"].shape[4]}
    video = pipeline(
        **arrays,
        **size,
        num_frames=9,
        num_inference_steps=NUM_STEPS,
        scheduler=sampler,
        sampler_noise=noise if sampler == "dpm" else None,
        **options,
    )
    padding = expected.shape[1] - 3  # 1.5: nine frames are three latents, padded to four
    assert padding == (1 if "1.5" in variant else 0)
    expected = expected[:, padding:]
    assert video.frames is None  # a VAE's latents
    assert np.abs(video.latents - expected).max() <= 1e-5 * np.abs(expected).max()


def test_bytes_are_the_frames_rounded(pipelines):
    _, ours, _ = pipelines["CogVideoX"]("5b, VAE")
    call = CALL | {"latents": noise(), **features(), "guidance_scale": 1.0}
    frames = ours(**call).frames
    assert frames.shape == (1, 9, 64, 64, 3)
    pixels = ours(**call, output_type="uint8").frames
    np.testing.assert_array_equal(pixels, (frames * 255).round().astype(np.uint8))


def test_the_seed_draws_the_samplers_noise(pipeline):
    given = {"prompt_embeds": inputs("5b")["prompt_embeds"], "guidance_scale": 1}
    given |= {"scheduler": "dpm", "num_inference_steps": 2, "seed": 7}
    noise = np.stack([step_noise(7, step, (1, 3, 4, 8, 8)) for step in range(2)])
    np.testing.assert_array_equal(
        pipeline(**given).latents, pipeline(**given, sampler_noise=noise).latents
    )


def test_sizes_default_to_those_of_training(pipeline):
    video = pipeline(
        prompt_embeds=inputs("5b")["prompt_embeds"], num_inference_steps=1, guidance_scale=1
    )
    assert video.latents.shape == (1, 3, 4, 8, 8)


def test_sparsity_defaults_to_the_papers(pipeline):
    assert pipeline.paper_sparsity() is PAPER_PRESETS["cogvideox1.5-i2v"]
    of_pixels = dataclasses.replace(pipeline, has_vae=False)
    assert of_pixels.paper_sparsity() == (SparsityConfig(), Warmup())
    assert of_pixels.paper_preset(480, 720) is None


def config(**changes):
    return CogVideoXConfig(**COGVIDEOX_2B | changes)


def shape_of(config, compression, size):
    trained = trained_size(config, compression)
    trained = dict(zip(("num_frames", "height", "width"), trained, strict=True))
    return latent_shape(config, **trained | size, compression=compression)


FINE = Compression(8, 4)  # of no released VAE


@pytest.mark.parametrize(
    ("changes", "compression", "size", "expected"),
    [
        ({}, RELEASED, {}, ((3, 4, 8, 8), 0)),
        ({}, RELEASED, {"num_frames": 49, "height": 480, "width": 720}, ((13, 4, 60, 90), 0)),
        ({}, RELEASED, {"num_frames": 48, "height": 480, "width": 720}, ((12, 4, 60, 90), 0)),
        ({}, RELEASED, {"num_frames": 13}, ((4, 4, 8, 8), 0)),
        ({}, RELEASED, {"num_frames": 8}, ((2, 4, 8, 8), 0)),
        (MODEL_1_5, RELEASED, {"num_frames": 81}, ((22, 4, 96, 170), 1)),
        (MODEL_1_5, RELEASED, {"num_frames": 85}, ((22, 4, 96, 170), 0)),
        ({"patch_size": 4}, NO_VAE, {"num_frames": 16}, ((16, 4, 8, 8), 0)),
        ({}, FINE, {"num_frames": 17, "height": 40, "width": 48}, ((3, 4, 10, 12), 0)),
    ],
)
def test_latent_shapes(changes, compression, size, expected):
    assert shape_of(config(**changes), compression, size) == expected


@pytest.mark.parametrize(
    ("compression", "size", "message"),
    [
        (RELEASED, {"height": 100}, "height must be a positive multiple of 16: got 100"),
        (RELEASED, {"width": 0}, "width must be a positive multiple of 16: got 0"),
        (NO_VAE, {"width": 63}, "width must be a positive multiple of 2: got 63"),
        (FINE, {"height": 44}, "height must be a positive multiple of 8: got 44"),
    ],
)
def test_sizes_that_the_model_cannot_take(compression, size, message):
    with pytest.raises(ValueError, match=message):
        shape_of(config(), compression, size)


def test_pixels_of_a_video():
    video = np.full((1, 3, 1, 2, 2), -1, np.float32)
    video[0, 0] = 0
    video[0, 1] = 7
    pixels = to_frames(video)
    assert pixels.shape == (1, 1, 2, 2, 3)
    assert pixels[0, 0, 1, 1].tolist() == [0.5, 1, 0]


EMBEDS = np.zeros((1, 8, 16), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a cat"}, "no text encoder: pass prompt_embeds"),
        ({"prompt_embeds": EMBEDS}, "pass negative_prompt_embeds too, or a guidance_scale of 1"),
        (
            {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :4]},
            r"as many and as long as the prompts: got features of \(1, 4, 16\) for \(1, 8, 16\)",
        ),
        (
            {"prompt_embeds": EMBEDS, "guidance_scale": 1, "latents": np.zeros((1, 3, 4, 8, 9))},
            r"latents must have the shape \(1, 3, 4, 8, 8\): got \(1, 3, 4, 8, 9\)",
        ),
        (
            {
                "prompt_embeds": EMBEDS,
                "guidance_scale": 1,
                "sampler_noise": np.zeros((50, 1, 3, 4, 8, 8)),
            },
            "the scheduler adds no noise",
        ),
        (
            {
                "prompt_embeds": EMBEDS,
                "guidance_scale": 1,
                "scheduler": "dpm",
                "sampler_noise": np.zeros((5, 1, 3, 4, 8, 8)),
            },
            r"sampler_noise must have the shape \(50, 1, 3, 4, 8, 8\): got \(5, 1",
        ),
    ],
)
def test_arguments_that_do_not_fit(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize("variant", ["1.5-I2V"])
def test_image_to_video_needs_an_image(checkpoint):
    variant, _, pipeline = checkpoint
    arrays = inputs(variant)
    image = arrays.pop("image_latents")
    size = {"height": 64, "width": 96, "num_frames": 9}
    with pytest.raises(ValueError, match="image is missing"):
        pipeline(**arrays, **size)
    with pytest.raises(ValueError, match=r"image_latents must have the shape \(1, 1, 4, 8, 12\)"):
        pipeline(**arrays, **size, image_latents=image[:, :, :, :4])
