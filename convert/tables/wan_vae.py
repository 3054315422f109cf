"""The tensors of a Wan VAE, as released by diffusers and as laid out here."""

from svg_jax.convert.tables.rules import Rule, conv_rules, patch_rules
from svg_jax.models.wan_vae_config import WanVAEConfig

_CUBE, _SQUARE, _POINT = (3, 3, 3), (3, 3), (1, 1, 1)
_FRAMES = (3, 1, 1)


def rules(config: WanVAEConfig) -> tuple[Rule, ...]:
    """Build the table of an `AutoencoderKLWan`."""
    latents = config.z_dim
    return (
        *_encoder(config),
        *patch_rules("quant_conv", "posterior_projection", 2 * latents, 2 * latents, _POINT),
        *patch_rules("post_quant_conv", "latent_projection", latents, latents, _POINT),
        *_decoder(config),
    )


def _encoder(config: WanVAEConfig) -> list[Rule]:
    widths, steps = config.encoder_widths, config.temperal_downsample
    features, number = config.base_dim, 0  # 2.1 counts blocks and steps of all levels in one list
    table = conv_rules("encoder.conv_in", "encoder.input", config.in_channels, features, _CUBE)
    for level, width in enumerate(widths):
        target = f"encoder.layers.{level}"
        for block in range(config.num_res_blocks):
            name = f"{level}.resnets.{block}" if config.is_residual else f"{number}"
            source = f"encoder.down_blocks.{name}"
            table += _residual_block(source, f"{target}.blocks.{block}", features, width)
            features, number = width, number + 1
        if level < len(steps):
            name = f"{level}.downsampler" if config.is_residual else f"{number}"
            source, target = f"encoder.down_blocks.{name}", f"{target}.resample"
            table += _resample(source, target, width, width, width if steps[level] else None)
            number += 1
    table += _middle("encoder", len(widths), widths[-1])
    table += _head("encoder", widths[-1], 2 * config.z_dim)
    return table


def _decoder(config: WanVAEConfig) -> list[Rule]:
    widths, steps = config.decoder_widths, config.temperal_downsample[::-1]
    features = widths[0]
    table = conv_rules("decoder.conv_in", "decoder.input", config.z_dim, features, _CUBE)
    table += _middle("decoder", 0, features)
    for level, width in enumerate(widths):
        source, target = f"decoder.up_blocks.{level}", f"decoder.layers.{level + 3}"
        for block in range(config.num_res_blocks + 1):
            names = f"{source}.resnets.{block}", f"{target}.blocks.{block}"
            table += _residual_block(*names, features, width)
            features = width
        if level < len(steps):
            features = width if config.is_residual else width // 2
            source += ".upsampler" if config.is_residual else ".upsamplers.0"
            doubled = 2 * width if steps[level] else None
            table += _resample(source, f"{target}.resample", width, features, doubled)
    table += _head("decoder", widths[-1], config.out_channels)
    return table


def _middle(coder: str, first: int, width: int) -> list[Rule]:
    source = f"{coder}.mid_block"
    resnet, attention, other = (f"{coder}.layers.{first + layer}" for layer in range(3))
    heads = (f"{source}.attentions.0.to_qkv", f"{attention}.query_key_value")
    output = (f"{source}.attentions.0.proj", f"{attention}.output")
    return [
        *_residual_block(f"{source}.resnets.0", resnet, width, width),
        _gain(f"{source}.attentions.0.norm", f"{attention}.norm", width, 2),
        *patch_rules(*heads, width, 3 * width, (1, 1)),
        *patch_rules(*output, width, width, (1, 1)),
        *_residual_block(f"{source}.resnets.1", other, width, width),
    ]


def _head(coder: str, width: int, channels: int) -> list[Rule]:
    return [
        _gain(f"{coder}.norm_out", f"{coder}.norm", width, 3),
        *conv_rules(f"{coder}.conv_out", f"{coder}.output", width, channels, _CUBE),
    ]


def _residual_block(source: str, target: str, features: int, width: int) -> list[Rule]:
    table = [
        _gain(f"{source}.norm1", f"{target}.norm1", features, 3),
        *conv_rules(f"{source}.conv1", f"{target}.conv1", features, width, _CUBE),
        _gain(f"{source}.norm2", f"{target}.norm2", width, 3),
        *conv_rules(f"{source}.conv2", f"{target}.conv2", width, width, _CUBE),
    ]
    if features != width:
        shortcut = f"{source}.conv_shortcut", f"{target}.shortcut"
        table += patch_rules(*shortcut, features, width, _POINT)
    return table


def _resample(
    source: str, target: str, features: int, out_features: int, time_features: int | None
) -> list[Rule]:
    """Map a step between two sizes; it resizes time, too, if `time_features` is not None."""
    table = conv_rules(f"{source}.resample.1", f"{target}.conv", features, out_features, _SQUARE)
    if time_features is not None:
        names = f"{source}.time_conv", f"{target}.time_conv"
        table += conv_rules(*names, features, time_features, _FRAMES)
    return table


def _gain(source: str, target: str, features: int, axes: int) -> Rule:
    return Rule(f"{source}.gamma", f"{target}.scale", "flatten", (features, *(1,) * axes))
