"""The tensors of a T5 v1.1 or UMT5 encoder, as released by transformers and as laid out here."""

import re
from dataclasses import replace

from svg_jax.convert.tables.rules import Rule, gain_rule, matrix_rule, stack_rules
from svg_jax.models.t5 import T5Config

# Files of a whole T5 hold these, too.
UNUSED = re.compile(r"decoder\..*|lm_head\.weight")


def rules(config: T5Config) -> tuple[Rule, ...]:
    """Build the table of a `T5EncoderModel` or `UMT5EncoderModel`."""
    model, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff

    layer = [
        gain_rule("layer.0.layer_norm", "attention_norm", model),
        matrix_rule("layer.0.SelfAttention.q", "attention.query", model, inner),
        matrix_rule("layer.0.SelfAttention.k", "attention.key", model, inner),
        matrix_rule("layer.0.SelfAttention.v", "attention.value", model, inner),
        matrix_rule("layer.0.SelfAttention.o", "attention.output", inner, model),
        gain_rule("layer.1.layer_norm", "feed_forward_norm", model),
        matrix_rule("layer.1.DenseReluDense.wi_0", "feed_forward.gate", model, hidden),
        matrix_rule("layer.1.DenseReluDense.wi_1", "feed_forward.input", model, hidden),
        matrix_rule("layer.1.DenseReluDense.wo", "feed_forward.output", hidden, model),
    ]
    bias = Rule(
        "layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_bias.embedding",
        "none",
        (config.relative_attention_num_buckets, config.num_heads),
    )
    shared = [replace(bias, source=f"encoder.block.0.{bias.source}")]
    if config.model_type == "umt5":
        layer, shared = [*layer, bias], []
    words, tied = (config.vocab_size, model), ("encoder.embed_tokens.weight",)
    return (
        Rule("shared.weight", "token_embedding.embedding", "none", words, aliases=tied),
        *shared,
        *stack_rules("encoder.block", "blocks", config.num_layers, layer),
        gain_rule("encoder.final_layer_norm", "final_norm", model),
    )
