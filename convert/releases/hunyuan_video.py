"""The layouts in which Tencent released HunyuanVideo, and their configs.

Names of the modules: Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/{models,token_refiner}.py and
hyvideo/vae/autoencoder_kl_causal_3d.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.releases.renaming import (
    Layout,
    Origin,
    Shapes,
    count_layers,
    rename,
    split_heads,
)

_CONDITION = "image_condition_type"


def transformer_table(shapes: Shapes) -> list[Origin]:
    """Rename `mp_rank_00_model_states.pt`: text to video, and both kinds of image to video."""
    width = shapes["single_blocks.0.linear2.weight"][0]
    pieces = max(4, shapes["single_blocks.0.linear1.weight"][0] // width)  # three, and an MLP's
    return module_table(pieces)


def module_table(pieces: int = 4) -> list[Origin]:
    """Rename the modules of a transformer of any size.

    Args:
        pieces: Number of parts of the first layer of a single block: queries, keys, values, and
            those of an MLP. To rename tensors, each part must be as wide as the model.
    """
    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    heads = tuple((f"{single}.attn.to_{part}", (row,)) for row, part in enumerate("qkv"))
    fused = (*heads, (f"{single}.proj_mlp", tuple(range(3, pieces))))
    names = {
        "img_in.proj": "x_embedder.proj",
        **_embedding("time_in.mlp", "time_text_embed.timestep_embedder"),
        **_embedding("guidance_in.mlp", "time_text_embed.guidance_embedder"),
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "single_blocks.{}.linear2": f"{single}.proj_out",
        "single_blocks.{}.q_norm": f"{single}.attn.norm_q",
        "single_blocks.{}.k_norm": f"{single}.attn.norm_k",
        "single_blocks.{}.modulation.linear": f"{single}.norm.linear",
        "final_layer.linear": "proj_out",
    }
    for stream, norm, to_out, added, block in (
        ("img", "norm1", "to_out.0", "", "ff"),
        ("txt", "norm1_context", "to_add_out", "added_", "ff_context"),
    ):
        source = f"double_blocks.{{}}.{stream}"
        names |= {
            f"{source}_mod.linear": f"{double}.{norm}.linear",
            f"{source}_attn_q_norm": f"{double}.attn.norm_{added}q",
            f"{source}_attn_k_norm": f"{double}.attn.norm_{added}k",
            f"{source}_attn_proj": f"{double}.attn.{to_out}",
            f"{source}_mlp.fc1": f"{double}.{block}.net.0.proj",
            f"{source}_mlp.fc2": f"{double}.{block}.net.2",
        }
    return [
        *rename(names),
        split_heads("double_blocks.{}.img_attn_qkv", f"{double}.attn.to_*"),
        split_heads("double_blocks.{}.txt_attn_qkv", f"{double}.attn.add_*_proj"),
        Origin("single_blocks.{}.linear1", fused, pieces),
        # shift and scale change places
        Origin("final_layer.adaLN_modulation.1", (("norm_out.linear", (1, 0)),), 2),
        *_refiner_table(),
    ]


def _refiner_table() -> list[Origin]:
    source = "txt_in.individual_token_refiner.blocks.{}"
    target = "context_embedder.token_refiner.refiner_blocks.{}"
    conditioning = "context_embedder.time_text_embed"
    return [
        split_heads(f"{source}.self_attn_qkv", f"{target}.attn.to_*"),
        *rename(
            {
                "txt_in.input_embedder": "context_embedder.proj_in",
                **_embedding("txt_in.t_embedder.mlp", f"{conditioning}.timestep_embedder"),
                "txt_in.c_embedder.linear_1": f"{conditioning}.text_embedder.linear_1",
                "txt_in.c_embedder.linear_2": f"{conditioning}.text_embedder.linear_2",
                f"{source}.norm1": f"{target}.norm1",
                f"{source}.norm2": f"{target}.norm2",
                f"{source}.adaLN_modulation.1": f"{target}.norm_out.linear",
                f"{source}.self_attn_proj": f"{target}.attn.to_out.0",
                f"{source}.mlp.fc1": f"{target}.ff.net.0.proj",
                f"{source}.mlp.fc2": f"{target}.ff.net.2",
            }
        ),
    ]


def _embedding(source: str, target: str) -> dict[str, str]:
    return {f"{source}.0": f"{target}.linear_1", f"{source}.2": f"{target}.linear_2"}


def transformer_config(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the config of a transformer off its shapes.

    Raises:
        ConversionError: If it has 16 channels, which two tasks have in common, and `given` does not
            name the task.
    """
    width, channels, *patch = shapes["img_in.proj.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn_q_norm.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] // math.prod(patch)
    if channels == out_channels and _CONDITION not in given:
        raise ConversionError(
            f"the weights do not tell text to video from image to video: give {_CONDITION}, None "
            "or 'token_replace' (in config.json, beside its \"_class_name\"; None is null there)."
        )
    refiner = "txt_in.individual_token_refiner.blocks.{}.norm1.weight"
    return {
        "in_channels": channels,
        "out_channels": out_channels,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count_layers(shapes, "double_blocks.{}.img_attn_proj.weight"),
        "num_single_layers": count_layers(shapes, "single_blocks.{}.linear2.weight"),
        "num_refiner_layers": count_layers(shapes, refiner),
        "mlp_ratio": shapes["double_blocks.0.img_mlp.fc1.weight"][0] / width,
        "patch_size": patch[1],
        "patch_size_t": patch[0],
        "guidance_embeds": "guidance_in.mlp.0.weight" in shapes,
        "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        _CONDITION: None if channels == out_channels else "latent_concat",
    }


def vae_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of the VAE (`vae/pytorch_model.pt`) off its shapes."""
    first = "encoder.down_blocks.{}.resnets.0.conv1.conv.weight"
    layer = "encoder.down_blocks.0.resnets.{}.conv1.conv.weight"
    blocks = count_layers(shapes, first)
    return {
        "in_channels": shapes["encoder.conv_in.conv.weight"][1],
        "out_channels": shapes["decoder.conv_out.conv.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "down_block_types": ("HunyuanVideoDownBlock3D",) * blocks,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * blocks,
        "block_out_channels": tuple(shapes[first.format(block)][0] for block in range(blocks)),
        "layers_per_block": count_layers(shapes, layer),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


TRANSFORMER = Layout("double_blocks.0.img_attn_qkv.weight", transformer_config, transformer_table)
VAE = Layout("decoder.up_blocks.0.upsamplers.0.conv.conv.weight", vae_config)
