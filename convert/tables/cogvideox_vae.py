"""The tensors of CogVideoX's video autoencoder, as released by diffusers and as laid out here."""

from itertools import pairwise

from svg_jax.convert.tables.rules import Rule, conv_rules, norm_rules, patch_rules
from svg_jax.models.cogvideox_vae_config import CogVideoXVAEConfig

_CUBE, _SQUARE, _POINT = (3, 3, 3), (3, 3), (1, 1, 1)


def rules(config: CogVideoXVAEConfig) -> tuple[Rule, ...]:
    """Build the table of an `AutoencoderKLCogVideoX`."""
    widths, latents = config.block_out_channels, config.latent_channels
    layers = config.layers_per_block
    down = _levels("encoder", ("down_blocks", "downsamplers"), 0, widths, layers, None)
    up = _levels("decoder", ("up_blocks", "upsamplers"), 1, widths[::-1], layers + 1, latents)
    encoder = [*down, *_middle("encoder", len(widths), widths[-1], None)]
    decoder = [*_middle("decoder", 0, widths[-1], latents), *up]
    return (
        *conv_rules("encoder.conv_in.conv", "encoder.input", config.in_channels, widths[0], _CUBE),
        *encoder,
        *_norm("encoder.norm_out", "encoder.norm", widths[-1], None),
        *conv_rules("encoder.conv_out.conv", "encoder.output", widths[-1], 2 * latents, _CUBE),
        *conv_rules("decoder.conv_in.conv", "decoder.input", latents, widths[-1], _CUBE),
        *decoder,
        *_norm("decoder.norm_out", "decoder.norm", widths[0], latents),
        *conv_rules(
            "decoder.conv_out.conv", "decoder.output", widths[0], config.out_channels, _CUBE
        ),
    )


def _levels(
    coder: str,
    names: tuple[str, str],
    first: int,
    widths: tuple[int, ...],
    layers: int,
    latents: int | None,
) -> list[Rule]:
    """Map the blocks of all sizes, each of which but the last one ends by resizing.

    Args:
        coder: Name of the encoder or decoder.
        names: Names of its blocks and of the layers that resize.
        first: Index of the first of these blocks in the port.
        widths: Channels of each block.
        layers: Layers of each block.
        latents: Channels of the latents that the norms take; None if they take none.
    """
    (blocks, resize), table = names, []
    for level, (features, width) in enumerate(pairwise((widths[0], *widths))):
        source, target = f"{coder}.{blocks}.{level}", f"{coder}.blocks.{first + level}"
        for layer in range(layers):
            table += _layer(source, target, layer, width if layer else features, width, latents)
        if level < len(widths) - 1:
            conv = (f"{source}.{resize}.0.conv", f"{target}.resize.conv")
            table += conv_rules(*conv, width, width, _SQUARE)
    return table


def _middle(coder: str, block: int, width: int, latents: int | None) -> list[Rule]:
    source, target = f"{coder}.mid_block", f"{coder}.blocks.{block}"
    return [
        rule for layer in range(2) for rule in _layer(source, target, layer, width, width, latents)
    ]


def _layer(
    source: str, target: str, layer: int, features: int, width: int, latents: int | None
) -> list[Rule]:
    """Map one residual layer of a block."""
    source, target = f"{source}.resnets.{layer}", f"{target}.layers.{layer}"
    table = [
        *_norm(f"{source}.norm1", f"{target}.norm_1", features, latents),
        *conv_rules(f"{source}.conv1.conv", f"{target}.conv_1", features, width, _CUBE),
        *_norm(f"{source}.norm2", f"{target}.norm_2", width, latents),
        *conv_rules(f"{source}.conv2.conv", f"{target}.conv_2", width, width, _CUBE),
    ]
    if features != width:
        shortcut = f"{source}.conv_shortcut", f"{target}.shortcut"
        table += patch_rules(*shortcut, features, width, _POINT)
    return table


def _norm(source: str, target: str, features: int, latents: int | None) -> list[Rule]:
    if latents is None:
        return norm_rules(source, target, features)
    return [
        *norm_rules(f"{source}.norm_layer", f"{target}.norm", features),
        *patch_rules(f"{source}.conv_y.conv", f"{target}.scale", latents, features, _POINT),
        *patch_rules(f"{source}.conv_b.conv", f"{target}.shift", latents, features, _POINT),
    ]
