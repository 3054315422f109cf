"""Work of `svg-jax generate`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from svg_jax.cli.console import print_parts, say, steps_bar
from svg_jax.cli.given import (
    checked,
    faster_attention,
    inputs_of,
    load_model,
    read_given,
    shown_at,
    size_of,
    with_sparsity,
)
from svg_jax.cli.options import Given
from svg_jax.cli.outputs import check_outputs, json_report
from svg_jax.cli.tables import stages_table, stages_values
from svg_jax.config import dense_step_count
from svg_jax.convert.files import written_atomically
from svg_jax.kernels import pick_implementation
from svg_jax.media.video import (
    check_fps,
    check_video_path,
    check_video_size,
    enlarge,
    save_video,
    to_uint8,
)
from svg_jax.provenance import device_name, versions
from svg_jax.sampling import VideoOutput, VideoPipeline
from svg_jax.sampling.prompt_list import (
    VideoJob,
    generate_videos,
    output_paths,
    plan_videos,
    read_prompts,
    state_path,
)
from svg_jax.sampling.records import median_seconds
from svg_jax.sampling.settings import RunSettings
from svg_jax.stages import Stopwatch, stage, stopwatch

_MOST_VIDEOS = 1000  # of a run, each of which is a file; no device holds that many


def generate(
    model: Given,
    output: Path,
    given: Given,
    *,
    attention: Literal["dense", "svg"] | None,
    sparsity: Given,
    warmup: Given,
    prompts: Path | None,
    labels_out: Path | None,
    json_file: Path | None,
) -> None:
    """Generate and write a video, or one for each prompt of a file, or the latents.

    Args:
        model: Given arguments of `from_pretrained`.
        output: File, folder or pattern to write.
        given: Given settings, with files in place of arrays and images.
        attention: Name of the attention; None chooses, unless sparse attention has options.
        sparsity: Given fields of a SparsityConfig.
        warmup: Given fields of a Warmup.
        prompts: File with a prompt on each line, in place of a prompt.
        labels_out: File for labels, errors and densities.
        json_file: File for the figures as JSON, or "-".
    """
    outputs, given = {output: given.get("prompt")}, dict(given)
    if prompts is not None:
        replaced = {"prompt", "prompt_embeds", "num_videos_per_prompt"}
        if labels_out is not None or not replaced.isdisjoint(given):
            raise ValueError(
                "--prompts stands in place of --prompt, and takes no --labels-out or --num-videos"
            )
        given["prompt"] = read_prompts(prompts)
        paths = output_paths(output, len(given["prompt"]))
        outputs = dict(zip(paths, given["prompt"], strict=True))
    inputs = inputs_of(model, given) | {"--prompts": prompts}
    _check_written(outputs, labels_out, json_file, inputs)
    if labels_out is not None and attention == "dense":
        raise ValueError("--labels-out needs --attention svg: dense attention has no labels")
    given, shown = checked(read_given(given), sparsity, warmup)
    videos = len(given.get("prompt_embeds", "1")) * given.get("num_videos_per_prompt", 1)
    if videos > _MOST_VIDEOS:
        raise ValueError(
            f"num_videos_per_prompt gives a batch of {videos} videos: ask for at most "
            f"{_MOST_VIDEOS}"
        )
    if videos > 1:
        _check_written(_files_of(output, videos), labels_out, json_file, inputs)
    with json_report(json_file) as report, stopwatch() as watch:
        with stage("loading"):
            pipeline = load_model(model)
        if attention is None and not (sparsity or warmup or labels_out):
            attention = faster_attention(pipeline)
        fps, factor = shown_at(pipeline, shown)
        settings = pipeline.settings(**given, state_file=state_path(next(iter(outputs))))
        _check_size(pipeline, settings, outputs, fps=fps, enlarge=factor)
        if attention != "dense":
            settings = with_sparsity(pipeline, settings, sparsity, warmup)
        if labels_out is not None:
            _check_labels(settings)
        written_as = None if prompts is None else {"fps": fps, "enlarge": factor}
        if written_as is not None and settings.vae_tiling:
            written_as["vae_tiling"] = True
        jobs = plan_videos(pipeline, outputs, settings, written_as=written_as)
        if skipped := len(outputs) - len(jobs):
            say(f"{skipped} of {len(outputs)} videos are there already")
        if settings.resume and prompts is None and jobs[0].file.arrays is None:
            say(f"no run of {output} was saved: it starts at the first step")
        written = []

        @stage("writing")
        def write(video: VideoOutput, path: Path) -> None:
            written.append(_write(video, path, fps=fps, factor=factor))
            if labels_out is not None:
                video.info.save(labels_out)

        figures = _generate(pipeline, jobs, write, watch, keep_record=prompts is not None)
        report({"videos": written, **figures, **stages_values(watch)})


def _generate(
    pipeline: VideoPipeline,
    jobs: Sequence[VideoJob],
    write: Callable[[VideoOutput, Path], None],
    watch: Stopwatch,
    *,
    keep_record: bool,
) -> dict[str, Any]:
    """Make the planned videos under a bar of all their steps; print and return what ran where."""
    if not jobs:
        return {}
    settings = jobs[0].settings
    assert settings.num_inference_steps is not None
    left = sum(settings.num_inference_steps - len(job.file.records) for job in jobs)
    with steps_bar(left, watch) as advance:
        generate_videos(
            pipeline,
            jobs,
            write=write,
            keep_record=keep_record,
            callback_on_step_end=lambda _: advance("denoising"),
        )
    dtype = np.dtype(pipeline.transformer.dtype)
    kernel = pick_implementation(None, pipeline.transformer.config.attention_head_dim, dtype)
    attention = "dense attention" if settings.sparsity is None else f"sparse attention by {kernel}"
    say(f"{attention} in {dtype.name}, on {device_name()}")
    print_parts(stages_table(watch))
    return {
        "attention": attention,
        "requested_density": None if settings.sparsity is None else settings.sparsity.density,
        "dtype": dtype.name,
        "device": device_name(),
        "versions": versions(),
    }


def _write(video: VideoOutput, path: Path, *, fps: float, factor: int) -> dict[str, Any]:
    """Write what a run made, each video to a file of its own; return the figures of the run."""
    seconds = median_seconds(video.info.steps)
    if path.suffix.lower() == ".npz":
        files = [path]
        with written_atomically(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, latents=video.latents)
    else:
        assert video.frames is not None
        files = _files_of(path, len(video.frames))
        for frames, file in zip(video.frames, files, strict=True):
            save_video(enlarge(to_uint8(frames), factor), file, fps=fps)
    say(f"wrote {', '.join(map(str, files))} ({seconds:.2f} s a step)")
    return {
        "files": [str(file) for file in files],
        "seed": video.info.seed,
        "num_inference_steps": len(video.info.steps),
        "density": video.info.density,
        "seconds_per_step": seconds,
    }


def _files_of(output: Path, count: int) -> list[Path]:
    """Name the file of each video of a run, as cat-0.mp4 and cat-1.mp4 if cat.mp4 has two."""
    if count == 1 or output.suffix.lower() == ".npz":
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(count)]


def _check_written(
    outputs: Iterable[Path],
    labels_out: Path | None,
    json_file: Path | None,
    inputs: Mapping[str, Any],
) -> None:
    """Raise unless `generate` can write every file that it will."""
    for path in outputs:
        if path.suffix.lower() != ".npz":
            check_video_path(path)
    written = [("--output", path) for path in outputs]
    written += [("the saved state", state_path(path)) for path in outputs]
    others = {"--labels-out": labels_out, "--json": json_file}
    written += [(option, path) for option, path in others.items() if path is not None]
    check_outputs(written, inputs)


def _check_size(
    pipeline: VideoPipeline,
    settings: RunSettings,
    outputs: Iterable[Path],
    *,
    fps: float,
    enlarge: int,
) -> None:
    """Raise ValueError if the model makes no frames, or a video that its file cannot hold."""
    videos = [path for path in outputs if path.suffix.lower() != ".npz"]
    frames, height, width = size_of(pipeline, settings)
    for path in videos:
        check_fps(fps, path)
        check_video_size(path, frames, height * enlarge, width * enlarge, fps)
    if videos and not pipeline.makes_frames:
        raise ValueError(
            "this checkpoint was converted without its VAE: convert it with the VAE, or write "
            "latents (--output latents.npz)"
        )


def _check_labels(settings: RunSettings) -> None:
    """Raise ValueError if a run has no sparse step, and so no labels to write."""
    steps, warmup = settings.num_inference_steps, settings.warmup
    assert steps is not None
    assert warmup is not None
    if dense_step_count(warmup, steps) == steps:
        raise ValueError(
            f"--labels-out has nothing to hold: --dense-steps {warmup.steps:g} leaves none of "
            f"{steps} steps to be sparse"
        )
