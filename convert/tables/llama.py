"""The tensors of a LLaMA encoder, as released by transformers and as laid out here."""

import re

from svg_jax.convert.tables.rules import Rule, gain_rule, matrix_rule, nest_rules, stack_rules
from svg_jax.models.llama import LlamaConfig

# Files of a whole language model hold this, too: it turns the last hidden state into words.
UNUSED = re.compile(r"(.*\.)?lm_head\.weight")


def rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """Build the table: `LlamaForCausalLM` has the names of `LlamaModel` with a prefix."""
    return tuple(nest_rules(("", "model."), "", table(config)))


def table(config: LlamaConfig) -> list[Rule]:
    """Build the table of `LlamaModel` alone."""
    width, hidden = config.hidden_size, config.intermediate_size
    inner = config.num_attention_heads * config.head_features
    shared = config.key_value_heads * config.head_features
    layer = [
        gain_rule("input_layernorm", "attention_norm", width),
        matrix_rule("self_attn.q_proj", "attention.query", width, inner),
        matrix_rule("self_attn.k_proj", "attention.key", width, shared),
        matrix_rule("self_attn.v_proj", "attention.value", width, shared),
        matrix_rule("self_attn.o_proj", "attention.output", inner, width),
        gain_rule("post_attention_layernorm", "feed_forward_norm", width),
        matrix_rule("mlp.gate_proj", "feed_forward.gate", width, hidden),
        matrix_rule("mlp.up_proj", "feed_forward.input", width, hidden),
        matrix_rule("mlp.down_proj", "feed_forward.output", hidden, width),
    ]
    shape = (config.vocab_size, width)
    return [
        Rule("embed_tokens.weight", "token_embedding.embedding", "none", shape),
        *stack_rules("layers", "blocks", config.num_hidden_layers, layer),
        gain_rule("norm", "final_norm", width),
    ]
