"""Settings that HunyuanVideo adds to those of all flow-matching runs."""

from dataclasses import dataclass

from svg_jax.convert.formats.values import Number
from svg_jax.sampling.settings.fields import documented, of_prompt, of_sampling
from svg_jax.sampling.settings.rules import ArrayOf
from svg_jax.sampling.settings.run import AnyArray, FlowSettings

_POOLED = ArrayOf(("batch", "features"))
_MASK = ArrayOf(("batch", "text_tokens"), ("float", "int", "bool"))


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HunyuanVideoSettings(FlowSettings):
    """Settings of a run of HunyuanVideo."""

    true_cfg_scale: float | int = of_sampling(
        1.0,
        Number(0, 1000),
        meaning="Strength of HunyuanVideo's guidance away from the negative prompt, which doubles "
        "the work; 1 or less turns it off",
    )
    pooled_prompt_embeds: AnyArray | None = of_prompt(
        None, _POOLED, meaning="CLIP's features of the whole prompt", option=None
    )
    prompt_attention_mask: AnyArray | None = of_prompt(
        None,
        _MASK,
        meaning="Mask of prompt_embeds: 1 at each token, 0 at the padding behind",
        option=None,
    )
    negative_pooled_prompt_embeds: AnyArray | None = of_prompt(
        None, _POOLED, meaning="CLIP's features of the negative prompt", option=None
    )
    negative_prompt_attention_mask: AnyArray | None = of_prompt(
        None, _MASK, meaning="Mask of negative_prompt_embeds, as prompt_attention_mask", option=None
    )
