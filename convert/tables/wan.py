"""The tensors of a Wan transformer, as released by diffusers and as laid out here."""

import math
import re

from svg_jax.convert.tables.rules import Rule, gain_rule, linear_rules, norm_rules, stack_rules
from svg_jax.models.wan_config import WanConfig

# Held by files of 2.1 I2V, to no effect: image tokens are attended to with the queries of the text.
UNUSED = re.compile(r".*\.attn2\.norm_added_q\.weight")


def rules(config: WanConfig) -> tuple[Rule, ...]:
    """The table of one variant: source names are those of `WanTransformer3DModel`."""
    width = config.width
    condition = "condition_embedder"
    kernel = (width, config.in_channels, *config.patch_size)
    out = config.out_channels * math.prod(config.patch_size)

    layer = [
        Rule("scale_shift_table", "modulation", "none", (1, 6, width)),
        *_attention("attn1", "self_attention", width),
        *norm_rules("norm2", "cross_attention_norm", width),
        *_attention("attn2", "cross_attention", width),
        *linear_rules("ffn.net.0.proj", "feed_forward.input", width, config.ffn_dim),
        *linear_rules("ffn.net.2", "feed_forward.output", config.ffn_dim, width),
    ]
    table = [
        Rule("patch_embedding.weight", "patch_projection.kernel", "patch", kernel),
        Rule("patch_embedding.bias", "patch_projection.bias", "none", (width,)),
        *linear_rules(
            f"{condition}.time_embedder.linear_1", "time_embedding.input", config.freq_dim, width
        ),
        *linear_rules(f"{condition}.time_embedder.linear_2", "time_embedding.output", width, width),
        *linear_rules(f"{condition}.time_proj", "time_projection", width, 6 * width),
        *linear_rules(
            f"{condition}.text_embedder.linear_1", "text_embedding.input", config.text_dim, width
        ),
        *linear_rules(f"{condition}.text_embedder.linear_2", "text_embedding.output", width, width),
        Rule("scale_shift_table", "output_modulation", "none", (1, 2, width)),
        *linear_rules("proj_out", "output_projection", width, out),
    ]
    if config.image_dim is not None:
        image, ours = f"{condition}.image_embedder", "image_embedding"
        features = config.image_dim
        table += [
            *norm_rules(f"{image}.norm1", f"{ours}.input_norm", features),
            *linear_rules(
                f"{image}.ff.net.0.proj", f"{ours}.feed_forward.input", features, features
            ),
            *linear_rules(f"{image}.ff.net.2", f"{ours}.feed_forward.output", features, width),
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
        *linear_rules(f"{source}.to_q", f"{target}.query", width, width),
        *linear_rules(f"{source}.to_k", f"{target}.key", width, width),
        *linear_rules(f"{source}.to_v", f"{target}.value", width, width),
        gain_rule(f"{source}.norm_q", f"{target}.query_norm", width),
        gain_rule(f"{source}.norm_k", f"{target}.key_norm", width),
        *linear_rules(f"{source}.to_out.0", f"{target}.output", width, width),
    ]
