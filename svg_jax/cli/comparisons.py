"""Work of `svg-jax compare` and `svg-jax demo`."""

import dataclasses
import shlex
import tempfile
from pathlib import Path

from svg_jax.bundled import FOLDER, NAME
from svg_jax.cli.console import bytes_bar, print_parts, say, steps_bar, tell
from svg_jax.cli.given import (
    checked,
    inputs_of,
    load_model,
    read_given,
    shown_at,
    size_of,
    with_sparsity,
)
from svg_jax.cli.options import Given
from svg_jax.cli.outputs import check_outputs, json_report
from svg_jax.cli.tables import comparison_table, stages_table, stages_values
from svg_jax.config import dense_step_count
from svg_jax.convert import convert_pipeline
from svg_jax.convert.run_defaults import read_run_defaults
from svg_jax.evaluation.comparison import Comparison, Pattern
from svg_jax.evaluation.comparison import compare as compare_attention
from svg_jax.evaluation.report import ComparisonReport
from svg_jax.media.captions import caption_bar
from svg_jax.media.video import (
    SUFFIXES,
    check_fps,
    check_video_size,
    enlarge,
    save_video,
    side_by_side,
    to_uint8,
    with_label,
)
from svg_jax.sampling import VideoPipeline, from_pretrained
from svg_jax.sampling.settings import RunSettings
from svg_jax.stages import Stopwatch, stage, stopwatch

_ENOUGH = 0.8  # share of the asked density; below it the figures are those of another density


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
    paths = _paths_of(output)
    written = [("--output", path) for path in paths]
    if json_file is not None:
        written.append(("--json", json_file))
    check_outputs(written, inputs_of(model, given))
    given, shown = checked(read_given(given), sparsity, warmup)
    with json_report(json_file) as write, stopwatch() as watch:
        with stage("loading"):
            pipeline = load_model(model)
        fps, factor = shown_at(pipeline, shown)
        settings = pipeline.settings(**given)
        frames, height, width = size_of(pipeline, settings)
        bar = caption_bar(width * factor, _captions(pattern, 1.0, 100.0, 100.0))
        rows, columns = height * factor + bar.height, 2 * bar.width + 2 * factor
        for path in paths:
            check_fps(fps, path)
            check_video_size(path, frames, rows, columns, fps)
        settings = with_sparsity(pipeline, settings, sparsity, warmup)
        report = _compare(pipeline, settings, pattern, paths, watch, fps=fps, factor=factor)
        write(report.values() | stages_values(watch))


def demo(given: Given, *, sparsity: Given, output: Path, source: Path | None) -> None:
    """Convert the bundled model into a temporary folder, and compare dense with sparse attention.

    Another model takes the bundled one's defaults if its own folder has none.
    """
    paths = _paths_of(output)
    check_outputs([("--output", path) for path in paths], {"--source": source})
    given, shown = checked(given, sparsity, {})
    with tempfile.TemporaryDirectory() as scratch, stopwatch() as watch:
        converted = Path(scratch) / "model"
        with stage("converting"), bytes_bar() as progress:
            convert_pipeline(source or FOLDER, converted, progress=progress)
        with stage("loading"):
            pipeline = from_pretrained(converted)
        if not pipeline.defaults.given():
            pipeline = dataclasses.replace(pipeline, defaults=read_run_defaults(FOLDER))
        fps, factor = shown_at(pipeline, shown)
        settings = with_sparsity(pipeline, pipeline.settings(**given), sparsity, {})
        _compare(pipeline, settings, "svg", paths, watch, fps=fps, factor=factor)
    words = "--model", str(source or NAME), "--prompt", given["prompt"], "--output", "video.gif"
    say(f"next: svg-jax generate {shlex.join(words)}")


def _compare(
    pipeline: VideoPipeline,
    settings: RunSettings,
    pattern: Pattern,
    paths: list[Path],
    watch: Stopwatch,
    *,
    fps: float,
    factor: int,
) -> ComparisonReport:
    """Make both videos, write them side by side, and print the figures."""
    num_steps, warmup = settings.num_inference_steps, settings.warmup
    assert num_steps is not None
    assert warmup is not None
    total = 2 * num_steps - dense_step_count(warmup, num_steps)
    with steps_bar(total, watch) as advance:
        comparison = compare_attention(
            pipeline, settings, pattern=pattern, callback_on_step_end=lambda part, _: advance(part)
        )
        with stage("writing"):
            _write(comparison, paths, fps=fps, factor=factor)
    report = comparison.report
    print_parts(comparison_table(report), stages_table(watch))
    _warn_of_density(report)
    return report


def _write(comparison: Comparison, paths: list[Path], *, fps: float, factor: int) -> None:
    report, dense, sparse = comparison.report, comparison.dense.frames, comparison.sparse.frames
    assert report.density is not None  # None is for a custom attend
    if dense is None or sparse is None:
        say("this checkpoint was converted without its VAE: there are no videos to write")
        return
    captions = _captions(
        report.pattern, report.density, report.dense_seconds, report.sparse_seconds
    )
    labelled = [
        with_label(enlarge(to_uint8(frames), factor), caption, beside=captions)
        for frames, caption in zip((dense, sparse), captions, strict=True)
    ]
    both = side_by_side(*labelled, gap=2 * factor)
    for path in paths:
        save_video(both, path, fps=fps)
        say(f"wrote {path}")


def _warn_of_density(report: ComparisonReport) -> None:
    """Warn if much less is computed than was asked, since quality and speed are then of that."""
    asked, computed = report.requested_density, report.density
    if asked is not None and computed is not None and computed < _ENOUGH * asked:
        tell(
            f"of the density {asked:g} that was asked only {computed:.3f} is computed: the band is "
            "rounded to a multiple of --band-multiple tokens, and padded text is left out; the "
            f"figures are those of density {computed:.3f}"
        )


def _captions(pattern: str, density: float, dense: float, sparse: float) -> tuple[str, str]:
    left = f"dense: {dense:.2f} s a step"
    return left, f"{pattern}, density {density:.2f}: {sparse:.2f} s a step"


def _paths_of(output: Path) -> list[Path]:
    """List the videos to write: the given file, or both formats of a name without suffix."""
    if output.suffix.lower() in SUFFIXES:
        return [output]
    if output.name in ("", ".."):
        raise ValueError(f"output must name a video: got {str(output)!r}")
    return [output.with_name(output.name + suffix) for suffix in (".mp4", ".gif")]
