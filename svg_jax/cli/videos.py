"""What the commands for videos do."""

import dataclasses
import inspect
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from svg_jax.array_files import read_arrays
from svg_jax.bundled import FOLDER, NAME
from svg_jax.cli.console import bytes_bar, print_parts, say, steps_bar
from svg_jax.cli.options import flag_of
from svg_jax.cli.outputs import check_outputs
from svg_jax.cli.tables import comparison_table
from svg_jax.config import Preset, SparsityConfig, Warmup, dense_step_count
from svg_jax.convert import convert_pipeline
from svg_jax.convert.files import written_atomically
from svg_jax.convert.run_defaults import read_run_defaults
from svg_jax.evaluation.comparison import Comparison, Pattern
from svg_jax.evaluation.comparison import compare as compare_attention
from svg_jax.kernels import pick_implementation
from svg_jax.media.captions import caption_bar
from svg_jax.media.images import with_images_read
from svg_jax.media.video import (
    check_fps,
    check_video_path,
    check_video_size,
    save_video,
    side_by_side,
    to_uint8,
    with_label,
)
from svg_jax.media.video import enlarge as enlarge_frames
from svg_jax.provenance import device_name
from svg_jax.sampling import VideoOutput, VideoPipeline, from_pretrained
from svg_jax.sampling.cache import cache_folder
from svg_jax.sampling.prompt_list import (
    generate_videos,
    output_paths,
    plan_videos,
    read_prompts,
    state_path,
)
from svg_jax.sampling.records import median_seconds
from svg_jax.sampling.settings import check_settings, few_steps_note

_IMAGES = {"image", "last_image"}
_ARRAYS = {"latents", "prompt_embeds", "image_latents"}


def generate(
    model: str,
    output: Path,
    *,
    prompt: str | None,
    prompts: Path | None,
    sparsity: Mapping[str, Any] | None,
    warmup: Mapping[str, Any],
    revision: str | None,
    variant: str | None,
    verify: bool,
    dtype: str | None,
    fps: float | None,
    enlarge: int | None,
    labels_out: Path | None,
    save_every: int,
    resume: bool,
    files: Mapping[str, Path | None],
    **arguments: Any,
) -> None:
    """Generate a video, or one of each prompt of a file, and write it, or its latents."""
    outputs, texts = {output: prompt}, prompt
    if prompts is not None:
        if prompt is not None or files["prompt_embeds"] is not None or labels_out is not None:
            raise ValueError("--prompts stands in place of --prompt, and takes no --labels-out")
        texts = read_prompts(prompts)
        outputs = dict(zip(output_paths(output, len(texts)), texts, strict=True))
    wants_latents = next(iter(outputs)).suffix.lower() == ".npz"
    for path in outputs:
        if not wants_latents:
            check_video_path(path)
    written = [("--output", path) for path in outputs]
    written += [("the saved state", state_path(path)) for path in outputs]
    if labels_out is not None:
        written.append(("--labels-out", labels_out))
    check_outputs(written, _inputs(model=model, prompts=prompts, **files, **arguments))
    if labels_out is not None and sparsity is None:
        raise ValueError("--labels-out needs --attention svg: dense attention has no labels")
    arguments = with_images_read(arguments) | read_arrays(files)
    videos = len(arguments.get("prompt_embeds", "1"))
    if videos > 1 and not wants_latents:
        raise ValueError(
            f"prompt_embeds are of {videos} videos, and {output.name} holds one: give those of one "
            "prompt, or write latents (.npz)"
        )
    _check(
        arguments, texts, sparsity or {}, warmup, fps=fps, enlarge=enlarge, save_every=save_every
    )
    pipeline = _load(model, revision=revision, variant=variant, verify=verify, dtype=dtype)
    fps, enlarge = _shown_at(pipeline, fps, enlarge)
    arguments = _arguments_of(pipeline, arguments)
    if not wants_latents:
        frames, height, width = _size_of(pipeline, arguments)
        for path in outputs:
            check_fps(fps, path)
            check_video_size(path, frames, height * enlarge, width * enlarge, fps)
    if not (pipeline.makes_frames or wants_latents):
        raise ValueError(
            "this checkpoint was converted without its VAE: convert it with the VAE, or write "
            "latents (--output latents.npz)"
        )
    steps = arguments["num_inference_steps"]
    if sparsity is not None:
        preset = _sparsity_of(pipeline, sparsity, warmup, arguments)
        if labels_out is not None and dense_step_count(preset.warmup, steps) == steps:
            raise ValueError(
                f"--labels-out has nothing to hold: --dense-steps {preset.warmup.steps:g} leaves "
                f"none of {steps} steps to be sparse"
            )
        arguments |= preset._asdict()
    jobs = plan_videos(
        pipeline,
        outputs,
        written_as=None if prompts is None else {"fps": fps, "enlarge": enlarge},
        save_every=save_every,
        resume=resume,
        **arguments,
    )
    if skipped := len(outputs) - len(jobs):
        say(f"{skipped} of {len(outputs)} videos are there already")
    if resume and prompts is None and jobs[0].file.saved is None:
        say(f"no run of {output} was saved: it starts at the first step")

    def write(video: VideoOutput, path: Path) -> None:
        if wants_latents:
            with written_atomically(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, latents=video.latents)
        else:
            assert video.frames is not None
            save_video(enlarge_frames(to_uint8(video), enlarge), path, fps=fps)
        if labels_out is not None:
            video.info.save(labels_out)
        say(f"wrote {path} ({median_seconds(video.info.steps):.2f} s a step)")

    left = sum(steps - len(job.file.records) for job in jobs)
    with steps_bar(left) as advance:
        generate_videos(
            pipeline,
            jobs,
            write=write,
            keep_record=prompts is not None,
            callback_on_step_end=lambda _: advance("denoising"),
            **arguments,
        )
    if jobs:
        kernel = "dense attention" if sparsity is None else _kernel_of(pipeline)
        say(f"{kernel} in {_dtype_of(pipeline).name}, on {device_name()}")


def _dtype_of(pipeline: VideoPipeline) -> np.dtype:
    return np.dtype(pipeline.transformer.dtype)


def _kernel_of(pipeline: VideoPipeline) -> str:
    head_dim = pipeline.transformer.config.attention_head_dim
    kernel = pick_implementation(None, head_dim, _dtype_of(pipeline))
    return f"sparse attention by {kernel}"


def compare(
    model: str,
    output: Path,
    *,
    sparsity: Mapping[str, Any],
    warmup: Mapping[str, Any],
    pattern: Pattern,
    revision: str | None,
    variant: str | None,
    verify: bool,
    dtype: str | None,
    fps: float | None,
    enlarge: int | None,
    json_file: Path | None,
    files: Mapping[str, Path | None],
    **arguments: Any,
) -> None:
    """Generate a video with dense and with sparse attention; write both side by side."""
    written = [("--output", path) for path in _comparison_paths(output)]
    if json_file is not None:
        written.append(("--json", json_file))
    check_outputs(written, _inputs(model=model, **files, **arguments))
    arguments = with_images_read(arguments) | read_arrays(files)
    _check(arguments, arguments["prompt"], sparsity, warmup, fps=fps, enlarge=enlarge)
    pipeline = _load(model, revision=revision, variant=variant, verify=verify, dtype=dtype)
    fps, enlarge = _shown_at(pipeline, fps, enlarge)
    arguments = _arguments_of(pipeline, arguments)
    frames, height, width = _size_of(pipeline, arguments)
    bar = caption_bar(width * enlarge, _captions(pattern, 1.0, 100.0, 100.0))
    rows, columns = height * enlarge + bar.height, 2 * bar.width + 2 * enlarge
    for path in _comparison_paths(output):
        check_fps(fps, path)
        check_video_size(path, frames, rows, columns, fps)
    preset = _sparsity_of(pipeline, sparsity, warmup, arguments)
    comparison = _compare(pipeline, **preset._asdict(), pattern=pattern, **arguments)
    _write_comparison(comparison, output, fps=fps, factor=enlarge)
    if json_file is not None:
        comparison.report.save(json_file)


def demo(
    prompt: str,
    *,
    density: float | None,
    steps: int | None,
    seed: int,
    output: Path,
    source: Path | None,
) -> None:
    """Convert the bundled model into a temporary folder, and compare dense with sparse.

    Another model is run as the bundled one is, unless its folder says how.
    """
    check_outputs([("--output", path) for path in _comparison_paths(output)], {"--source": source})
    arguments = {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
    given = {} if density is None else {"density": density}
    _check(arguments, prompt, given, {})
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "model"
        with bytes_bar() as progress:
            convert_pipeline(source or FOLDER, converted, progress=progress)
        pipeline = from_pretrained(converted)
        if not pipeline.defaults.given():
            pipeline = dataclasses.replace(pipeline, defaults=read_run_defaults(FOLDER))
        fps, enlarge = _shown_at(pipeline, None, None)
        arguments = _arguments_of(pipeline, arguments)
        preset = _sparsity_of(pipeline, given, {}, arguments)
        comparison = _compare(pipeline, **preset._asdict(), pattern="svg", **arguments)
    _write_comparison(comparison, output, fps=fps, factor=enlarge)
    words = "--model", str(source or NAME), "--prompt", prompt, "--output", "video.gif"
    say(f"next: svg-jax generate {shlex.join(words)}")


def _load(model: str, **options: Any) -> VideoPipeline:
    keep_programs()
    with bytes_bar(visible=False) as progress:
        return from_pretrained(model, progress=progress, **options)


def keep_programs() -> None:
    """Keep compiled programs in the cache, unless the user says where or there is no GPU.

    For a GPU XLA chooses algorithms by timing them, and not always the same: a run that is resumed
    gives the same bytes only with the programs that it began with. Making them takes a minute.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _compare(pipeline: VideoPipeline, prompt: str | None = None, **arguments: Any) -> Comparison:
    num_steps = arguments["num_inference_steps"]
    shared = dense_step_count(arguments["warmup"], num_steps)
    with steps_bar(2 * num_steps - shared) as advance:
        return compare_attention(
            pipeline, prompt, callback_on_step_end=lambda part, _: advance(part), **arguments
        )


def _write_comparison(comparison: Comparison, output: Path, *, fps: float, factor: int) -> None:
    report, dense, sparse = comparison.report, comparison.dense.frames, comparison.sparse.frames
    assert report.density is not None  # of an attention of one's own alone
    print_parts(comparison_table(report))
    if dense is None or sparse is None:
        say("this checkpoint was converted without its VAE: there are no videos to write")
        return
    captions = _captions(
        report.pattern, report.density, report.dense_seconds, report.sparse_seconds
    )
    labelled = [
        with_label(enlarge_frames(to_uint8(frames), factor), caption, beside=captions)
        for frames, caption in zip((dense, sparse), captions, strict=True)
    ]
    both = side_by_side(*labelled, gap=2 * factor)
    for path in _comparison_paths(output):
        save_video(both, path, fps=fps)
        say(f"wrote {path}")


def _captions(
    pattern: str, density: float, dense_seconds: float, sparse_seconds: float
) -> tuple[str, str]:
    return (
        f"dense: {dense_seconds:.2f} s a step",
        f"{pattern}, density {density:.2f}: {sparse_seconds:.2f} s a step",
    )


def _comparison_paths(output: Path) -> list[Path]:
    if output.name in ("", ".."):
        raise ValueError(f"output is the beginning of two files' names: got {str(output)!r}")
    return [output.with_name(output.name + suffix) for suffix in (".mp4", ".gif")]


def _inputs(**given: Any) -> dict[str, Any]:
    """Pick the files and folders among what was given, by their options."""
    names = {"model", "prompts", *_IMAGES, *_ARRAYS} & given.keys()
    return {flag_of(name): given[name] for name in names}


def _check(
    arguments: Mapping[str, Any],
    prompt: str | list[str] | None,
    sparsity: Mapping[str, Any],
    warmup: Mapping[str, Any],
    **others: int | float | None,
) -> None:
    """Raise ValueError if no model could be run so: before one is brought here and converted."""
    SparsityConfig(**sparsity)
    Warmup(**warmup)
    given = {name: value for name, value in {**arguments, **others}.items() if value is not None}
    check_settings({"prompt_embeds": None} | given | {"prompt": prompt})


def _shown_at(pipeline: VideoPipeline, fps: float | None, enlarge: int | None) -> tuple[float, int]:
    """Choose frames per second, and pixels for each pixel: what was given, or the model's."""
    fps = pipeline.default_fps if fps is None else fps
    enlarge = (pipeline.defaults.enlarge or 1) if enlarge is None else enlarge
    check_settings({"fps": fps, "enlarge": enlarge})
    return fps, enlarge


def _arguments_of(pipeline: VideoPipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the arguments that were given, and add the number of steps.

    Raises:
        ValueError: If the model takes no such argument.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if unknown := given.keys() - inspect.signature(pipeline.prepare).parameters:
        raise ValueError(f"this model takes no {' and no '.join(map(flag_of, sorted(unknown)))}")
    return {"num_inference_steps": pipeline.default_steps} | given


def _size_of(pipeline: VideoPipeline, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Count frames, height and width of the video that the arguments make."""
    names = ("num_frames", "height", "width")
    return pipeline.video_size(**{name: arguments[name] for name in names if name in arguments})


def _sparsity_of(
    pipeline: VideoPipeline,
    given_sparsity: Mapping[str, Any],
    given_warmup: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Preset:
    """Take what was given and, for the rest, the model's or the paper's; say which in a line."""
    size = arguments.get("height"), arguments.get("width")
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
    if (note := few_steps_note(warmup, arguments["num_inference_steps"])) is not None:
        say(note)
    return Preset(sparsity, warmup)
