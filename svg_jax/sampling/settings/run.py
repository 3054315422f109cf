"""A run as a value: everything that a pipeline is asked for, checked when the value is made.

The value does not depend on a model: what depends on the checkpoint (sizes, shapes of arrays,
memory) is checked in `prepare`. The settings that a family adds stand beside its pipeline.
"""

import copy
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from svg_jax.config import SparsityConfig, Warmup, dense_step_count
from svg_jax.convert.formats.values import Choice, Flag, Number
from svg_jax.convert.run_defaults import RULES
from svg_jax.sampling.settings.checks import check_settings, count_prompts
from svg_jax.sampling.settings.fields import (
    SettingError,
    defaults_of,
    documented,
    of_attention,
    of_output,
    of_prompt,
    of_sampling,
    of_saving,
    of_video,
    settings_of,
)
from svg_jax.sampling.settings.rules import ArrayOf, FilePath, Images, Kind, Prompts, is_hashable

Settings = TypeVar("Settings")
OutputType = Literal["np", "uint8", "latent"]
SamplerName = Literal["ddim", "dpm", "euler", "unipc"]
DIFFUSION: tuple[SamplerName, ...] = ("ddim", "dpm")
FLOW_MATCHING: tuple[SamplerName, ...] = ("euler", "unipc")
# NumPy's, JAX's or another library's; the rule of the field says of what axes and elements.
AnyArray = Any
# What `svg_jax.media.images.as_image` takes, or a list with one for each prompt.
AnyImage = Any

_SEEDS = 2**64
_FEW_STEPS = 12  # of fewer a share is rounded so much that it is worth a line
_SIZE = Number(1, 2**63 - 1, whole=True)  # a float holds products of them, in bytes
_LATENTS = ArrayOf(("batch", "channels or frames", "frames or channels", "height", "width"))
_FEATURES = ArrayOf(("batch", "text_tokens", "features"))


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunSettings:
    """Settings of a run of any family; None is the model's own where it has one."""

    samplers: ClassVar[tuple[str, ...]]  # names of the family's own

    prompt: str | Sequence[str] | None = of_prompt(
        None, Prompts(), meaning="Text that describes the video; in Python also a list of texts"
    )
    negative_prompt: str | Sequence[str] | None = of_prompt(
        None,
        Prompts(),
        meaning="Text that guidance leads away from; in Python also a list, one for each prompt",
    )
    prompt_embeds: AnyArray | None = of_prompt(
        None,
        _FEATURES,
        meaning="Text features in place of a prompt; a file is .npy, or .npz with prompt_embeds "
        "[1, tokens, features] and, for guidance, negative_prompt_embeds; HunyuanVideo "
        "also needs pooled_prompt_embeds and prompt_attention_mask for each",
    )
    negative_prompt_embeds: AnyArray | None = of_prompt(
        None, _FEATURES, meaning="Text features of the negative prompt", option=None
    )
    max_sequence_length: int | None = of_prompt(
        None,
        Number(1, 8192, whole=True),
        meaning="Number of text tokens, padding included",
        otherwise="as trained",
    )
    image: AnyImage | None = of_prompt(
        None,
        Images(),
        meaning="Image file that the video begins with, for image-to-video models; stretched to "
        "the video's size; in Python also an image, or a list of one for each prompt",
    )
    image_latents: AnyArray | None = of_prompt(
        None,
        _LATENTS,
        meaning="Latents of the first frame, scaled as the model expects them, in place of an "
        "image; a file is .npy or .npz",
    )
    height: int | None = of_video(
        None, _SIZE, meaning="Height of the video", unit="pixels", otherwise="as trained"
    )
    width: int | None = of_video(
        None, _SIZE, meaning="Width of the video", unit="pixels", otherwise="as trained"
    )
    num_frames: int | None = of_video(
        None,
        _SIZE,
        meaning="Number of frames; a number that the model cannot make is rounded up or refused",
        otherwise="as trained",
    )
    num_videos_per_prompt: int = of_video(
        1,
        _SIZE,
        meaning="Number of videos of each prompt, each from its own noise",
        option="--num-videos",
    )
    num_inference_steps: int | None = of_sampling(
        None,
        Number(1, whole=True),
        meaning="Number of denoising steps",
        otherwise="the model's",
        option="--steps",
    )
    guidance_scale: float | int | None = of_sampling(
        None,
        RULES["guidance_scale"],
        meaning="Strength of guidance; 1 or less turns it off and halves the work. HunyuanVideo "
        "takes it as an input, at no cost",
        otherwise="the model's",
    )
    guidance_interval: tuple[float | int, float | int] | None = of_sampling(
        None,
        RULES["guidance_interval"],
        meaning="Range of steps, as two shares, in which guidance is computed: 0 and 0.3 are the "
        "first 30 %",
        otherwise="the model's, or all steps",
    )
    scheduler: SamplerName | None = of_sampling(
        None,
        Choice(get_args(SamplerName)),
        meaning="Sampler: ddim or dpm for CogVideoX, euler or unipc for the others",
        otherwise="the checkpoint's own",
    )
    seed: int | None = of_sampling(
        0,
        Number(0, _SEEDS - 1, whole=True),
        meaning="Seed of the noise, 0 to 2^64 - 1: the same one gives the same noise anywhere",
        optional=True,  # None draws one, which the outcome's info has
    )
    latents: AnyArray | None = of_sampling(
        None,
        _LATENTS,
        meaning="Initial noise to use instead of drawing it from the seed; include padding frames; "
        "a file is .npy or .npz",
    )
    sparsity: SparsityConfig | None = of_attention(
        None,
        Kind(lambda value: isinstance(value, SparsityConfig), "a SparsityConfig"),
        meaning="Settings of Sparse VideoGen; None is dense attention",
        option=None,
    )
    warmup: Warmup | None = of_attention(
        None,
        Kind(lambda value: isinstance(value, Warmup), "a Warmup"),
        meaning="Steps and layers that stay dense under sparsity; None is Warmup()",
        option=None,
    )
    attend: Callable[..., Any] | None = of_attention(
        None,
        Kind(lambda value: callable(value) and is_hashable(value), "a callable"),
        meaning="Attention of one's own in place of either, in all steps and layers "
        "(see svg_jax.Attend); each callable is compiled once",
        effect="none",  # nothing tells one callable from another: attend_id does
        option=None,
    )
    attend_id: str | None = of_attention(
        None,
        Kind(lambda value: isinstance(value, str) and value != "", "a string"),
        meaning="Name by which a saved run knows its attend again",
        option=None,
    )
    labels: AnyArray | None = of_attention(
        None,
        ArrayOf(("layers", "entries", "heads"), ("bool",), also=(4,)),
        meaning="Labels to use in place of profiling, True = temporal; with an axis of steps "
        "before the others, or for all of them",
        option=None,
    )
    output_type: OutputType = of_output(
        "np",
        Choice(get_args(OutputType)),
        meaning="Form of the outcome: np for frames in 0 to 1, uint8, or latent for latents alone",
        option=None,
    )
    vae_tiling: bool = of_output(
        False,
        Flag(),
        # No effect on latents, which a saved run has: it may be decoded otherwise.
        meaning="Decode in tiles of the released size; needs less memory and changes the frames "
        "slightly",
    )
    callback_on_step_end: Callable[..., Any] | None = of_output(
        None,
        Kind(callable, "a callable"),
        meaning="Function that is called with the record of each step that this call computes",
        option=None,
    )
    state_file: str | Path | None = of_saving(
        None, FilePath(), meaning="File to save the run's state in; None saves nothing", option=None
    )
    save_every: int = of_saving(
        5,
        Number(0, whole=True),
        meaning="Number of steps between saves of the run's state, to .OUTPUT.state beside the "
        "output; 0 never saves",
    )
    resume: bool = of_saving(
        False,
        Flag(),
        meaning="Continue from the saved state, or start from the beginning if there is none",
    )
    allow_rounding: bool = of_saving(
        False,
        Flag(),
        meaning="Continue even if the versions, device or dtype differ; later steps are then "
        "rounded differently",
    )

    def __post_init__(self) -> None:
        vars(self).update(self._checked(vars(self)))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RunSettings":
        """Make settings of values from any library, as `cls(**values)` does for Python's own.

        Raises:
            SettingError: On values that no run can have, and on names that are no fields.
            ValueError: If an image cannot be read.
        """
        made = object.__new__(cls)
        vars(made).update(cls._checked({**defaults_of(cls), **values}))
        return made

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Check the values of all fields, and read the images among them."""
        checked = check_settings(values, settings_of(cls))
        if checked["scheduler"] not in (None, *cls.samplers):
            names = " or ".join(map(repr, cls.samplers))
            raise SettingError("scheduler", f"is {names}: got {checked['scheduler']!r}")
        if checked["image"] is None and checked.get("last_image") is None:
            return checked
        from svg_jax.media.images import with_images_read

        prompts = count_prompts(checked["prompt"], checked["prompt_embeds"])
        return with_images_read(checked, prompts)

    def __repr__(self) -> str:
        given = (name for name, value in defaults_of(type(self)).items()
                 if getattr(self, name) is not value)  # fmt: skip
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def num_prompts(self) -> int:
        """Number of prompts, given as text or as features."""
        return count_prompts(self.prompt, self.prompt_embeds)

    @property
    def num_videos(self) -> int:
        """Number of videos, which are a batch."""
        return self.num_prompts * self.num_videos_per_prompt


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FlowSettings(RunSettings):
    """Settings of a run of a flow-matching family."""

    samplers: ClassVar[tuple[str, ...]] = FLOW_MATCHING

    flow_shift: float | int | None = of_sampling(
        None,
        Number(0.01, 1000),
        meaning="Shift of the noise levels (HunyuanVideo, Wan): the larger it is, the more "
        "steps are spent at high noise",
        otherwise="the checkpoint's own",
    )


@documented
@dataclass(frozen=True, kw_only=True)
class PlaybackSettings:
    """Settings of a video's file."""

    fps: float | int | None = of_output(
        None, RULES["fps"], meaning="Frames per second of the video", otherwise="as trained"
    )
    enlarge: int | None = of_output(
        None,
        RULES["enlarge"],
        meaning="Factor by which to enlarge the written video in height and width",
        otherwise="the model's, or 1",
    )

    def __post_init__(self) -> None:
        vars(self).update(check_settings(vars(self), settings_of(type(self))))


def with_values(settings: Settings, **values: Any) -> Settings:
    """Copy settings with other values, which must be known to be right: they are not checked.

    `dataclasses.replace` checks all of them again, arrays too.
    """
    made = copy.copy(settings)
    vars(made).update(values)
    return made


def few_steps_note(warmup: Warmup, num_inference_steps: int) -> str | None:
    """Say how many steps of a short run are dense; None for a run that is not short."""
    if num_inference_steps >= _FEW_STEPS:
        return None
    dense = dense_step_count(warmup, num_inference_steps)
    return f"few steps: {dense} of {num_inference_steps} dense, the first ones"


def draw_seed() -> int:
    """Draw a seed; it is logged and recorded, so that the run can be repeated."""
    return secrets.randbelow(2**32)
