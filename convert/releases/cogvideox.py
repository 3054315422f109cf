"""The layouts in which CogVideoX was released for SAT, and their configs.

Names of the modules: zai-org/CogVideo, sat/dit_video_concat.py, sat/vae_modules/cp_enc_dec.py and
tools/convert_weight_sat2hf.py.
"""

import math
import re
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

# Tables that are computed anew, and what only training needs.
_UNUSED = re.compile(r".*(embed_tokens|freqs_(sin|cos)|position_embedding).*|mixins\.pos_embed\..*")
_VAE_UNUSED = re.compile(r"loss\..*")
_POSITIONS = "mixins.pos_embed.pos_embedding"
_WIDTH_OF_2B = 1920  # the only one without a rotary embedding
_LATENTS = 16  # channels; any other number betrays a patch of another size
_LEVELS = 4  # of the VAE


def transformer_table(shapes: Shapes) -> list[Origin]:
    """Rename `mp_rank_00_model_states.pt` of 1.0 and 1.5, text and image to video."""
    source, target = "transformer.layers.{}", "transformer_blocks.{}"
    norms = "mixins.adaln_layer"
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "ofs_embed.0": "ofs_embedding.linear_1",
        "ofs_embed.2": "ofs_embedding.linear_2",
        "mixins.patch_embed.proj": "patch_embed.proj",
        "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        f"{source}.attention.dense": f"{target}.attn1.to_out.0",
        f"{source}.input_layernorm": f"{target}.norm1.norm",
        f"{source}.post_attention_layernorm": f"{target}.norm2.norm",
        f"{source}.mlp.dense_h_to_4h": f"{target}.ff.net.0.proj",
        f"{source}.mlp.dense_4h_to_h": f"{target}.ff.net.2",
        f"{norms}.query_layernorm_list.{{}}": f"{target}.attn1.norm_q",
        f"{norms}.key_layernorm_list.{{}}": f"{target}.attn1.norm_k",
        "transformer.final_layernorm": "norm_final",
        "mixins.final_layer.norm_final": "norm_out.norm",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
        "mixins.final_layer.linear": "proj_out",
    }
    if _has_positions(shapes):
        names[_POSITIONS] = "patch_embed.pos_embedding"
    # Shift, scale and gate of the video's attention and feed-forward, then of the text's.
    modulations = (
        (f"{target}.norm1.linear", (0, 1, 2, 6, 7, 8)),
        (f"{target}.norm2.linear", (3, 4, 5, 9, 10, 11)),
    )
    return [
        *rename(names),
        split_heads(f"{source}.attention.query_key_value", f"{target}.attn1.to_*"),
        Origin(f"{norms}.adaLN_modulations.{{}}.1", modulations, 12),
    ]


def _has_positions(shapes: Shapes) -> bool:
    """Tell whether positions are learned (5B-I2V); files of 2B may hold computed ones."""
    return _POSITIONS in shapes and shapes["transformer.final_layernorm.weight"] != (_WIDTH_OF_2B,)


def transformer_config(shapes: Shapes, _: Any) -> dict[str, Any]:
    """Read the config of a transformer off its shapes; the videos' sizes are the release's."""
    projection = shapes["mixins.patch_embed.proj.weight"]
    width = projection[0]
    convolution = len(projection) == 4  # in 1.0
    patch = (1, 2, 2) if convolution else (2, 2, 2)
    (head_dim,) = shapes["mixins.adaln_layer.query_layernorm_list.0.weight"]
    ofs = shapes.get("ofs_embed.0.weight")
    out_channels = shapes["mixins.final_layer.linear.weight"][0] // math.prod(patch)
    if out_channels != _LATENTS:
        raise ValueError(f"{out_channels} latent channels")
    return {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": projection[1] if convolution else projection[1] // math.prod(patch),
        "out_channels": out_channels,
        "time_embed_dim": shapes["time_embed.0.weight"][0],
        "ofs_embed_dim": ofs and ofs[0],
        "text_embed_dim": shapes["mixins.patch_embed.text_proj.weight"][1],
        "num_layers": count_layers(shapes, "transformer.layers.{}.input_layernorm.weight"),
        "sample_width": 90 if convolution else 300,
        "sample_height": 60 if convolution else 300,
        "sample_frames": 49 if convolution else 81,
        "patch_size": 2,
        "patch_size_t": None if convolution else 2,
        "use_rotary_positional_embeddings": width != _WIDTH_OF_2B,
        "use_learned_positional_embeddings": _has_positions(shapes),
        "patch_bias": convolution,
    }


def vae_table(_: Shapes) -> list[Origin]:
    """Rename `3d-vae.pt`, which counts the decoder's levels from the other end."""
    names = {}
    for coder in ("encoder", "decoder"):
        for name in ("conv_in.conv", "conv_out.conv"):
            names[f"{coder}.{name}"] = f"{coder}.{name}"
        for layer in range(2):
            names |= _layer(f"{coder}.mid.block_{layer + 1}", f"{coder}.mid_block.resnets.{layer}")
        names |= _norm(f"{coder}.norm_out", f"{coder}.norm_out")
    for level in range(_LEVELS):
        for source, target, resize in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", "downsample"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{_LEVELS - 1 - level}", "upsample"),
        ):
            names |= _layer(f"{source}.block.{{}}", f"{target}.resnets.{{}}")
            names[f"{source}.{resize}.conv"] = f"{target}.{resize}rs.0.conv"
    return rename(names)


def _layer(source: str, target: str) -> dict[str, str]:
    return {
        **_norm(f"{source}.norm1", f"{target}.norm1"),
        f"{source}.conv1.conv": f"{target}.conv1.conv",
        **_norm(f"{source}.norm2", f"{target}.norm2"),
        f"{source}.conv2.conv": f"{target}.conv2.conv",
        f"{source}.nin_shortcut": f"{target}.conv_shortcut",
    }


def _norm(source: str, target: str) -> dict[str, str]:
    """Rename a norm of the encoder, or one of the decoder, which takes the latents."""
    parts = ("", ".norm_layer", ".conv_y.conv", ".conv_b.conv")
    return {f"{source}{part}": f"{target}{part}" for part in parts}


def vae_config(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the config of a VAE off its shapes.

    Raises:
        ConversionError: If `given` lacks the scale of the latents.
    """
    if "scaling_factor" not in given:
        raise ConversionError(
            "the weights do not tell the scale of the latents: give scaling_factor, 1.15258426 for "
            "2B and 0.7 for 5B and 1.5, and for 1.5 also invert_scale_latents, true (in "
            'config.json, beside its "_class_name").'
        )
    first = "encoder.down.{}.block.0.conv1.conv.weight"
    widths = tuple(shapes[first.format(level)][0] for level in range(_LEVELS))
    return {
        "in_channels": shapes["encoder.conv_in.conv.weight"][1],
        "out_channels": shapes["decoder.conv_out.conv.weight"][0],
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": count_layers(shapes, "encoder.down.0.block.{}.conv1.conv.weight"),
    }


TRANSFORMER = Layout(
    "transformer.layers.0.attention.query_key_value.weight",
    transformer_config,
    transformer_table,
    _UNUSED,
)
VAE = Layout("decoder.up.0.block.0.norm1.conv_y.conv.weight", vae_config, vae_table, _VAE_UNUSED)
