"""The tensors of CogVideoX's video autoencoder, as released by diffusers and as laid out here."""

from svg_jax.convert.tables.rules import Rule, conv_rules, norm_rules, pointwise_rules
from svg_jax.models.cogvideox_vae_config import CogVideoXVAEConfig

_CUBE, _SQUARE = (3, 3, 3), (3, 3)


def rules(config: CogVideoXVAEConfig) -> tuple[Rule, ...]:
    """The table; source names are those of `AutoencoderKLCogVideoX`."""
    return (*_encoder(config), *_decoder(config))


def _encoder(config: CogVideoXVAEConfig) -> list[Rule]:
    widths = config.block_out_channels
    last = len(widths) - 1
    blocks = []
    for level, width in enumerate(widths):
        source, target = f"encoder.down_blocks.{level}", f"encoder.blocks.{level}"
        before = widths[max(level - 1, 0)]
        for layer in range(config.layers_per_block):
            blocks += _layer(source, target, layer, before if layer == 0 else width, width, None)
        if level < last:
            blocks += conv_rules(
                f"{source}.downsamplers.0.conv", f"{target}.resize.conv", width, width, _SQUARE
            )
    for layer in range(2):
        names = ("encoder.mid_block", f"encoder.blocks.{last + 1}")
        blocks += _layer(*names, layer, widths[-1], widths[-1], None)
    return [
        *conv_rules("encoder.conv_in.conv", "encoder.input", config.in_channels, widths[0], _CUBE),
        *blocks,
        *norm_rules("encoder.norm_out", "encoder.norm", widths[-1]),
        *conv_rules(
            "encoder.conv_out.conv",
            "encoder.output",
            widths[-1],
            2 * config.latent_channels,
            _CUBE,
        ),
    ]


def _decoder(config: CogVideoXVAEConfig) -> list[Rule]:
    widths = config.block_out_channels[::-1]
    latents = config.latent_channels
    blocks = []
    for layer in range(2):
        names = ("decoder.mid_block", "decoder.blocks.0")
        blocks += _layer(*names, layer, widths[0], widths[0], latents)
    for level, width in enumerate(widths):
        source, target = f"decoder.up_blocks.{level}", f"decoder.blocks.{level + 1}"
        before = widths[max(level - 1, 0)]
        for layer in range(config.layers_per_block + 1):
            blocks += _layer(source, target, layer, before if layer == 0 else width, width, latents)
        if level < len(widths) - 1:
            blocks += conv_rules(
                f"{source}.upsamplers.0.conv", f"{target}.resize.conv", width, width, _SQUARE
            )
    return [
        *conv_rules("decoder.conv_in.conv", "decoder.input", latents, widths[0], _CUBE),
        *blocks,
        *_norm("decoder.norm_out", "decoder.norm", widths[-1], latents),
        *conv_rules(
            "decoder.conv_out.conv", "decoder.output", widths[-1], config.out_channels, _CUBE
        ),
    ]


def _layer(
    source: str, target: str, layer: int, features: int, width: int, latents: int | None
) -> list[Rule]:
    """One residual layer of a block; `latents` is the channels of those that its norms take."""
    source, target = f"{source}.resnets.{layer}", f"{target}.layers.{layer}"
    table = [
        *_norm(f"{source}.norm1", f"{target}.norm_1", features, latents),
        *conv_rules(f"{source}.conv1.conv", f"{target}.conv_1", features, width, _CUBE),
        *_norm(f"{source}.norm2", f"{target}.norm_2", width, latents),
        *conv_rules(f"{source}.conv2.conv", f"{target}.conv_2", width, width, _CUBE),
    ]
    if features != width:
        shortcut = f"{source}.conv_shortcut", f"{target}.shortcut"
        table += pointwise_rules(*shortcut, features, width, rank=3)
    return table


def _norm(source: str, target: str, features: int, latents: int | None) -> list[Rule]:
    if latents is None:
        return norm_rules(source, target, features)
    return [
        *norm_rules(f"{source}.norm_layer", f"{target}.norm", features),
        *pointwise_rules(f"{source}.conv_y.conv", f"{target}.scale", latents, features, rank=3),
        *pointwise_rules(f"{source}.conv_b.conv", f"{target}.shift", latents, features, rank=3),
    ]
