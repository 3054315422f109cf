"""The tensors of a LLaVA encoder, as released by transformers and as laid out here."""

from svg_jax.convert.tables import clip, llama
from svg_jax.convert.tables.rules import Rule, linear_rules, nest_rules
from svg_jax.models.llava import LlavaConfig


def rules(config: LlavaConfig) -> tuple[Rule, ...]:
    """The table; `LlavaForConditionalGeneration` names its parts by transformers' version."""
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    projector = [
        *linear_rules("linear_1", "input", features, width),
        *linear_rules("linear_2", "output", width, width),
    ]
    return (
        *nest_rules(
            ("vision_tower.", "model.vision_tower."),
            "vision.",
            clip.vision_rules(config.vision_config),
        ),
        *nest_rules(
            ("multi_modal_projector.", "model.multi_modal_projector."), "projector.", projector
        ),
        *nest_rules(
            ("language_model.model.", "model.language_model."),
            "language_model.",
            llama.table(config.text_config),
        ),
    )
