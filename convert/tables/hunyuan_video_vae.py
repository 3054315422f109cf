"""The tensors of HunyuanVideo's autoencoder, as released by diffusers and as laid out here."""

from itertools import pairwise

from svg_jax.convert.tables.rules import (
    Rule,
    conv_rules,
    heads_rules,
    linear_rules,
    norm_rules,
    patch_rules,
)
from svg_jax.models.hunyuan_video_vae_config import HunyuanVideoVAEConfig

_CUBE, _POINT = (3, 3, 3), (1, 1, 1)


def rules(config: HunyuanVideoVAEConfig) -> tuple[Rule, ...]:
    """Build the table of an `AutoencoderKLHunyuanVideo`."""
    widths, latents = config.block_out_channels, config.latent_channels
    layers = config.layers_per_block
    return (
        *_coder(config, "encoder", config.in_channels, widths, 2 * latents, layers),
        *patch_rules("quant_conv", "encoder.moments", 2 * latents, 2 * latents, _POINT),
        *patch_rules("post_quant_conv", "decoder.latents", latents, latents, _POINT),
        *_coder(config, "decoder", latents, widths[::-1], config.out_channels, layers + 1),
    )


def _coder(
    config: HunyuanVideoVAEConfig,
    coder: str,
    channels: int,
    widths: tuple[int, ...],
    out_channels: int,
    layers: int,
) -> list[Rule]:
    down = coder == "encoder"
    blocks, resize = ("down_blocks", "downsamplers") if down else ("up_blocks", "upsamplers")
    table = [
        *conv_rules(f"{coder}.conv_in.conv", f"{coder}.input", channels, widths[0], _CUBE),
        *_middle(config, coder),
    ]
    for block, (features, width) in enumerate(pairwise((widths[0], *widths))):
        source, target = f"{coder}.{blocks}.{block}", f"{coder}.blocks.{block}"
        for layer in range(layers):
            table += _layer(source, target, layer, width if layer else features, width)
        if config.factors[block] is not None:
            conv = f"{target}.resize" if down else f"{target}.resize.conv"
            table += conv_rules(f"{source}.{resize}.0.conv.conv", conv, width, width, _CUBE)
    return [
        *table,
        *norm_rules(f"{coder}.conv_norm_out", f"{coder}.norm", widths[-1]),
        *conv_rules(f"{coder}.conv_out.conv", f"{coder}.output", widths[-1], out_channels, _CUBE),
    ]


def _middle(config: HunyuanVideoVAEConfig, coder: str) -> list[Rule]:
    width = config.block_out_channels[-1]
    source, target = f"{coder}.mid_block", f"{coder}.middle"
    table = [rule for layer in range(2) for rule in _layer(source, target, layer, width, width)]
    if config.mid_block_add_attention:
        source, target = f"{source}.attentions.0", f"{target}.attention"
        table += norm_rules(f"{source}.group_norm", f"{target}.norm", width)
        table += heads_rules(f"{source}.to_{{}}", target, width)
        table += linear_rules(f"{source}.to_out.0", f"{target}.output", width, width)
    return table


def _layer(source: str, target: str, layer: int, features: int, width: int) -> list[Rule]:
    """Map one residual layer of a block."""
    source, target = f"{source}.resnets.{layer}", f"{target}.layers.{layer}"
    table = [
        *norm_rules(f"{source}.norm1", f"{target}.norm_1", features),
        *conv_rules(f"{source}.conv1.conv", f"{target}.conv_1", features, width, _CUBE),
        *norm_rules(f"{source}.norm2", f"{target}.norm_2", width),
        *conv_rules(f"{source}.conv2.conv", f"{target}.conv_2", width, width, _CUBE),
    ]
    if features != width:
        shortcut = f"{source}.conv_shortcut.conv", f"{target}.shortcut"
        table += patch_rules(*shortcut, features, width, _POINT)
    return table
