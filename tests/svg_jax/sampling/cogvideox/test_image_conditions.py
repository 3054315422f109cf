"""CogVideoX from an image against diffusers' own pipeline, tiny checkpoints of 1.0 and 1.5."""

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from cogvideox_pipelines import SCHEDULER
from diffusers.models.autoencoders import vae as vae_module
from parity import TOLERANCE, randomised, relative_error
from tiny_configs import COGVIDEOX
from tiny_pipelines import both_of_each, picture

from svg_jax.convert import convert_pipeline
from svg_jax.sampling import from_pretrained
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.schedules.noise import image_noise_of

MODEL = COGVIDEOX | {"in_channels": 8, "sample_width": 12}
OF_1_5 = {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16}
MODELS = {
    "5b": MODEL | {"use_learned_positional_embeddings": True},
    "1.5": MODEL | OF_1_5 | {"sample_height": 300, "sample_width": 300},
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 16, 16),  # norms of fewer make much of a rounding error
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}
CLASSES = {
    "scheduler": "CogVideoXDDIMScheduler",
    "transformer": "CogVideoXTransformer3DModel",
    "vae": "AutoencoderKLCogVideoX",
}
SIZE = {"height": 64, "width": 96, "num_frames": 9}
CALL = SIZE | {"num_inference_steps": 4}
FRAMES = {"5b": 3, "1.5": 4}  # of latents: 1.5 makes 9 frames of 4, and drops the first


def write_checkpoint(folder, variant):
    """A pipeline folder with all parameters random; returns diffusers' pipeline of it."""
    vae = VAE | {"invert_scale_latents": variant == "1.5"}
    transformer = diffusers.CogVideoXTransformer3DModel(**MODELS[variant])
    modules: dict[str, Any] = {
        "transformer": randomised(transformer.float(), 0),  # 5b's table is made in float64
        "vae": randomised(diffusers.AutoencoderKLCogVideoX(**vae), 1),
        "scheduler": diffusers.CogVideoXDDIMScheduler(**SCHEDULER),
    }
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    classes = {name: ["diffusers", CLASSES[name]] for name in modules}
    index = {"_class_name": "CogVideoXImageToVideoPipeline", **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    modules |= {"tokenizer": None, "text_encoder": None}
    pipe: Any = diffusers.CogVideoXImageToVideoPipeline(**modules)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Both pipelines of a variant, and the converted folder."""
    return both_of_each(tmp_path_factory, write_checkpoint)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(variant, batch=1):
    return {
        "latents": normal(1, batch, FRAMES[variant], 4, 8, 12),
        "prompt_embeds": normal(2, batch, 8, 16),
        "negative_prompt_embeds": normal(3, batch, 8, 16),
    }


def run_diffusers(pipe, monkeypatch, image_noise, **arguments):
    """Latents after the last step and frames of diffusers' pipeline, its posterior given noise."""
    draws = iter(np.moveaxis(image_noise, 1, 2)[:, None])
    monkeypatch.setattr(
        vae_module, "randn_tensor", lambda *_args, **_kwargs: torch.from_numpy(next(draws))
    )
    latents, frames = tiny_pipelines.run_diffusers(pipe, **CALL, **arguments)
    assert next(draws, None) is None  # no draw but these
    return latents, frames


def check(video, latents, frames):
    assert relative_error(video.latents, latents[:, -video.latents.shape[1] :]) <= TOLERANCE
    assert frames.std() > 0.05  # neither grey nor all clipped
    assert video.frames.shape == frames.shape == (len(latents), 9, 64, 96, 3)
    assert relative_error(video.frames, frames) <= 3e-5


@pytest.mark.parametrize(
    ("variant", "mode", "options"),
    [("5b", "RGB", {"use_dynamic_cfg": True}), ("1.5", "P", {"guidance_scale": 3.0})],
)
def test_image_to_video_is_that_of_diffusers(make, variant, mode, options, monkeypatch):
    theirs, ours, _ = make(variant)
    arrays, image, noise = inputs(variant), picture(mode=mode), normal(4, 1, 1, 4, 8, 12)
    expected = run_diffusers(
        theirs, monkeypatch, noise, image=image.convert("RGB"), **arrays, **options
    )
    check(ours(image=image, image_noise=noise, **arrays, **CALL, **options), *expected)


def test_an_image_for_each_prompt(make, monkeypatch):
    theirs, ours, _ = make("1.5")
    arrays, noise = inputs("1.5", batch=2), normal(4, 2, 1, 4, 8, 12)
    given = {"image": [picture(7), picture(8)], "guidance_scale": 1.0, **arrays}
    expected = run_diffusers(theirs, monkeypatch, noise, **given)
    check(ours(image_noise=noise, **given, **CALL), *expected)


def test_the_seed_draws_the_latents_of_the_image(make):
    _, ours, _ = make("5b")
    text = {"prompt_embeds": normal(2, 1, 8, 16), "guidance_scale": 1}

    def told(**arguments):
        run = ours.prepare(ours.settings(**text, **CALL, **arguments))
        return np.asarray(run.conditions.channels)

    drawn = told(image=picture(), seed=5)
    noise = image_noise_of(5, (1, 1, 4, 8, 12))
    np.testing.assert_array_equal(drawn, told(image=picture(), image_noise=noise))
    assert not np.allclose(drawn, told(image=picture(), seed=6), atol=1e-3)
    assert drawn.shape == (1, 3, 4, 8, 12)
    assert (drawn[:, 1:] == 0).all()
    given = drawn[:, :1]
    np.testing.assert_array_equal(drawn, told(image_latents=given))
    several = told(image_latents=given, num_videos_per_prompt=2)
    np.testing.assert_array_equal(several, drawn.repeat(2, axis=0))


def test_components_are_loaded_where_they_are_used(make):
    _, ours, _ = make("5b")
    assert isinstance(ours.transformer, Lazy)
    assert isinstance(ours.vae, Lazy)


NOISE = normal(4, 1, 1, 4, 8, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"image is missing: .* first frame, or the image_latents of it"),
        ({"image_noise": NOISE}, "image is missing"),
        ({"image": picture(), "image_latents": NOISE}, "pass either image or image_latents"),
        ({"image_latents": NOISE, "image_noise": NOISE}, "either image_latents or image_noise"),
        ({"image": [picture()] * 2}, "one or as many as the prompts: got 2 for 1"),
        (
            {"image": picture(), "image_noise": NOISE[..., :8]},
            r"image_noise must have the shape \(1, 1, 4, 8, 12\): got \(1, 1, 4, 8, 8\)",
        ),
        ({"image": picture(), "image_noise": NOISE * np.nan}, "image_noise has values that are"),
        ({"image_latents": NOISE * np.nan}, "image_latents has values that are not finite"),
        ({"image_latents": NOISE[:, :, :3]}, r"image_latents must have the shape \(1, 1, 4, 8, 12"),
    ],
)
def test_images_that_do_not_fit(make, arguments, message):
    _, ours, _ = make("5b")
    with pytest.raises(ValueError, match=message):
        ours(prompt_embeds=normal(2, 1, 8, 16), guidance_scale=1, **CALL, **arguments)


def test_an_image_needs_the_vae(make, tmp_path):
    _, _, folder = make("5b")
    convert_pipeline(folder.parent / "source", tmp_path / "out", components=["transformer"])
    ours: Any = from_pretrained(tmp_path / "out", dtype="float32")
    text = {"prompt_embeds": normal(2, 1, 8, 16), "guidance_scale": 1}
    with pytest.raises(ValueError, match="without its VAE: pass image_latents"):
        ours(image=picture(), **text, **CALL)
    assert ours(image_latents=NOISE, **text, **CALL).frames is None


def test_the_command_line_makes_a_video_of_an_image(make, run, tmp_path):
    _, _, folder = make("1.5")
    picture(mode="RGBA").save("image.png")
    np.savez("text.npz", prompt_embeds=normal(2, 1, 8, 16))
    size = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    command = ["generate", f"--model={folder}", "--prompt-embeds=text.npz", *size]
    command += ["--image=image.png", "--steps=2", "--guidance-scale=1", "--density=0.6"]
    result = run(*command, "--sampled-rows=4", "--output=video.mp4")
    assert result.code == 0, result.err
    assert (tmp_path / "video.mp4").stat().st_size > 0
