"""Settings that CogVideoX adds to those of all runs."""

from dataclasses import dataclass
from typing import ClassVar

from svg_jax.convert.formats.values import Flag
from svg_jax.sampling.settings.fields import documented, of_prompt, of_sampling
from svg_jax.sampling.settings.rules import ArrayOf
from svg_jax.sampling.settings.run import DIFFUSION, AnyArray, RunSettings

_LATENTS = ("batch", "frames", "channels", "height", "width")


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CogVideoXSettings(RunSettings):
    """Settings of a run of CogVideoX."""

    samplers: ClassVar[tuple[str, ...]] = DIFFUSION

    use_dynamic_cfg: bool = of_sampling(
        False,
        Flag(),
        meaning="Vary guidance over the run, as diffusers does (CogVideoX)",
        option="--dynamic-cfg",
    )
    image_noise: AnyArray | None = of_prompt(
        None,
        ArrayOf(_LATENTS),
        meaning="Standard normal numbers of image_latents' shape, by which the VAE's latents of an "
        "image are drawn, in place of the seed's",
        option=None,
    )
    sampler_noise: AnyArray | None = of_sampling(
        None,
        ArrayOf(("steps", *_LATENTS)),
        meaning="Noise that dpm adds in its steps, in place of the seed's",
        option=None,
    )
