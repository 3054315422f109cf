"""The tensors of CLIP's two towers, as released by transformers and as laid out here."""

import re

from svg_jax.convert.tables.rules import Rule, linear_rules, nest_rules, norm_rules, stack_rules
from svg_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig

# Held by files of `CLIPVisionModelWithProjection` and `CLIPTextModelWithProjection`, and of both
# towers: only the hidden states of one, and the text's end, are of use here.
_PROJECTIONS = r"(visual|text)_projection\.weight"
VISION_UNUSED = re.compile(rf"{_PROJECTIONS}|text_model\..*")
TEXT_UNUSED = re.compile(rf"{_PROJECTIONS}|vision_model\..*")


def text_rules(config: CLIPTextConfig) -> tuple[Rule, ...]:
    """The table of the text tower; `CLIPTextModel` has its names with and without the prefix."""
    width = config.hidden_size
    return tuple(
        nest_rules(
            ("text_model.", ""),
            "",
            [
                Rule(
                    "embeddings.token_embedding.weight",
                    "token_embedding.embedding",
                    "none",
                    (config.vocab_size, width),
                ),
                _positions(config.max_position_embeddings, width),
                *_layers(config),
                *norm_rules("final_layer_norm", "final_norm", width),
            ],
        )
    )


def vision_rules(config: CLIPVisionConfig) -> tuple[Rule, ...]:
    """The table of the vision tower; `CLIPVisionModel` has its names with and without prefix."""
    width, patch = config.hidden_size, config.patch_size
    kernel = (width, config.num_channels, patch, patch)
    return tuple(
        nest_rules(
            ("vision_model.", ""),
            "",
            [
                Rule("embeddings.class_embedding", "class_embedding", "none", (width,)),
                Rule(
                    "embeddings.patch_embedding.weight", "patch_projection.kernel", "patch", kernel
                ),
                _positions(1 + config.num_patches, width),
                *norm_rules("pre_layrnorm", "input_norm", width),
                *_layers(config),
                *norm_rules("post_layernorm", "output_norm", width),
            ],
        )
    )


def _positions(count: int, width: int) -> Rule:
    return Rule("embeddings.position_embedding.weight", "positions", "none", (count, width))


def _layers(config: CLIPTextConfig | CLIPVisionConfig) -> list[Rule]:
    width, hidden = config.hidden_size, config.intermediate_size
    layer = [
        *norm_rules("layer_norm1", "attention_norm", width),
        *linear_rules("self_attn.q_proj", "attention.query", width, width),
        *linear_rules("self_attn.k_proj", "attention.key", width, width),
        *linear_rules("self_attn.v_proj", "attention.value", width, width),
        *linear_rules("self_attn.out_proj", "attention.output", width, width),
        *norm_rules("layer_norm2", "feed_forward_norm", width),
        *linear_rules("mlp.fc1", "feed_forward.input", width, hidden),
        *linear_rules("mlp.fc2", "feed_forward.output", hidden, width),
    ]
    return stack_rules("encoder.layers", "blocks", config.num_hidden_layers, layer)
