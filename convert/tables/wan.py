"""The tensors of a Wan transformer, as released by diffusers and as laid out here."""

import math
import re

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
from svg_jax.models.wan_config import WanConfig

# Files of 2.1 I2V hold this to no effect: the text's queries attend to the image's tokens.
UNUSED = re.compile(r".*\.attn2\.norm_added_q\.weight")


def rules(config: WanConfig) -> tuple[Rule, ...]:
    """Build the table of a `WanTransformer3DModel`."""
    width, patch, embedder = config.width, config.patch_size, "condition_embedder"
    out_features = config.out_channels * math.prod(patch)

    layer = [
        Rule("scale_shift_table", "modulation", "none", (1, 6, width)),
        *_attention("attn1", "self_attention", width),
        *norm_rules("norm2", "cross_attention_norm", width),
        *_attention("attn2", "cross_attention", width),
        *mlp_rules("ffn", "feed_forward", (width, config.ffn_dim, width), FEED_FORWARD),
    ]
    time, text = (config.freq_dim, width, width), (config.text_dim, width, width)
    table = [
        *patch_rules("patch_embedding", "patch_projection", config.in_channels, width, patch),
        *mlp_rules(f"{embedder}.time_embedder", "time_embedding", time),
        *linear_rules(f"{embedder}.time_proj", "time_projection", width, 6 * width),
        *mlp_rules(f"{embedder}.text_embedder", "text_embedding", text),
        Rule("scale_shift_table", "output_modulation", "none", (1, 2, width)),
        *linear_rules("proj_out", "output_projection", width, out_features),
    ]
    if config.image_dim is not None:
        image, ours, features = f"{embedder}.image_embedder", "image_embedding", config.image_dim
        widths = (features, features, width)
        table += [
            *norm_rules(f"{image}.norm1", f"{ours}.input_norm", features),
            *mlp_rules(f"{image}.ff", f"{ours}.feed_forward", widths, FEED_FORWARD),
            *norm_rules(f"{image}.norm2", f"{ours}.output_norm", width),
        ]
        if config.pos_embed_seq_len is not None:
            shape = (1, config.pos_embed_seq_len, features)
            table.append(Rule(f"{image}.pos_embed", f"{ours}.positions", "none", shape))
        layer += [
            *linear_rules("attn2.add_k_proj", "image_keys.key", width, width),
            *linear_rules("attn2.add_v_proj", "image_keys.value", width, width),
            gain_rule("attn2.norm_added_k", "image_keys.key_norm", width),
        ]
    return (*table, *stack_rules("blocks", "blocks", config.num_layers, layer))


def _attention(source: str, target: str, width: int) -> list[Rule]:
    return [
        *heads_rules(f"{source}.to_{{}}", target, width),
        gain_rule(f"{source}.norm_q", f"{target}.query_norm", width),
        gain_rule(f"{source}.norm_k", f"{target}.key_norm", width),
        *linear_rules(f"{source}.to_out.0", f"{target}.output", width, width),
    ]
