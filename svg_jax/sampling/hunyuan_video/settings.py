"""What a run of HunyuanVideo is asked for beside what all flow-matching runs are."""

from dataclasses import dataclass

from svg_jax.convert.formats.values import Number
from svg_jax.sampling.settings.fields import documented, setting
from svg_jax.sampling.settings.rules import ArrayOf
from svg_jax.sampling.settings.run import PROMPT, SAMPLING, AnyArray, FlowSettings

_POOLED = ArrayOf(("batch", "features"))
_MASK = ArrayOf(("batch", "text_tokens"), ("float", "int", "bool"))


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HunyuanVideoSettings(FlowSettings):
    """What a run of HunyuanVideo is asked for."""

    true_cfg_scale: float | int = setting(
        1.0,
        Number(0, 1000),
        meaning="Strength of HunyuanVideo's guidance away from the negative prompt, which doubles "
        "the work; 1 or less turns it off",
        panel=SAMPLING,
        effect="bits",
    )
    pooled_prompt_embeds: AnyArray | None = setting(
        None,
        _POOLED,
        meaning="CLIP's features of the whole prompt",
        panel=PROMPT,
        effect="bits",
        option=None,
    )
    prompt_attention_mask: AnyArray | None = setting(
        None,
        _MASK,
        meaning="Mask of prompt_embeds: 1 at each token, 0 at the padding behind",
        panel=PROMPT,
        effect="bits",
        option=None,
    )
    negative_pooled_prompt_embeds: AnyArray | None = setting(
        None,
        _POOLED,
        meaning="CLIP's features of the negative prompt",
        panel=PROMPT,
        effect="bits",
        option=None,
    )
    negative_prompt_attention_mask: AnyArray | None = setting(
        None,
        _MASK,
        meaning="Mask of negative_prompt_embeds, as prompt_attention_mask",
        panel=PROMPT,
        effect="bits",
        option=None,
    )
