"""The HunyuanVideo pipeline against diffusers' own, from prompt and image to latents and frames."""

import json
import shutil
from typing import Any

import diffusers
import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from parity import TOLERANCE, ExactSinusoids, randomised, relative_error
from real_tokenizers import real_tokenizer

from svg_jax.config import SparsityConfig
from svg_jax.convert import convert_pipeline
from svg_jax.sampling import HunyuanVideoPipeline, from_pretrained

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
PROCESSOR = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
SIZE = {"height": 32, "width": 48, "num_frames": 9}
LATENTS = (4, 3, 4, 6)
NUM_STEPS = 3
FRAMES_TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def llava():
    config = transformers.LlavaConfig(
        text_config=LLAMA, vision_config=VISION, image_token_index=128257, pad_token_id=128258
    )
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """diffusers' pipeline and ours of each variant, made when asked for."""
    made = {}

    def make(variant) -> tuple[Any, HunyuanVideoPipeline]:
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            reference = reference_pipeline(variant)
            write_checkpoint(folder / "source", reference)
            reference.transformer.time_text_embed.add_module("time_proj", ExactSinusoids())
            convert_pipeline(folder / "source", folder / "out")
            made[variant] = reference, from_pretrained(folder / "out", dtype="float32")
        return made[variant]

    return make


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
