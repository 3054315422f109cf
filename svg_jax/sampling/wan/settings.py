"""What a run of Wan is asked for beside what all flow-matching runs are."""

from dataclasses import dataclass

from svg_jax.sampling.settings.fields import documented, setting
from svg_jax.sampling.settings.rules import ArrayOf, Images
from svg_jax.sampling.settings.run import PROMPT, AnyArray, AnyImage, FlowSettings


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WanSettings(FlowSettings):
    """What a run of Wan is asked for."""

    last_image: AnyImage | None = setting(
        None,
        Images(),
        meaning="Image that the video ends with, for Wan's FLF2V models",
        panel=PROMPT,
        effect="bits",
    )
    image_embeds: AnyArray | None = setting(
        None,
        ArrayOf(("batch", "image_tokens", "features")),
        meaning="CLIP's features of the images in place of theirs (FLF2V: of both, one behind the "
        "other)",
        panel=PROMPT,
        effect="bits",
        option=None,
    )
