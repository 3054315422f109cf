"""The tensors of a HunyuanVideo transformer, as released by diffusers and as laid out here."""

import math

from svg_jax.convert.tables.rules import Rule, gain_rule, linear_rules, norm_rules, stack_rules
from svg_jax.models.hunyuan_video_config import HunyuanVideoConfig


def rules(config: HunyuanVideoConfig) -> tuple[Rule, ...]:
    """The table of one variant: source names are those of `HunyuanVideoTransformer3DModel`."""
    width, mlp_width, head_dim = config.width, config.mlp_width, config.attention_head_dim
    patch, features = config.patch_shape, config.text_embed_dim
    embedder, refiner = "context_embedder", "context_embedder.token_refiner.refiner_blocks"

    refiner_block = [
        *linear_rules("norm_out.linear", "modulation", width, 2 * width),
        *norm_rules("norm1", "attention_norm", width),
        *_heads("attn.to_{}", "heads", width),
        *linear_rules("attn.to_out.0", "output", width, width),
        *norm_rules("norm2", "feed_forward_norm", width),
        *_feed_forward("ff", "feed_forward", width, 4 * width),
    ]
    double_block = [
        *linear_rules("norm1.linear", "video.modulation", width, 6 * width),
        *_heads("attn.to_{}", "video.heads", width),
        *_gains("attn.norm_{}", "video.heads", head_dim),
        *linear_rules("attn.to_out.0", "video.output", width, width),
        *_feed_forward("ff", "video.feed_forward", width, mlp_width),
        *linear_rules("norm1_context.linear", "text.modulation", width, 6 * width),
        *_heads("attn.add_{}_proj", "text.heads", width),
        *_gains("attn.norm_added_{}", "text.heads", head_dim),
        *linear_rules("attn.to_add_out", "text.output", width, width),
        *_feed_forward("ff_context", "text.feed_forward", width, mlp_width),
    ]
    single_block = [
        *linear_rules("norm.linear", "modulation", width, 3 * width),
        *_heads("attn.to_{}", "heads", width),
        *_gains("attn.norm_{}", "heads", head_dim),
        *linear_rules("proj_mlp", "feed_forward", width, mlp_width),
        *linear_rules("proj_out", "output", width + mlp_width, width),
    ]
    return (
        *_conditioning(
            "time_text_embed",
            "conditioning",
            config.pooled_projection_dim,
            width,
            guided=config.guidance_embeds,
        ),
        *_conditioning(
            f"{embedder}.time_text_embed",
            "token_refiner.conditioning",
            features,
            width,
            guided=False,
        ),
        *linear_rules(f"{embedder}.proj_in", "token_refiner.projection", features, width),
        *stack_rules(refiner, "token_refiner.blocks", config.num_refiner_layers, refiner_block),
        Rule(
            "x_embedder.proj.weight",
            "patch_projection.kernel",
            "patch",
            (width, config.in_channels, *patch),
        ),
        Rule("x_embedder.proj.bias", "patch_projection.bias", "none", (width,)),
        *stack_rules("transformer_blocks", "double_blocks", config.num_layers, double_block),
        *stack_rules(
            "single_transformer_blocks", "single_blocks", config.num_single_layers, single_block
        ),
        *linear_rules("norm_out.linear", "output_modulation", width, 2 * width),
        *linear_rules(
            "proj_out", "output_projection", width, config.out_channels * math.prod(patch)
        ),
    )


def _conditioning(
    source: str, target: str, text_features: int, width: int, *, guided: bool
) -> list[Rule]:
    parts = [
        ("timestep_embedder", "time_embedding", 256),
        ("text_embedder", "text_embedding", text_features),
    ]
    if guided:
        parts.append(("guidance_embedder", "guidance_embedding", 256))
    return [
        rule
        for theirs, ours, features in parts
        for rule in (
            *linear_rules(f"{source}.{theirs}.linear_1", f"{target}.{ours}.input", features, width),
            *linear_rules(f"{source}.{theirs}.linear_2", f"{target}.{ours}.output", width, width),
        )
    ]


def _heads(source: str, target: str, width: int) -> list[Rule]:
    names = (("q", "query"), ("k", "key"), ("v", "value"))
    return [
        rule
        for theirs, ours in names
        for rule in linear_rules(source.format(theirs), f"{target}.{ours}", width, width)
    ]


def _gains(source: str, target: str, head_dim: int) -> list[Rule]:
    return [
        gain_rule(source.format(theirs), f"{target}.{ours}_norm", head_dim)
        for theirs, ours in (("q", "query"), ("k", "key"))
    ]


def _feed_forward(source: str, target: str, width: int, hidden: int) -> list[Rule]:
    return [
        *linear_rules(f"{source}.net.0.proj", f"{target}.input", width, hidden),
        *linear_rules(f"{source}.net.2", f"{target}.output", hidden, width),
    ]
