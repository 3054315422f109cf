"""The tensors of a HunyuanVideo transformer, as released by diffusers and as laid out here."""

import math
from collections.abc import Mapping

from svg_jax.convert.tables.rules import (
    FEED_FORWARD,
    Rule,
    gain_rule,
    heads_rules,
    linear_rules,
    mlp_rules,
    norm_rules,
    patch_rules,
    stack_rules,
)
from svg_jax.models.hunyuan_video_config import HunyuanVideoConfig

_TIME_FEATURES = 256


def rules(config: HunyuanVideoConfig) -> tuple[Rule, ...]:
    """Build the table of a `HunyuanVideoTransformer3DModel`."""
    width, head_dim = config.width, config.attention_head_dim
    patch, features = config.patch_shape, config.text_embed_dim
    out_features = config.out_channels * math.prod(patch)
    feed_forward = (width, config.mlp_width, width)
    embedder, refiner = "context_embedder", "context_embedder.token_refiner.refiner_blocks"

    refiner_block = [
        *linear_rules("norm_out.linear", "modulation", width, 2 * width),
        *norm_rules("norm1", "attention_norm", width),
        *heads_rules("attn.to_{}", "heads", width),
        *linear_rules("attn.to_out.0", "output", width, width),
        *norm_rules("norm2", "feed_forward_norm", width),
        *mlp_rules("ff", "feed_forward", (width, 4 * width, width), FEED_FORWARD),
    ]
    double_block = [
        *linear_rules("norm1.linear", "video.modulation", width, 6 * width),
        *heads_rules("attn.to_{}", "video.heads", width),
        *_gains("attn.norm_{}", "video.heads", head_dim),
        *linear_rules("attn.to_out.0", "video.output", width, width),
        *mlp_rules("ff", "video.feed_forward", feed_forward, FEED_FORWARD),
        *linear_rules("norm1_context.linear", "text.modulation", width, 6 * width),
        *heads_rules("attn.add_{}_proj", "text.heads", width),
        *_gains("attn.norm_added_{}", "text.heads", head_dim),
        *linear_rules("attn.to_add_out", "text.output", width, width),
        *mlp_rules("ff_context", "text.feed_forward", feed_forward, FEED_FORWARD),
    ]
    single_block = [
        *linear_rules("norm.linear", "modulation", width, 3 * width),
        *heads_rules("attn.to_{}", "heads", width),
        *_gains("attn.norm_{}", "heads", head_dim),
        *linear_rules("proj_mlp", "feed_forward", width, config.mlp_width),
        *linear_rules("proj_out", "output", width + config.mlp_width, width),
    ]
    embedders = {"timestep": _TIME_FEATURES, "text": config.pooled_projection_dim}
    if config.guidance_embeds:
        embedders["guidance"] = _TIME_FEATURES
    refining = (f"{embedder}.time_text_embed", "token_refiner.conditioning")
    single = ("single_transformer_blocks", "single_blocks")
    return (
        *_conditioning("time_text_embed", "conditioning", embedders, width),
        *_conditioning(*refining, {"timestep": _TIME_FEATURES, "text": features}, width),
        *linear_rules(f"{embedder}.proj_in", "token_refiner.projection", features, width),
        *stack_rules(refiner, "token_refiner.blocks", config.num_refiner_layers, refiner_block),
        *patch_rules("x_embedder.proj", "patch_projection", config.in_channels, width, patch),
        *stack_rules("transformer_blocks", "double_blocks", config.num_layers, double_block),
        *stack_rules(*single, config.num_single_layers, single_block),
        *linear_rules("norm_out.linear", "output_modulation", width, 2 * width),
        *linear_rules("proj_out", "output_projection", width, out_features),
    )


def _conditioning(source: str, target: str, embedders: Mapping[str, int], width: int) -> list[Rule]:
    """Map the embedders of the conditioning, given the features that each of them takes."""
    return [
        rule
        for name, features in embedders.items()
        for rule in mlp_rules(
            f"{source}.{name}_embedder",
            f"{target}.{name.removesuffix('step')}_embedding",
            (features, width, width),
        )
    ]


def _gains(source: str, target: str, head_dim: int) -> list[Rule]:
    return [
        gain_rule(source.format(theirs), f"{target}.{ours}_norm", head_dim)
        for theirs, ours in (("q", "query"), ("k", "key"))
    ]
