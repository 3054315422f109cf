"""The tensors of a LLaVA encoder, as released by transformers and as laid out here."""

from svg_jax.convert.tables import clip, llama
from svg_jax.convert.tables.rules import Rule, mlp_rules, nest_rules
from svg_jax.models.llava import LlavaConfig


def rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """Build the table; the prefixes differ between versions of transformers."""
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    towers = ("vision_tower.", "model.vision_tower.")
    words = ("language_model.model.", "model.language_model.")
    projector = mlp_rules("multi_modal_projector", "projector", (features, width, width))
    return (
        *nest_rules(towers, "vision.", clip.vision_rules(config.vision_config)),
        *nest_rules(("", "model."), "", projector),
        *nest_rules(words, "language_model.", llama.table(config.text_config)),
    )
