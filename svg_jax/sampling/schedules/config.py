"""A checkpoint's sampler: the content of scheduler_config.json."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from svg_jax.convert.scheduler_config import COGVIDEOX, FLOW, check_scheduler, field_problem
from svg_jax.sampling.settings import SettingError
from svg_jax.sampling.settings.run import DIFFUSION, FLOW_MATCHING, SamplerName

_SAMPLERS: Mapping[str, SamplerName] = dict(
    zip((*COGVIDEOX, *FLOW), (*DIFFUSION, *FLOW_MATCHING), strict=True)
)
_SHIFTS: Mapping[str, str] = dict(zip(FLOW, ("shift", "flow_shift"), strict=True))


@dataclass(frozen=True)
class SchedulerConfig:
    """Content of scheduler_config.json; field names are diffusers'.

    Attributes:
        sampler: Name of the checkpoint's own sampler; "ddim" and "dpm" can replace each other, and
            so can "euler" and "unipc".
        num_train_timesteps: Length of the training schedule; 1000 for flow matching.
        beta_start: First beta of the "scaled_linear" schedule (diffusion).
        beta_end: Last beta (diffusion).
        snr_shift_scale: Divisor of the signal-to-noise ratio (diffusion): 3 for CogVideoX-2b, 1 for
            the others.
        rescale_betas_zero_snr: Whether the last timestep is pure noise (diffusion).
        set_alpha_to_one: Whether a step past timestep 0 ends at the clean video, else at ᾱ_0
            (diffusion).
        shift: Shift of the steps of flow matching towards noise: σ → shift·σ / (1 + (shift − 1)·σ).
            7 for HunyuanVideo; 5 for Wan at 720p, 3 at 480p.
    """

    sampler: SamplerName = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 3.0
    rescale_betas_zero_snr: bool = True
    set_alpha_to_one: bool = True
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in _SAMPLERS.values():
            names = ", ".join(map(repr, _SAMPLERS.values()))
            raise SettingError("sampler", f"is one of {names}: got {self.sampler!r:.60}")
        for field in dataclasses.fields(self)[1:]:
            problem = field_problem(field.name, getattr(self, field.name))
            if problem is not None:
                raise SettingError(field.name, problem)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], classes: Collection[str]) -> "SchedulerConfig":
        """Read the dict of scheduler_config.json.

        Args:
            entries: Parsed file.
            classes: Classes of diffusers that the model can be sampled with.

        Raises:
            ValueError: On values without meaning and on what is not implemented; names them all.
        """
        found = check_scheduler(entries, classes)
        found.check()
        assert found.class_name is not None
        sampler = _SAMPLERS[found.class_name]
        if found.class_name in _SHIFTS:  # of whose other keys none has an effect
            return cls(sampler, shift=float(found.values[_SHIFTS[found.class_name]]))
        # A whole number may stand for a float there.
        known: dict[str, Any] = {
            field.name: type(field.default)(found.values[field.name])
            for field in dataclasses.fields(cls)
            if field.name in found.values
        }
        return cls(sampler, **known)

    @property
    def samplers(self) -> tuple[SamplerName, ...]:
        """Names of the samplers that the checkpoint can be sampled with."""
        return DIFFUSION if self.sampler in DIFFUSION else FLOW_MATCHING
