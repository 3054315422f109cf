"""Whole pipelines of Wan, of tiny random models and the released tokenizer."""

import json
from typing import Any

import diffusers
import numpy as np
import transformers
from parity import randomised
from real_tokenizers import real_tokenizer

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WITH_IMAGE = TRANSFORMER | {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24}
VARIANTS = {
    "T2V": TRANSFORMER,
    "I2V": WITH_IMAGE,
    "FLF2V": WITH_IMAGE | {"pos_embed_seq_len": 10},
}
VAE: dict[str, Any] = {
    "base_dim": 8,  # of 3 channels a norm makes much of a rounding error
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [0.9, 1.1, 0.7, 1.3],
}
T5: dict[str, Any] = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 32128,
}
CLIP: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
    "hidden_act": "gelu",
}
SCHEDULER: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
COMPONENTS = {
    "scheduler": "UniPCMultistepScheduler",
    "tokenizer": "T5TokenizerFast",
    "text_encoder": "UMT5EncoderModel",
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "image_encoder": "CLIPVisionModel",
    "image_processor": "CLIPImageProcessor",
}
SIZE = {"height": 32, "width": 48, "num_frames": 9}
CALL = SIZE | {"num_inference_steps": 4}
NOISE = (4, 3, 4, 6)
PROMPTS = ["A cat  &amp; a dog", "Surfing at dawn: waves, and an unusually long description of it"]


def write_checkpoint(folder, variant):
    """A pipeline folder with all parameters random; returns diffusers' pipeline of it."""
    encoder_config = transformers.UMT5Config(**T5, feed_forward_proj="gated-gelu")
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    modules: dict[str, Any] = {
        "transformer": randomised(diffusers.WanTransformer3DModel(**VARIANTS[variant]), 0),
        "vae": randomised(diffusers.AutoencoderKLWan(**VAE), 1),
        "text_encoder": randomised(transformers.UMT5EncoderModel(encoder_config), 2),
        "scheduler": diffusers.UniPCMultistepScheduler(**SCHEDULER),
        "tokenizer": tokenizer(
            tokenizer_file=str(real_tokenizer("t5-json") / "tokenizer.json"),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
    }
    if variant != "T2V":
        vision: Any = transformers.CLIPVisionModel
        processor: Any = transformers.CLIPImageProcessorPil
        modules["image_encoder"] = randomised(vision(transformers.CLIPVisionConfig(**CLIP)), 3)
        modules["image_processor"] = processor(size={"shortest_edge": 28}, crop_size=28)
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    kind = diffusers.WanPipeline if variant == "T2V" else diffusers.WanImageToVideoPipeline
    index: dict[str, Any] = {"_class_name": kind.__name__, "boundary_ratio": None}
    index |= {name: ["library", COMPONENTS[name]] for name in modules}
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe: Any = kind(**modules)
    return pipe


def noise(batch=1):
    return np.random.default_rng(1).normal(size=(batch, *NOISE)).astype(np.float32)


def embeds(batch=1, tokens=512, seed=2):
    return np.random.default_rng(seed).normal(size=(batch, tokens, 16)).astype(np.float32)


def features(batch=1):
    return {"prompt_embeds": embeds(batch)}
