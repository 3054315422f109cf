"""Settings that Wan adds to those of all flow-matching runs."""

from dataclasses import dataclass

from svg_jax.sampling.settings.fields import documented, of_prompt
from svg_jax.sampling.settings.rules import ArrayOf, Images
from svg_jax.sampling.settings.run import AnyArray, AnyImage, FlowSettings


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WanSettings(FlowSettings):
    """Settings of a run of Wan."""

    last_image: AnyImage | None = of_prompt(
        None, Images(), meaning="Image file that the video ends with, for Wan's FLF2V models"
    )
    image_embeds: AnyArray | None = of_prompt(
        None,
        ArrayOf(("batch", "image_tokens", "features")),
        meaning="CLIP's features of the images in place of theirs (FLF2V: of both, one behind the "
        "other)",
        option=None,
    )
