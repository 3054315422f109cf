"""Work of the commands for videos."""

import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from svg_jax.bundled import FOLDER, NAME
from svg_jax.cli.console import bytes_bar, print_parts, say, steps_bar
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
from svg_jax.cli.outputs import check_outputs
from svg_jax.cli.tables import comparison_table
from svg_jax.config import dense_step_count
from svg_jax.convert import convert_pipeline
from svg_jax.convert.files import written_atomically
from svg_jax.convert.run_defaults import read_run_defaults
from svg_jax.evaluation.comparison import Comparison, Pattern
from svg_jax.evaluation.comparison import compare as compare_attention
from svg_jax.kernels import pick_implementation
from svg_jax.media.captions import caption_bar
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
    """
    outputs, given = {output: given.get("prompt")}, dict(given)
    if prompts is not None:
        if labels_out is not None or not given.keys().isdisjoint(("prompt", "prompt_embeds")):
            raise ValueError("--prompts stands in place of --prompt, and takes no --labels-out")
        given["prompt"] = read_prompts(prompts)
        paths = output_paths(output, len(given["prompt"]))
        outputs = dict(zip(paths, given["prompt"], strict=True))
    wants_latents = next(iter(outputs)).suffix.lower() == ".npz"
    _check_written(outputs, labels_out, inputs_of(model, given) | {"--prompts": prompts})
    if labels_out is not None and attention == "dense":
        raise ValueError("--labels-out needs --attention svg: dense attention has no labels")
    given = read_given(given)
    videos = len(given.get("prompt_embeds", "1"))
    if videos > 1 and not wants_latents:
        raise ValueError(
            f"prompt_embeds are of {videos} videos, and {output.name} holds one: give those of one "
            "prompt, or write latents (.npz)"
        )
    given, shown = checked(given, sparsity, warmup)
    pipeline = load_model(model)
    if attention is None and not (sparsity or warmup or labels_out):
        attention = faster_attention(pipeline)
    fps, enlarge = shown_at(pipeline, shown)
    settings = pipeline.settings(**given, state_file=state_path(next(iter(outputs))))
    _check_size(pipeline, settings, outputs, fps=fps, enlarge=enlarge)
    if attention != "dense":
        settings = with_sparsity(pipeline, settings, sparsity, warmup)
    if labels_out is not None:
        _check_labels(settings)
    written_as = None if prompts is None else {"fps": fps, "enlarge": enlarge}
    if written_as is not None and settings.vae_tiling:
        written_as["vae_tiling"] = True
    jobs = plan_videos(pipeline, outputs, settings, written_as=written_as)
    if skipped := len(outputs) - len(jobs):
        say(f"{skipped} of {len(outputs)} videos are there already")
    if settings.resume and prompts is None and jobs[0].file.saved is None:
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

    _generate(pipeline, jobs, write, keep_record=prompts is not None)


def _generate(
    pipeline: VideoPipeline,
    jobs: Sequence[VideoJob],
    write: Callable[[VideoOutput, Path], None],
    *,
    keep_record: bool,
) -> None:
    """Make the planned videos under a bar of all their steps; print the kernel that ran."""
    if not jobs:
        return
    settings = jobs[0].settings
    assert settings.num_inference_steps is not None
    left = sum(settings.num_inference_steps - len(job.file.records) for job in jobs)
    with steps_bar(left) as advance:
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


def _check_written(
    outputs: Iterable[Path], labels_out: Path | None, inputs: Mapping[str, Any]
) -> None:
    """Raise unless `generate` can write every file that it will."""
    written = [("--output", path) for path in outputs]
    for path in outputs:
        if path.suffix.lower() != ".npz":
            check_video_path(path)
    written += [("the saved state", state_path(path)) for path in outputs]
    if labels_out is not None:
        written.append(("--labels-out", labels_out))
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


def compare(
    model: Given,
    output: Path,
    given: Given,
    *,
    sparsity: Given,
    warmup: Given,
    pattern: Pattern,
    json_file: Path | None,
) -> None:
    """Generate a video with dense and with sparse attention; write both side by side.

    The arguments are those of `generate` and of `svg_jax.evaluation.comparison.compare`.
    """
    written = [("--output", path) for path in _comparison_paths(output)]
    if json_file is not None:
        written.append(("--json", json_file))
    check_outputs(written, inputs_of(model, given))
    given, shown = checked(read_given(given), sparsity, warmup)
    pipeline = load_model(model)
    fps, enlarge = shown_at(pipeline, shown)
    settings = pipeline.settings(**given)
    frames, height, width = size_of(pipeline, settings)
    bar = caption_bar(width * enlarge, _captions(pattern, 1.0, 100.0, 100.0))
    rows, columns = height * enlarge + bar.height, 2 * bar.width + 2 * enlarge
    for path in _comparison_paths(output):
        check_fps(fps, path)
        check_video_size(path, frames, rows, columns, fps)
    settings = with_sparsity(pipeline, settings, sparsity, warmup)
    comparison = _compare(pipeline, settings, pattern)
    _write_comparison(comparison, output, fps=fps, factor=enlarge)
    if json_file is not None:
        comparison.report.save(json_file)


def demo(given: Given, *, sparsity: Given, output: Path, source: Path | None) -> None:
    """Convert the bundled model into a temporary folder, and compare dense with sparse attention.

    Another model takes the bundled one's defaults if its own folder has none.
    """
    check_outputs([("--output", path) for path in _comparison_paths(output)], {"--source": source})
    given, shown = checked(given, sparsity, {})
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "model"
        with bytes_bar() as progress:
            convert_pipeline(source or FOLDER, converted, progress=progress)
        pipeline = from_pretrained(converted)
        if not pipeline.defaults.given():
            pipeline = dataclasses.replace(pipeline, defaults=read_run_defaults(FOLDER))
        fps, enlarge = shown_at(pipeline, shown)
        settings = with_sparsity(pipeline, pipeline.settings(**given), sparsity, {})
        comparison = _compare(pipeline, settings, "svg")
    _write_comparison(comparison, output, fps=fps, factor=enlarge)
    words = "--model", str(source or NAME), "--prompt", given["prompt"], "--output", "video.gif"
    say(f"next: svg-jax generate {shlex.join(words)}")


def _compare(pipeline: VideoPipeline, settings: RunSettings, pattern: Pattern) -> Comparison:
    num_steps, warmup = settings.num_inference_steps, settings.warmup
    assert num_steps is not None
    assert warmup is not None
    shared = dense_step_count(warmup, num_steps)
    with steps_bar(2 * num_steps - shared) as advance:
        return compare_attention(
            pipeline,
            settings,
            pattern=pattern,
            callback_on_step_end=lambda part, _: advance(part),
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


def _captions(pattern: str, density: float, dense: float, sparse: float) -> tuple[str, str]:
    left = f"dense: {dense:.2f} s a step"
    return left, f"{pattern}, density {density:.2f}: {sparse:.2f} s a step"


def _comparison_paths(output: Path) -> list[Path]:
    if output.name in ("", ".."):
        raise ValueError(f"output is the beginning of two files' names: got {str(output)!r}")
    return [output.with_name(output.name + suffix) for suffix in (".mp4", ".gif")]
