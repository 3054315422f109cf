"""What was given on the command line, as the settings of a run of the model that was chosen."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from svg_jax.array_files import read_arrays
from svg_jax.cli.console import bytes_bar, say
from svg_jax.cli.generated import every_setting, flag_of
from svg_jax.config import SparsityConfig, Warmup
from svg_jax.media.images import with_images_read
from svg_jax.sampling import VideoPipeline, from_pretrained
from svg_jax.sampling.cache import cache_folder
from svg_jax.sampling.settings import (
    PlaybackSettings,
    RunSettings,
    check_settings,
    settings_of,
    with_values,
)
from svg_jax.sampling.settings.fields import is_file
from svg_jax.sampling.settings.rules import ArrayOf
from svg_jax.sampling.settings.run import few_steps_note


@dataclass(frozen=True)
class ModelChoice:
    """Which model a command runs, and how it is loaded; see `from_pretrained`.

    Attributes:
        model: Folder, hub id or name.
        revision: Branch, tag or commit of a hub id.
        variant: Weights to take where a component has them.
        verify: Whether to read all weights first.
        dtype: Dtype of the matrix products.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    verify: bool = False
    dtype: str | None = None

    def load(self) -> VideoPipeline:
        """Load it, converted first if it has to be."""
        keep_programs()
        with bytes_bar(visible=False) as progress:
            return from_pretrained(
                self.model,
                revision=self.revision,
                variant=self.variant,
                verify=self.verify,
                dtype=self.dtype,
                progress=progress,
            )


def inputs_of(model: ModelChoice, given: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the files and folders among what was given, by their options."""
    files = {
        flag_of(name): given[name]
        for name, setting in every_setting().items()
        if name in given and is_file(setting)
    }
    return {"--model": model.model, **files}


def read_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the files among the settings that were given."""
    known = every_setting()
    files = {name: given[name] for name in given if isinstance(known[name].rule, ArrayOf)}
    return {**with_images_read(given), **read_arrays(files)}


def checked(
    values: Mapping[str, Any], sparsity: Mapping[str, Any], warmup: Mapping[str, Any]
) -> tuple[dict[str, Any], PlaybackSettings]:
    """Check of the settings that were given all that needs no model.

    Returns:
        The settings of the run, and how the video is shown.

    Raises:
        ValueError: If no model could be run so: before one is brought here and converted.
    """
    SparsityConfig(**sparsity)
    Warmup(**warmup)
    check_settings({"prompt": None, "prompt_embeds": None, **values}, every_setting())
    # Guidance of HunyuanVideo's needs one, if an empty one: an option need not say so.
    run = {"negative_prompt": "", **values}
    shown = {name: run.pop(name) for name in settings_of(PlaybackSettings).keys() & run.keys()}
    return run, PlaybackSettings(**shown)


def shown_at(pipeline: VideoPipeline, shown: PlaybackSettings) -> tuple[float, int]:
    """Choose frames per second, and pixels for each pixel: what was given, or the model's."""
    fps = pipeline.default_fps if shown.fps is None else shown.fps
    enlarge = (pipeline.defaults.enlarge or 1) if shown.enlarge is None else shown.enlarge
    return fps, enlarge


def size_of(pipeline: VideoPipeline, settings: RunSettings) -> tuple[int, int, int]:
    """Count frames, height and width of the video that settings make."""
    return pipeline.video_size(settings.num_frames, settings.height, settings.width)


def with_sparsity(
    pipeline: VideoPipeline,
    settings: RunSettings,
    given_sparsity: Mapping[str, Any],
    given_warmup: Mapping[str, Any],
) -> RunSettings:
    """Take what was given and, for the rest, the model's or the paper's; say which in a line."""
    size = settings.height, settings.width
    sparsity, warmup = pipeline.default_sparsity(*size)
    sparsity = dataclasses.replace(sparsity, **given_sparsity)
    warmup = dataclasses.replace(warmup, **given_warmup)
    preset = pipeline.paper_preset(*size)
    whence = "the general default" if preset is None else f"the paper's {preset}"
    if pipeline.defaults.sparsity or pipeline.defaults.warmup:
        whence = "the model's own"
    if given := [*given_sparsity, *(f"warmup.{name}" for name in given_warmup)]:
        whence += " but for " + ", ".join(map(flag_of, given))
    say(
        f"sparsity: density {sparsity.density:g}, dense steps {warmup.steps:g}, dense layers "
        f"{warmup.layers:g}, sampled rows {sparsity.sampled_rows} ({whence})"
    )
    assert settings.num_inference_steps is not None
    if (note := few_steps_note(warmup, settings.num_inference_steps)) is not None:
        say(note)
    return with_values(settings, sparsity=sparsity, warmup=warmup)


def keep_programs() -> None:
    """Keep compiled programs in the cache, unless the user says where or there is no GPU.

    For a GPU XLA chooses algorithms by timing them, and not always the same: a run that is resumed
    gives the same bytes only with the programs that it began with. Making them takes a minute.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
