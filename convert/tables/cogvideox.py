"""The tensors of a CogVideoX transformer, as released by diffusers and as laid out here."""

import math
import re

from svg_jax.convert.tables.rules import (
    FEED_FORWARD,
    Rule,
    heads_rules,
    linear_rules,
    mlp_rules,
    norm_rules,
    patch_rules,
    stack_rules,
)
from svg_jax.models.cogvideox_config import CogVideoXConfig

# The sin-cos table, which is computed anew. Where positions are learned, a rule asks for them.
UNUSED = re.compile(r"patch_embed\.pos_embedding")


def rules(config: CogVideoXConfig) -> tuple[Rule, ...]:
    """Build the table of a `CogVideoXTransformer3DModel`."""
    width, head_dim, time = config.width, config.attention_head_dim, config.time_embed_dim
    patch, text = config.patch_shape, config.text_embed_dim
    out_features = config.out_channels * math.prod(patch)

    layer = [
        *linear_rules("norm1.linear", "attention_modulation", time, 6 * width),
        *norm_rules("norm1.norm", "attention_norm", width),
        *heads_rules("attn1.to_{}", "attention", width),
        *norm_rules("attn1.norm_q", "attention.query_norm", head_dim),
        *norm_rules("attn1.norm_k", "attention.key_norm", head_dim),
        *linear_rules("attn1.to_out.0", "attention.output", width, width),
        *linear_rules("norm2.linear", "feed_forward_modulation", time, 6 * width),
        *norm_rules("norm2.norm", "feed_forward_norm", width),
        *mlp_rules("ff", "feed_forward", (width, 4 * width, width), FEED_FORWARD),
    ]
    table = [
        *mlp_rules("time_embedding", "time_embedding", (width, time, time)),
        *linear_rules("patch_embed.text_proj", "text_projection", text, width),
        *stack_rules("transformer_blocks", "blocks", config.num_layers, layer),
        *norm_rules("norm_final", "final_norm", width),
        *linear_rules("norm_out.linear", "output_modulation", time, 2 * width),
        *norm_rules("norm_out.norm", "output_norm", width),
        *linear_rules("proj_out", "output_projection", width, out_features),
    ]
    patches = ("patch_embed.proj", "patch_projection")
    if config.patch_size_t is None:  # a convolution in 1.0
        table += patch_rules(*patches, config.in_channels, width, patch[1:])
    else:
        table += linear_rules(*patches, config.in_channels * math.prod(patch), width)
    if config.ofs_embed_dim is not None:
        table += mlp_rules("ofs_embedding", "ofs_embedding", (time, time, time))
    if config.use_learned_positional_embeddings:
        tokens = config.max_text_seq_length + math.prod(config.sample_grid)
        name = "patch_embed.pos_embedding"
        table.append(Rule(name, "position_embedding", "none", (1, tokens, width)))
    return tuple(table)
