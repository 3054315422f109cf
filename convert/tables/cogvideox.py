"""The tensors of a CogVideoX transformer, as released by diffusers and as laid out here."""

import math
import re

from svg_jax.convert.tables.rules import Rule, linear_rules, norm_rules, stack_rules
from svg_jax.models.cogvideox_config import CogVideoXConfig

# The sin-cos table, which is computed anew; where it is learned, a rule asks for it.
UNUSED = re.compile(r"patch_embed\.pos_embedding")


def rules(config: CogVideoXConfig) -> tuple[Rule, ...]:
    """The table of one variant: source names are those of `CogVideoXTransformer3DModel`."""
    width, head_dim, time = config.width, config.attention_head_dim, config.time_embed_dim
    patch, text = config.patch_shape, config.text_embed_dim

    layer = [
        *linear_rules("norm1.linear", "attention_modulation", time, 6 * width),
        *norm_rules("norm1.norm", "attention_norm", width),
        *linear_rules("attn1.to_q", "attention.query", width, width),
        *linear_rules("attn1.to_k", "attention.key", width, width),
        *linear_rules("attn1.to_v", "attention.value", width, width),
        *norm_rules("attn1.norm_q", "attention.query_norm", head_dim),
        *norm_rules("attn1.norm_k", "attention.key_norm", head_dim),
        *linear_rules("attn1.to_out.0", "attention.output", width, width),
        *linear_rules("norm2.linear", "feed_forward_modulation", time, 6 * width),
        *norm_rules("norm2.norm", "feed_forward_norm", width),
        *linear_rules("ff.net.0.proj", "feed_forward.input", width, 4 * width),
        *linear_rules("ff.net.2", "feed_forward.output", 4 * width, width),
    ]
    table = [
        *linear_rules("time_embedding.linear_1", "time_embedding.input", width, time),
        *linear_rules("time_embedding.linear_2", "time_embedding.output", time, time),
        *linear_rules("patch_embed.text_proj", "text_projection", text, width),
        *stack_rules("transformer_blocks", "blocks", config.num_layers, layer),
        *norm_rules("norm_final", "final_norm", width),
        *linear_rules("norm_out.linear", "output_modulation", time, 2 * width),
        *norm_rules("norm_out.norm", "output_norm", width),
        *linear_rules(
            "proj_out", "output_projection", width, config.out_channels * math.prod(patch)
        ),
    ]
    if config.patch_size_t is None:  # a convolution in 1.0
        kernel = (width, config.in_channels, *patch[1:])
        table += [
            Rule("patch_embed.proj.weight", "patch_projection.kernel", "patch", kernel),
            Rule("patch_embed.proj.bias", "patch_projection.bias", "none", (width,)),
        ]
    else:
        features = config.in_channels * math.prod(patch)
        table += linear_rules("patch_embed.proj", "patch_projection", features, width)
    if config.ofs_embed_dim is not None:
        table += linear_rules("ofs_embedding.linear_1", "ofs_embedding.input", time, time)
        table += linear_rules("ofs_embedding.linear_2", "ofs_embedding.output", time, time)
    if config.use_learned_positional_embeddings:
        tokens = config.max_text_seq_length + math.prod(config.sample_grid)
        name = "patch_embed.pos_embedding"
        table.append(Rule(name, "position_embedding", "none", (1, tokens, width)))
    return tuple(table)
