"""From the options of a command to a model and the settings of its run."""

import dataclasses
from typing import Any, Literal

import jax

from svg_jax.array_files import read_arrays
from svg_jax.cli.console import bytes_bar, say
from svg_jax.cli.generated import every_setting, flag_of
from svg_jax.cli.options import Given
from svg_jax.config import SparsityConfig, Warmup
from svg_jax.kernels import sparse_attention_pays
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


def load_model(model: Given) -> VideoPipeline:
    """Load a model, converted first if need be, by the given arguments of `from_pretrained`."""
    keep_programs()
    with bytes_bar(visible=False) as progress:
        return from_pretrained(**model, progress=progress)


def inputs_of(model: Given, given: Given) -> dict[str, Any]:
    """Pick the files and folders among the given options, by the options' names."""
    files = {
        flag_of(name): given[name]
        for name, setting in every_setting().items()
        if name in given and is_file(setting)
    }
    return {"--model": model["model"], **files}


def read_given(given: Given) -> dict[str, Any]:
    """Replace the files among the given settings by their contents."""
    known = every_setting()
    files = {name: given[name] for name in given if isinstance(known[name].rule, ArrayOf)}
    return {**with_images_read(given), **read_arrays(files)}


def checked(
    values: Given, sparsity: Given, warmup: Given
) -> tuple[dict[str, Any], PlaybackSettings]:
    """Check the given settings as far as is possible before the model is fetched and converted.

    Returns:
        Settings of the run, and those of playback.

    Raises:
        ValueError: If no model can run with these settings.
    """
    SparsityConfig(**sparsity)
    Warmup(**warmup)
    check_settings({"prompt": None, "prompt_embeds": None, **values}, every_setting())
    # HunyuanVideo's guidance needs a negative prompt, which may be empty.
    run = {"negative_prompt": "", **values}
    shown = {name: run.pop(name) for name in settings_of(PlaybackSettings).keys() & run.keys()}
    return run, PlaybackSettings(**shown)


def shown_at(pipeline: VideoPipeline, shown: PlaybackSettings) -> tuple[float, int]:
    """Choose frames per second and the factor of enlargement: as given, else the model's."""
    fps = pipeline.default_fps if shown.fps is None else shown.fps
    enlarge = (pipeline.defaults.enlarge or 1) if shown.enlarge is None else shown.enlarge
    return fps, enlarge


def size_of(pipeline: VideoPipeline, settings: RunSettings) -> tuple[int, int, int]:
    """Count the frames, rows and columns of the video that settings give."""
    return pipeline.video_size(settings.num_frames, settings.height, settings.width)


def faster_attention(pipeline: VideoPipeline) -> Literal["dense", "svg"]:
    """Choose sparse attention unless dense is faster on this device, which is printed."""
    transformer = pipeline.transformer
    if sparse_attention_pays(transformer.config.attention_head_dim, transformer.dtype):
        return "svg"
    say(
        f"dense attention: on {jax.devices()[0].device_kind} it is faster than sparse attention, "
        "whose fast kernel is made for H100 and H200; --attention svg runs it all the same"
    )
    return "dense"


def with_sparsity(
    pipeline: VideoPipeline, settings: RunSettings, given_sparsity: Given, given_warmup: Given
) -> RunSettings:
    """Add the given sparsity and warm-up, completed by the model's or paper's; print both."""
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
    """Keep compiled programs in the cache if there is a GPU and no other place is configured.

    On a GPU, XLA times algorithms to choose one, and the choice varies: a resumed run gives the
    same bytes only with the programs that it began with. It also saves a minute of compilation.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
