"""The layouts in which Wan-AI released Wan 2.1 and 2.2, and their configs.

Names of the modules: Wan-Video/Wan2.1, wan/modules/{model,vae,t5,clip}.py, and Wan-Video/Wan2.2,
wan/modules/vae2_2.py.
"""

import math
import re
from typing import Any

from svg_jax.convert.releases.renaming import (
    Layout,
    Origin,
    Shapes,
    count_layers,
    rename,
    split_heads,
)

# The other tower of CLIP, and what is only needed to compare an image with a text.
_CLIP_UNUSED = re.compile(r"textual\..*|log_scale|visual\.head")
_HEAD_DIM = 128  # in all released transformers
_CLIP_HEAD_DIM = 80
# Statistics of the 48 latent channels of 2.2 (wan/modules/vae2_2.py there).
_RESIDUAL_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_RESIDUAL_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


def transformer_table(_: Shapes) -> list[Origin]:
    """Rename `diffusion_pytorch_model*.safetensors`, all sizes and tasks of 2.1 and 2.2."""
    block, embedder = "blocks.{}", "condition_embedder"
    names = {
        "patch_embedding": "patch_embedding",
        "time_embedding.0": f"{embedder}.time_embedder.linear_1",
        "time_embedding.2": f"{embedder}.time_embedder.linear_2",
        "time_projection.1": f"{embedder}.time_proj",
        "text_embedding.0": f"{embedder}.text_embedder.linear_1",
        "text_embedding.2": f"{embedder}.text_embedder.linear_2",
        "img_emb.proj.0": f"{embedder}.image_embedder.norm1",
        "img_emb.proj.1": f"{embedder}.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": f"{embedder}.image_embedder.ff.net.2",
        "img_emb.proj.4": f"{embedder}.image_embedder.norm2",
        "img_emb.emb_pos": f"{embedder}.image_embedder.pos_embed",
        f"{block}.modulation": f"{block}.scale_shift_table",
        f"{block}.norm3": f"{block}.norm2",
        f"{block}.ffn.0": f"{block}.ffn.net.0.proj",
        f"{block}.ffn.2": f"{block}.ffn.net.2",
        f"{block}.cross_attn.k_img": f"{block}.attn2.add_k_proj",
        f"{block}.cross_attn.v_img": f"{block}.attn2.add_v_proj",
        f"{block}.cross_attn.norm_k_img": f"{block}.attn2.norm_added_k",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }
    parts = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    parts |= {"norm_q": "norm_q", "norm_k": "norm_k"}
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        names |= {f"{block}.{theirs}.{a}": f"{block}.{ours}.{b}" for a, b in parts.items()}
    return rename(names)


def transformer_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of a transformer off its shapes; all have heads of one size."""
    width, channels, *patch = shapes["patch_embedding.weight"]
    image_dim = shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else None
    positions = shapes.get("img_emb.emb_pos")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "in_channels": channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": count_layers(shapes, "blocks.{}.modulation"),
        "image_dim": image_dim,
        "added_kv_proj_dim": None if image_dim is None else width,
        "pos_embed_seq_len": positions and positions[1],
    }


def _vae_names() -> dict[str, str]:
    """Rename what both VAEs have in common: all but the layers between two sizes."""
    names = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for coder in ("encoder", "decoder"):
        middle = f"{coder}.mid_block"
        names |= {
            f"{coder}.conv1": f"{coder}.conv_in",
            f"{coder}.head.0": f"{coder}.norm_out",
            f"{coder}.head.2": f"{coder}.conv_out",
            **_residual(f"{coder}.middle.0", f"{middle}.resnets.0"),
            **_residual(f"{coder}.middle.2", f"{middle}.resnets.1"),
            f"{coder}.middle.1.norm": f"{middle}.attentions.0.norm",
            f"{coder}.middle.1.to_qkv": f"{middle}.attentions.0.to_qkv",
            f"{coder}.middle.1.proj": f"{middle}.attentions.0.proj",
        }
    return names


def vae_table(_: Shapes) -> list[Origin]:
    """Rename `Wan2.1_VAE.pth`: one list of layers for all sizes, in each half."""
    names = _vae_names()
    names |= _residual("encoder.downsamples.{}", "encoder.down_blocks.{}")
    names |= _resample("encoder.downsamples.{}", "encoder.down_blocks.{}")
    for level in range(4):
        first, target = 4 * level, f"decoder.up_blocks.{level}"
        for layer in range(3):
            source = f"decoder.upsamples.{first + layer}"
            names |= _residual(source, f"{target}.resnets.{layer}")
        names |= _resample(f"decoder.upsamples.{first + 3}", f"{target}.upsamplers.0")
    return rename(names)


def residual_vae_table(_: Shapes) -> list[Origin]:
    """Rename `Wan2.2_VAE.pth`: one list of layers for each size, the last of which resizes."""
    names = _vae_names()
    for coder, way, last in (("encoder", "down", 2), ("decoder", "up", 3)):
        source, target = f"{coder}.{way}samples.{{}}", f"{coder}.{way}_blocks.{{}}"
        names |= _residual(f"{source}.{way}samples.{{}}", f"{target}.resnets.{{}}")
        names |= _resample(f"{source}.{way}samples.{last}", f"{target}.{way}sampler")
    return rename(names)


def _residual(source: str, target: str) -> dict[str, str]:
    return {
        f"{source}.residual.0": f"{target}.norm1",
        f"{source}.residual.2": f"{target}.conv1",
        f"{source}.residual.3": f"{target}.norm2",
        f"{source}.residual.6": f"{target}.conv2",
        f"{source}.shortcut": f"{target}.conv_shortcut",
    }


def _resample(source: str, target: str) -> dict[str, str]:
    return {f"{source}.{layer}": f"{target}.{layer}" for layer in ("resample.1", "time_conv")}


def vae_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of 2.1's VAE, which Wan 2.2's 14B models use as well, off its shapes."""
    return {"base_dim": shapes["encoder.conv1.weight"][0], "z_dim": shapes["conv2.weight"][0]}


def residual_vae_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of the VAE of 2.2's TI2V-5B; the latents' statistics are the release's."""
    return {
        **vae_config(shapes, None),
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "is_residual": True,
        "in_channels": shapes["encoder.conv1.weight"][1],
        "out_channels": shapes["decoder.head.2.weight"][0],
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": _RESIDUAL_MEAN,
        "latents_std": _RESIDUAL_STD,
    }


def umt5_table(_: Shapes) -> list[Origin]:
    """Rename `models_t5_umt5-xxl-enc-bf16.pth`, which holds only the encoder."""
    source, target = "blocks.{}", "encoder.block.{}"
    attention, feed_forward = f"{target}.layer.0", f"{target}.layer.1"
    return rename(
        {
            "token_embedding": "shared",
            f"{source}.norm1": f"{attention}.layer_norm",
            **{f"{source}.attn.{n}": f"{attention}.SelfAttention.{n}" for n in "qkvo"},
            f"{source}.pos_embedding.embedding": (
                f"{attention}.SelfAttention.relative_attention_bias"
            ),
            f"{source}.norm2": f"{feed_forward}.layer_norm",
            f"{source}.ffn.gate.0": f"{feed_forward}.DenseReluDense.wi_0",
            f"{source}.ffn.fc1": f"{feed_forward}.DenseReluDense.wi_1",
            f"{source}.ffn.fc2": f"{feed_forward}.DenseReluDense.wo",
            "norm": "encoder.final_layer_norm",
        }
    )


def umt5_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of the text encoder off its shapes; the rest is as in `T5Config`."""
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocabulary, width = shapes["token_embedding.weight"]
    return {
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": count_layers(shapes, "blocks.{}.norm1.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def clip_table(_: Shapes) -> list[Origin]:
    """Rename the image tower of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`."""
    source, target = "visual.transformer.{}", "vision_model.encoder.layers.{}"
    embeddings = "vision_model.embeddings"
    return [
        split_heads(f"{source}.attn.to_qkv", f"{target}.self_attn.*_proj"),
        *rename(
            {
                "visual.patch_embedding": f"{embeddings}.patch_embedding",
                "visual.pre_norm": "vision_model.pre_layrnorm",
                "visual.post_norm": "vision_model.post_layernorm",
                f"{source}.norm1": f"{target}.layer_norm1",
                f"{source}.attn.proj": f"{target}.self_attn.out_proj",
                f"{source}.norm2": f"{target}.layer_norm2",
                f"{source}.mlp.0": f"{target}.mlp.fc1",
                f"{source}.mlp.2": f"{target}.mlp.fc2",
            }
        ),
        *rename(
            {
                "visual.cls_embedding": f"{embeddings}.class_embedding",
                "visual.pos_embedding": f"{embeddings}.position_embedding.weight",
            },
            squeeze=True,
        ),
    ]


def clip_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of the image tower off its shapes."""
    width, channels, patch, _ = shapes["visual.patch_embedding.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.0.mlp.0.weight"][0],
        "num_hidden_layers": count_layers(shapes, "visual.transformer.{}.norm1.weight"),
        "num_attention_heads": width // _CLIP_HEAD_DIM,
        "num_channels": channels,
        "image_size": patch * math.isqrt(shapes["visual.pos_embedding"][1] - 1),
        "patch_size": patch,
        "hidden_act": "gelu",
    }


TRANSFORMER = Layout("blocks.0.self_attn.q.weight", transformer_config, transformer_table)
VAE = Layout("decoder.upsamples.0.residual.0.gamma", vae_config, vae_table)
RESIDUAL_VAE = Layout(
    "decoder.upsamples.0.upsamples.0.residual.0.gamma", residual_vae_config, residual_vae_table
)
TEXT_ENCODER = Layout("blocks.0.pos_embedding.embedding.weight", umt5_config, umt5_table)
IMAGE_ENCODER = Layout(
    "visual.transformer.0.attn.to_qkv.weight", clip_config, clip_table, _CLIP_UNUSED
)
