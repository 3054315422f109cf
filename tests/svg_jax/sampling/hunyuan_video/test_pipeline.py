"""The HunyuanVideo pipeline against diffusers' own, from prompt and image to latents and frames."""

import dataclasses
import json
import logging
import shutil
import sys
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from parity import TOLERANCE, ExactSinusoids, randomised, relative_error
from real_tokenizers import real_tokenizer

from svg_jax import cli
from svg_jax.config import PAPER_PRESETS, SparsityConfig, Warmup
from svg_jax.convert import convert_pipeline
from svg_jax.sampling import HunyuanVideoPipeline, from_pretrained
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.denoising import denoise_step
from svg_jax.sampling.hunyuan_video.conditions import embedded_guidance
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders

T2V: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "T2V": T2V,
    "replace": {**T2V, "image_condition_type": "token_replace"},
    "concat": {
        **T2V,
        "in_channels": 9,
        "guidance_embeds": False,
        "image_condition_type": "latent_concat",
    },
}
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SIZES: dict[str, Any] = {"intermediate_size": 24, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(
    **SIZES,
    hidden_size=16,
    num_hidden_layers=3,
    num_key_value_heads=1,
    vocab_size=128320,
    rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"},
)
VISION = transformers.CLIPVisionConfig(
    **SIZES, hidden_size=12, num_hidden_layers=2, image_size=336, patch_size=14
)
CLIP = transformers.CLIPTextConfig(
    **SIZES, hidden_size=8, num_hidden_layers=2, vocab_size=49408, eos_token_id=2
)
PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}
SIZE = {"height": 32, "width": 48, "num_frames": 9}
LATENTS = (4, 3, 4, 6)
NUM_STEPS = 3
FRAMES_TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def llava():
    ids: dict[str, Any] = {"image_token_index": 128257, "pad_token_id": 128258}
    config = transformers.LlavaConfig(text_config=LLAMA, vision_config=VISION, **ids)
    return transformers.LlavaForConditionalGeneration(config)


def reference_pipeline(variant):
    """diffusers' pipeline, every parameter random."""
    image_to_video = variant != "T2V"
    parts = {
        "transformer": diffusers.HunyuanVideoTransformer3DModel(**VARIANTS[variant]),
        "vae": diffusers.AutoencoderKLHunyuanVideo(**VAE),
        "text_encoder": llava() if image_to_video else transformers.LlamaModel(LLAMA),
        "text_encoder_2": transformers.CLIPTextModel(CLIP),
    }
    parts = {name: randomised(part, seed) for seed, (name, part) in enumerate(parts.items())}
    llama3, clip = real_tokenizer("llama3"), real_tokenizer("clip")
    parts |= {
        "tokenizer": transformers.PreTrainedTokenizerFast.from_pretrained(llama3),
        "tokenizer_2": transformers.CLIPTokenizer.from_pretrained(clip),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    if image_to_video:
        parts["image_processor"] = transformers.CLIPImageProcessorPil(**PROCESSOR)
        return diffusers.HunyuanVideoImageToVideoPipeline(**parts)
    return diffusers.HunyuanVideoPipeline(**parts)


def write_checkpoint(folder, reference):
    """A pipeline folder as it is released."""
    index: dict[str, Any] = {"_class_name": type(reference).__name__}
    for name, part in reference.components.items():
        library = type(part).__module__.split(".")[0]
        index[name] = [library, type(part).__name__]
        if "tokenizer" not in name:
            part.save_pretrained(folder / name)
    shutil.copytree(real_tokenizer("llama3"), folder / "tokenizer")
    shutil.copytree(real_tokenizer("clip"), folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps(index))


class Checkpoints:
    """diffusers' pipeline and ours of each variant, made when asked for."""

    def __init__(self, make_folder):
        self.make_folder = make_folder
        self.folders, self.made = {}, {}

    def __call__(self, variant) -> tuple[Any, HunyuanVideoPipeline]:
        if variant not in self.made:
            folder = self.make_folder(variant)
            reference = reference_pipeline(variant)
            write_checkpoint(folder / "source", reference)
            reference.transformer.time_text_embed.add_module("time_proj", ExactSinusoids())
            convert_pipeline(folder / "source", folder / "out")
            ours = from_pretrained(folder / "out", dtype="float32")
            assert isinstance(ours, HunyuanVideoPipeline)
            self.folders[variant], self.made[variant] = folder / "out", (reference, ours)
        return self.made[variant]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp)


def noise(batch=1, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, *LATENTS)).astype(np.float32)


def picture(seed=2, size=(50, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return PIL.Image.fromarray(pixels).resize((3 * size[0], 2 * size[1]))


def sample_with_diffusers(reference, latents, **arguments):
    """Latents after the last step, and frames."""
    reference.set_progress_bar_config(disable=True)
    seen = []

    def keep(_pipe, _step, _timestep, values):
        seen.append(values["latents"].numpy())
        return values

    out = reference(
        latents=torch.from_numpy(latents),
        num_inference_steps=NUM_STEPS,
        output_type="np",
        callback_on_step_end=keep,
        **SIZE,
        **arguments,
    )
    return seen[-1], out.frames


CASES = {
    "T2V": ("T2V", {"prompt": "a cat surfing", "guidance_scale": 6.0}),
    "T2V, guided": (
        "T2V",
        {
            "prompt": ["a cat surfing a very long wave", ""],
            "negative_prompt": ["blurry", "shaking {}"],
            "true_cfg_scale": 3.0,
            "guidance_scale": 1.5,
        },
    ),
    "token_replace": ("replace", {"prompt": "a dog", "guidance_scale": 6.0}),
    "token_replace, guided": (
        "replace",
        {
            "prompt": "a dog",
            "negative_prompt": "rain",
            "true_cfg_scale": 2.0,
            "guidance_scale": 1.0,
        },
    ),
    "latent_concat": ("concat", {"prompt": "a dog", "guidance_scale": 1.0}),
    "latent_concat, guided": (
        "concat",
        {"prompt": "a dog", "negative_prompt": "", "true_cfg_scale": 2.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_videos_are_those_of_diffusers(case, checkpoints):
    variant, arguments = CASES[case]
    reference, pipeline = checkpoints(variant)
    batch = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
    if variant != "T2V":
        arguments = arguments | {"image": picture()}
    latents, frames = sample_with_diffusers(reference, noise(batch), **arguments)
    if variant == "concat":
        latents = latents[:, :, 1:]
    video = pipeline(latents=noise(batch), num_inference_steps=NUM_STEPS, **SIZE, **arguments)
    assert video.frames is not None
    assert video.frames.shape == frames.shape
    errors = relative_error(video.latents, latents), np.abs(video.frames - frames).max()
    print(f"{case}: latents {errors[0]:.2e}, frames {errors[1]:.2e}")
    assert errors[0] <= TOLERANCE
    assert errors[1] <= FRAMES_TOLERANCE


def test_the_transformer_alone_goes_on_from_features(checkpoints):
    _, pipeline = checkpoints("replace")
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


def features(batch=1, prefix=""):
    rng = np.random.default_rng(3)
    return {
        f"{prefix}prompt_embeds": rng.normal(size=(batch, 5, 16)).astype(np.float32),
        f"{prefix}prompt_attention_mask": np.array([[1, 1, 1, 0, 0]] * batch),
        f"{prefix}pooled_prompt_embeds": rng.normal(size=(batch, 8)).astype(np.float32),
    }


def test_several_images_and_videos_of_each(checkpoints):
    _, pipeline = checkpoints("concat")
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
    assert noises.shape == (4, *LATENTS)
    assert relative_error(noises[1], noises[0]) > 0.1
    alone = pipeline.prepare(pipeline.settings(**features(), image=images[0], **call))
    np.testing.assert_allclose(noises[:1], alone.state.latents, atol=1e-6)


def test_settings_default_to_the_papers(checkpoints):
    _, pipeline = checkpoints("T2V")
    run = pipeline.prepare(pipeline.settings(**features()))
    assert run.state.latents.shape == (1, 4, 33, 90, 160)
    assert run.schedule.num_steps == 50
    assert set(run.scales) == {1.0}
    assert run.conditions.number == 6000
    settings = pipeline.settings(**features(), **SIZE, num_inference_steps=2, flow_shift=3)
    shifted = pipeline.prepare(settings)
    np.testing.assert_allclose(shifted.schedule.timesteps, [1000, 750])
    np.testing.assert_allclose(run.schedule.timesteps[25], 875)


def test_sparsity_defaults_to_the_papers(checkpoints):
    _, pipeline = checkpoints("T2V")
    assert pipeline.paper_sparsity() is PAPER_PRESETS["hunyuanvideo-720p"]
    assert pipeline.paper_preset(544, 960) == pipeline.paper_preset(480, 832) == "hunyuanvideo-480p"
    assert pipeline.paper_preset(960, 960) == "hunyuanvideo-720p"


def test_weights_that_are_loaded_again_are_not_compiled_again(checkpoints):
    _, pipeline = checkpoints("T2V")
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


def test_sparse_steps_follow_the_warm_up(checkpoints):
    _, pipeline = checkpoints("replace")
    video = pipeline(
        **features(),
        **features(prefix="negative_"),
        image=picture(),
        true_cfg_scale=2.0,
        guidance_interval=(0, 0.5),
        num_inference_steps=4,
        sparsity=SparsityConfig(density=0.6, sampled_rows=4),
        warmup=Warmup(steps=0.25, layers=0.0),
        output_type="uint8",
        vae_tiling=True,
        **SIZE,
    )
    labels = [profile.labels.shape for profile in video.info.profiles]
    assert labels == [(3, 2, 2), (3, 1, 2), (3, 1, 2)]
    assert np.isfinite(video.latents).all()
    assert video.frames is not None
    assert video.frames.shape == (1, 9, 32, 48, 3)


NOISE = np.zeros((1, *LATENTS), np.float32)
MASK = np.array([[0, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        ("T2V", {}, "either a prompt or prompt_embeds"),
        ("T2V", {"prompt": "a", **features()}, "either a prompt or prompt_embeds"),
        ("T2V", {"prompt": []}, "at least one prompt"),
        ("T2V", {"prompt": "a", "height": 40}, "height must be a positive multiple of 16: got 40"),
        ("T2V", {"prompt": "a", "num_frames": 8}, r"num_frames must be of the form 4k \+ 1"),
        ("T2V", {"prompt": "a", "image": picture()}, "text-to-video checkpoint: it takes no image"),
        ("T2V", {"prompt": "a", "true_cfg_scale": 2.0}, "true_cfg_scale over 1 needs a negative"),
        (
            "T2V",
            {"prompt": "a", "num_videos_per_prompt": 0},
            "num_videos_per_prompt must be a whole number",
        ),
        ("T2V", {"prompt": "a", "latents": NOISE[:, :2]}, "latents must have the shape"),
        (
            "T2V",
            {"prompt": "a", "scheduler": "unipc", "flow_shift": -1},
            "flow_shift must be a number from 0.01 to 1000: got -1",
        ),
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
        ("replace", {"prompt": "a", "image_latents": NOISE[:, :, :1]}, "reads the image, too"),
        ("replace", {**features(), "image_latents": NOISE}, "image_latents must have the shape"),
        ("concat", {"prompt": "a", "image": picture(), "guidance_scale": 6}, "no guidance_scale"),
    ],
)
def test_arguments_that_do_not_fit(variant, arguments, message, checkpoints):
    pipeline = checkpoints(variant)[1]
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(pipeline.settings(**SIZE | arguments))


def test_the_command_line_takes_a_folder(checkpoints, tmp_path, monkeypatch, capsys):
    checkpoints("replace")
    picture().save(tmp_path / "dog.png")
    capsys.readouterr()  # what the libraries print when they write the checkpoint

    def call(*arguments):
        size = ["--height", "32", "--width", "48", "--num-frames", "9", "--steps", "2"]
        words = ["generate", "--model", checkpoints.folders["replace"], "--prompt", "a dog", *size]
        words += [*arguments, "-o", tmp_path / "dog.gif"]
        monkeypatch.setattr(sys, "argv", ["svg-jax", *map(str, words)])
        monkeypatch.setattr(logging.getLogger("svg_jax"), "handlers", [])
        monkeypatch.setattr(logging.getLogger("svg_jax"), "propagate", True)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, capsys.readouterr().err

    options = ["--image", tmp_path / "dog.png", "--attention", "dense"]
    assert call(*options, "--true-cfg-scale", "2") == (0, "")
    assert (tmp_path / "dog.gif").stat().st_size > 0
    code, error = call("--dynamic-cfg")
    assert (code, error) == (2, "svg-jax: this model takes no --dynamic-cfg\n")
