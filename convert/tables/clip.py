"""The tensors of CLIP's two towers, as released by transformers and as laid out here."""

import re

from svg_jax.convert.tables.rules import (
    Rule,
    heads_rules,
    linear_rules,
    mlp_rules,
    nest_rules,
    norm_rules,
    stack_rules,
)
from svg_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig

# Files of `CLIPVisionModelWithProjection`, `CLIPTextModelWithProjection` and of both towers hold
# these, too: but only hidden states of one tower, and the text's end, are used here.
_PROJECTIONS = r"(visual|text)_projection\.weight"
VISION_UNUSED = re.compile(rf"{_PROJECTIONS}|text_model\..*")
TEXT_UNUSED = re.compile(rf"{_PROJECTIONS}|vision_model\..*")


def text_rules(config: CLIPTextConfig) -> tuple[Rule, ...]:
    """Build the table of the text tower, `CLIPTextModel`."""
    width, words = config.hidden_size, "embeddings.token_embedding.weight"
    shape = (config.vocab_size, width)
    table = [
        Rule(words, "token_embedding.embedding", "none", shape),
        _positions(config.max_position_embeddings, width),
        *_layers(config),
        *norm_rules("final_layer_norm", "final_norm", width),
    ]
    return tuple(nest_rules(("text_model.", ""), "", table))


def vision_rules(config: CLIPVisionConfig) -> tuple[Rule, ...]:
    """Build the table of the vision tower, `CLIPVisionModel`."""
    width, patch = config.hidden_size, config.patch_size
    kernel = (width, config.num_channels, patch, patch)
    table = [
        Rule("embeddings.class_embedding", "class_embedding", "none", (width,)),
        Rule("embeddings.patch_embedding.weight", "patch_projection.kernel", "patch", kernel),
        _positions(1 + config.num_patches, width),
        *norm_rules("pre_layrnorm", "input_norm", width),
        *_layers(config),
        *norm_rules("post_layernorm", "output_norm", width),
    ]
    return tuple(nest_rules(("vision_model.", ""), "", table))


def _positions(count: int, width: int) -> Rule:
    return Rule("embeddings.position_embedding.weight", "positions", "none", (count, width))


def _layers(config: CLIPTextConfig | CLIPVisionConfig) -> list[Rule]:
    width, hidden = config.hidden_size, config.intermediate_size
    layer = [
        *norm_rules("layer_norm1", "attention_norm", width),
        *heads_rules("self_attn.{}_proj", "attention", width),
        *linear_rules("self_attn.out_proj", "attention.output", width, width),
        *norm_rules("layer_norm2", "feed_forward_norm", width),
        *mlp_rules("mlp", "feed_forward", (width, hidden, width), ("fc1", "fc2")),
    ]
    return stack_rules("encoder.layers", "blocks", config.num_hidden_layers, layer)
