"""What a run of CogVideoX is asked for beside what all runs are."""

from dataclasses import dataclass
from typing import ClassVar

from svg_jax.convert.formats.values import Flag
from svg_jax.sampling.settings.fields import documented, setting
from svg_jax.sampling.settings.rules import ArrayOf
from svg_jax.sampling.settings.run import DIFFUSION, PROMPT, SAMPLING, AnyArray, RunSettings

_LATENTS = ("batch", "frames", "channels", "height", "width")


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CogVideoXSettings(RunSettings):
    """What a run of CogVideoX is asked for."""

    samplers: ClassVar[tuple[str, ...]] = DIFFUSION

    use_dynamic_cfg: bool = setting(
        False,
        Flag(),
        meaning="Vary guidance over the run, as diffusers does (CogVideoX)",
        panel=SAMPLING,
        effect="bits",
        option="--dynamic-cfg",
    )
    image_noise: AnyArray | None = setting(
        None,
        ArrayOf(_LATENTS),
        meaning="Standard normal numbers of image_latents' shape, by which the VAE's latents of an "
        "image are drawn, in place of the seed's",
        panel=PROMPT,
        effect="bits",
        option=None,
    )
    sampler_noise: AnyArray | None = setting(
        None,
        ArrayOf(("steps", *_LATENTS)),
        meaning="Noise that dpm adds in its steps, in place of the seed's",
        panel=SAMPLING,
        effect="bits",
        option=None,
    )
