"""The tensors of a T5 v1.1 encoder, as released by transformers and as laid out here."""

from svg_jax.convert.rules import Rule
from svg_jax.models.t5 import T5Config


def rules(config: T5Config) -> tuple[Rule, ...]:
    """The table; source names are those of `T5EncoderModel` on disk."""
    model, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
    attention = "encoder.block.{layer}.layer.0"
    feed_forward = "encoder.block.{layer}.layer.1"

    def linear(source: str, target: str, features: int, out_features: int) -> Rule:
        shape = (out_features, features)
        return Rule(f"{source}.weight", f"{target}.kernel", "transpose", shape)

    def norm(source: str, target: str) -> Rule:
        return Rule(f"{source}.weight", f"{target}.scale", "none", (model,))

    return (
        Rule(
            "shared.weight",
            "token_embedding.embedding",
            "none",
            (config.vocab_size, model),
            aliases=("encoder.embed_tokens.weight",),
        ),
        Rule(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "relative_bias.embedding",
            "none",
            (config.relative_attention_num_buckets, config.num_heads),
        ),
        norm(f"{attention}.layer_norm", "blocks.attention_norm"),
        linear(f"{attention}.SelfAttention.q", "blocks.attention.query", model, inner),
        linear(f"{attention}.SelfAttention.k", "blocks.attention.key", model, inner),
        linear(f"{attention}.SelfAttention.v", "blocks.attention.value", model, inner),
        linear(f"{attention}.SelfAttention.o", "blocks.attention.output", inner, model),
        norm(f"{feed_forward}.layer_norm", "blocks.feed_forward_norm"),
        linear(f"{feed_forward}.DenseReluDense.wi_0", "blocks.feed_forward.gate", model, hidden),
        linear(f"{feed_forward}.DenseReluDense.wi_1", "blocks.feed_forward.input", model, hidden),
        linear(f"{feed_forward}.DenseReluDense.wo", "blocks.feed_forward.output", hidden, model),
        norm("encoder.final_layer_norm", "final_norm"),
    )
