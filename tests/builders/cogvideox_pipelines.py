"""Pipelines of CogVideoX, of tiny random models: without text encoder, and but one without VAE."""

import json
from typing import Any

import diffusers
import numpy as np
import torch
from tiny_configs import COGVIDEOX, COGVIDEOX_2B

MODEL_1_5 = COGVIDEOX | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300}
VARIANTS = {
    "2b": COGVIDEOX_2B,
    "5b": COGVIDEOX,
    "1.5": MODEL_1_5 | {"sample_width": 300},
    "1.5-I2V": MODEL_1_5 | {"sample_width": 300, "in_channels": 8, "ofs_embed_dim": 16},
    "5b, VAE": COGVIDEOX,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
    "snr_shift_scale": 1.0,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 4,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}
CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 5}
NOISE = (3, 4, 8, 8)


def write_checkpoint(folder, variant):
    """A pipeline folder with all parameters random; returns diffusers' pipeline of it."""
    torch.manual_seed(0)
    modules: dict[str, Any] = {
        "transformer": diffusers.CogVideoXTransformer3DModel(**VARIANTS[variant])
    }
    if "VAE" in variant:
        modules["vae"] = diffusers.AutoencoderKLCogVideoX(**VAE)
    for name, module in modules.items():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        module.eval().save_pretrained(folder / name)
    scheduler = diffusers.CogVideoXDDIMScheduler(**SCHEDULER)
    scheduler.save_pretrained(folder / "scheduler")
    image_to_video = "I2V" in variant
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if image_to_video else "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    missing: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    kind = diffusers.CogVideoXPipeline
    if image_to_video:
        kind = diffusers.CogVideoXImageToVideoPipeline
    return kind(**missing | modules, scheduler=scheduler)


def noise(batch=1):
    return np.random.default_rng(1).normal(size=(batch, *NOISE)).astype(np.float32)


def features(batch=1):
    embeds = np.random.default_rng(2).normal(size=(batch, 8, 16))
    return {"prompt_embeds": embeds.astype(np.float32)}
