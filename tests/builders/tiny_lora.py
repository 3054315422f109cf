"""Random LoRAs for tiny random transformers of all families, in a pipeline's folder each."""

import json

import diffusers
import numpy as np
import torch
from jax.typing import DTypeLike
from safetensors.numpy import load_file, save_file
from tiny_configs import COGVIDEOX, HUNYUAN_VIDEO, WAN_I2V

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# Pipeline, transformer, its config, modules that a LoRA changes; the last is a convolution.
FAMILIES = {
    "CogVideoX": (
        diffusers.CogVideoXPipeline,
        diffusers.CogVideoXTransformer3DModel,
        COGVIDEOX,
        (
            "transformer_blocks.0.attn1.to_q",
            "transformer_blocks.1.attn1.to_out.0",
            "transformer_blocks.1.ff.net.0.proj",
            "transformer_blocks.0.norm1.linear",
            "proj_out",
            "patch_embed.proj",
        ),
    ),
    "HunyuanVideo": (
        diffusers.HunyuanVideoPipeline,
        diffusers.HunyuanVideoTransformer3DModel,
        HUNYUAN_VIDEO,
        (
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.1.attn.add_k_proj",
            "transformer_blocks.1.ff_context.net.2",
            "single_transformer_blocks.1.proj_mlp",
            "context_embedder.token_refiner.refiner_blocks.0.attn.to_v",
            "x_embedder.proj",
        ),
    ),
    "Wan": (
        diffusers.WanPipeline,
        diffusers.WanTransformer3DModel,
        WAN_I2V,
        (
            "blocks.0.attn1.to_q",
            "blocks.1.attn2.to_out.0",
            "blocks.1.attn2.add_k_proj",
            "blocks.0.ffn.net.2",
            "condition_embedder.time_proj",
            "patch_embedding",
        ),
    ),
}
Q = "blocks.0.attn1.to_q"  # of Wan
# Wan's modules, and what the first release calls them.
WAN_BLOCK = {
    f"attn{number}.{ours}": f"{attention}.{theirs}"
    for number, attention in ((1, "self_attn"), (2, "cross_attn"))
    for ours, theirs in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}.items()
} | {
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
WAN_NAMES = {
    f"blocks.{layer}.{ours}": f"blocks.{layer}.{theirs}"
    for layer in range(2)
    for ours, theirs in WAN_BLOCK.items()
}


def write_source(folder, family="Wan", dtype: DTypeLike = np.float32):
    """A pipeline's folder with a random transformer."""
    pipeline, make, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    make(**config).save_pretrained(folder / "transformer")
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)
    index = {"_class_name": pipeline.__name__, "transformer": ["diffusers", make.__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def random_lora(source, modules, ranks=(4,), bias=False):
    """A and B of each module, by diffusers' names, of one rank after the other."""
    random = np.random.default_rng(1)
    tensors = load_file(source / WEIGHTS)
    lora = {}
    for number, module in enumerate(modules):
        out, *rest = tensors[f"{module}.weight"].shape
        rank = ranks[number % len(ranks)]
        lora[f"{module}.lora_A.weight"] = random.normal(size=(rank, *rest))
        lora[f"{module}.lora_B.weight"] = random.normal(size=(out, rank, *[1] * (len(rest) - 1)))
        if bias:
            lora[f"{module}.lora_B.bias"] = random.normal(size=out)
    return {name: (0.3 * tensor).astype(np.float32) for name, tensor in lora.items()}


def save_lora(file, lora, prefix="transformer.", **config):
    """Writes a LoRA as diffusers does, its config among the metadata."""
    metadata = {"format": "pt"}
    if config:
        values = {f"{prefix}{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(values)
    file.parent.mkdir(exist_ok=True)
    save_file({f"{prefix}{name}": tensor for name, tensor in lora.items()}, file, metadata)
    return file


def renamed(lora, names):
    """A LoRA under a release's names, "down" and "up" as kohya calls them."""
    kinds = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}
    found = {}
    for name, tensor in lora.items():
        module, _, kind = name.rpartition(".lora_")
        found[f"{names[module]}.{kinds[kind]}"] = tensor
    return found


def open_pipeline(source, family):
    """diffusers' pipeline of the transformer alone, in float32."""
    pipeline, make, _, _ = FAMILIES[family]
    transformer = make.from_pretrained(source / "transformer", torch_dtype=torch.float32)
    parts = {
        name: None
        for name in pipeline.__init__.__annotations__
        if name not in ("return", "boundary_ratio", "expand_timesteps")
    }
    return pipeline(**parts | {"transformer": transformer})


def fuse(source, family, *loras, scale=1.0):
    """The weights that diffusers fuses LoRAs into, in float32."""
    pipe = open_pipeline(source, family)
    names = [f"lora{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipe.load_lora_weights(lora, adapter_name=name)
    pipe.set_adapters(names)
    pipe.fuse_lora(lora_scale=scale, adapter_names=names)
    pipe.unload_lora_weights()
    return weights_of(pipe.transformer)


def weights_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
