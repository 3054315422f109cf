"""The tensors of a Wan VAE, as released by diffusers and as laid out here."""

from svg_jax.convert.tables.rules import Rule, conv_rules, pointwise_rules
from svg_jax.models.wan_vae_config import WanVAEConfig


def rules(config: WanVAEConfig) -> tuple[Rule, ...]:
    """The table of one variant: source names are those of `AutoencoderKLWan`."""
    latents = config.z_dim
    return (
        *_encoder(config),
        *pointwise_rules("quant_conv", "posterior_projection", 2 * latents, 2 * latents, rank=3),
        *pointwise_rules("post_quant_conv", "latent_projection", latents, latents, rank=3),
        *_decoder(config),
    )


def _encoder(config: WanVAEConfig) -> list[Rule]:
    widths, steps = config.encoder_widths, config.temperal_downsample
    table = conv_rules(
        "encoder.conv_in", "encoder.input", config.in_channels, config.base_dim, (3, 3, 3)
    )
    features, number = config.base_dim, 0  # 2.1 counts blocks and steps of all levels in one list
    for level, width in enumerate(widths):
        target = f"encoder.layers.{level}"
        for block in range(config.num_res_blocks):
            source = f"encoder.down_blocks.{number}"
            if config.is_residual:
                source = f"encoder.down_blocks.{level}.resnets.{block}"
            table += _residual_block(source, f"{target}.blocks.{block}", features, width)
            features, number = width, number + 1
        if level < len(steps):
            source = f"encoder.down_blocks.{number}"
            if config.is_residual:
                source = f"encoder.down_blocks.{level}.downsampler"
            table += _resample(source, f"{target}.resample", width, width)
            if steps[level]:
                table += conv_rules(
                    f"{source}.time_conv", f"{target}.resample.time_conv", width, width, (3, 1, 1)
                )
            number += 1
    table += _middle("encoder", len(widths), widths[-1])
    table += _head("encoder", widths[-1], 2 * config.z_dim)
    return table


def _decoder(config: WanVAEConfig) -> list[Rule]:
    widths, steps = config.decoder_widths, config.temperal_downsample[::-1]
    table = conv_rules("decoder.conv_in", "decoder.input", config.z_dim, widths[0], (3, 3, 3))
    table += _middle("decoder", 0, widths[0])
    features = widths[0]
    for level, width in enumerate(widths):
        source, target = f"decoder.up_blocks.{level}", f"decoder.layers.{level + 3}"
        for block in range(config.num_res_blocks + 1):
            table += _residual_block(
                f"{source}.resnets.{block}", f"{target}.blocks.{block}", features, width
            )
            features = width
        if level < len(steps):
            features = width if config.is_residual else width // 2
            source += ".upsampler" if config.is_residual else ".upsamplers.0"
            table += _resample(source, f"{target}.resample", width, features)
            if steps[level]:
                table += conv_rules(
                    f"{source}.time_conv",
                    f"{target}.resample.time_conv",
                    width,
                    2 * width,
                    (3, 1, 1),
                )
    table += _head("decoder", widths[-1], config.out_channels)
    return table


def _middle(coder: str, first: int, width: int) -> list[Rule]:
    source = f"{coder}.mid_block"
    resnet, attention, other = (f"{coder}.layers.{first + layer}" for layer in range(3))
    return [
        *_residual_block(f"{source}.resnets.0", resnet, width, width),
        _gain(f"{source}.attentions.0.norm", f"{attention}.norm", width, 2),
        *pointwise_rules(
            f"{source}.attentions.0.to_qkv",
            f"{attention}.query_key_value",
            width,
            3 * width,
            rank=2,
        ),
        *pointwise_rules(
            f"{source}.attentions.0.proj", f"{attention}.output", width, width, rank=2
        ),
        *_residual_block(f"{source}.resnets.1", other, width, width),
    ]


def _head(coder: str, width: int, channels: int) -> list[Rule]:
    return [
        _gain(f"{coder}.norm_out", f"{coder}.norm", width, 3),
        *conv_rules(f"{coder}.conv_out", f"{coder}.output", width, channels, (3, 3, 3)),
    ]


def _residual_block(source: str, target: str, features: int, out_features: int) -> list[Rule]:
    table = [
        _gain(f"{source}.norm1", f"{target}.norm1", features, 3),
        *conv_rules(f"{source}.conv1", f"{target}.conv1", features, out_features, (3, 3, 3)),
        _gain(f"{source}.norm2", f"{target}.norm2", out_features, 3),
        *conv_rules(f"{source}.conv2", f"{target}.conv2", out_features, out_features, (3, 3, 3)),
    ]
    if features != out_features:
        table += pointwise_rules(
            f"{source}.conv_shortcut", f"{target}.shortcut", features, out_features, rank=3
        )
    return table


def _resample(source: str, target: str, features: int, out_features: int) -> list[Rule]:
    return conv_rules(f"{source}.resample.1", f"{target}.conv", features, out_features, (3, 3))


def _gain(source: str, target: str, features: int, axes: int) -> Rule:
    return Rule(f"{source}.gamma", f"{target}.scale", "flatten", (features, *(1,) * axes))
