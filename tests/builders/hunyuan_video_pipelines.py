"""Whole pipelines of HunyuanVideo, of tiny random models and the released tokenizers."""

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import transformers
from parity import ExactSinusoids, randomised
from real_tokenizers import real_tokenizer

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
CALL = SIZE | {"num_inference_steps": 3}
NOISE = (4, 3, 4, 6)


def llava():
    ids: dict[str, Any] = {"image_token_index": 128257, "pad_token_id": 128258}
    config = transformers.LlavaConfig(text_config=LLAMA, vision_config=VISION, **ids)
    return transformers.LlavaForConditionalGeneration(config)


def reference_pipeline(variant) -> Any:
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


def write_checkpoint(folder, variant):
    """A pipeline folder as it is released; returns diffusers' pipeline of it."""
    reference = reference_pipeline(variant)
    index: dict[str, Any] = {"_class_name": type(reference).__name__}
    for name, part in reference.components.items():
        library = type(part).__module__.split(".")[0]
        index[name] = [library, type(part).__name__]
        if "tokenizer" not in name:
            part.save_pretrained(folder / name)
    shutil.copytree(real_tokenizer("llama3"), folder / "tokenizer")
    shutil.copytree(real_tokenizer("clip"), folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps(index))
    reference.transformer.time_text_embed.add_module("time_proj", ExactSinusoids())
    return reference


def noise(batch=1, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, *NOISE)).astype(np.float32)


def picture(seed=2, size=(50, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return PIL.Image.fromarray(pixels).resize((3 * size[0], 2 * size[1]))


def features(batch=1, prefix=""):
    rng = np.random.default_rng(3)
    return {
        f"{prefix}prompt_embeds": rng.normal(size=(batch, 5, 16)).astype(np.float32),
        f"{prefix}prompt_attention_mask": np.array([[1, 1, 1, 0, 0]] * batch),
        f"{prefix}pooled_prompt_embeds": rng.normal(size=(batch, 8)).astype(np.float32),
    }
