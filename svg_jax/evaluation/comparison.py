"""Comparison of one video with dense and with sparse attention."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from svg_jax.config import Warmup, dense_step_count
from svg_jax.evaluation.report import ComparisonReport
from svg_jax.kernels import pick_implementation
from svg_jax.media.metrics import SSIM_WINDOW, psnr, ssim
from svg_jax.provenance import device_name, versions
from svg_jax.sampling.components import in_memory
from svg_jax.sampling.pipeline import VideoOutput, VideoPipeline
from svg_jax.sampling.records import SamplingInfo, StepRecord, median_seconds
from svg_jax.sampling.settings import RunSettings, SettingError, with_values

Pattern = Literal["svg", "spatial", "temporal", "random"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both videos, and their figures."""

    dense: VideoOutput
    sparse: VideoOutput
    report: ComparisonReport


def compare(
    pipeline: VideoPipeline,
    settings: RunSettings,
    *,
    pattern: Pattern = "svg",
    callback_on_step_end: Callable[[str, StepRecord], None] | None = None,
) -> Comparison:
    """Generate a video with dense and with other attention from the same noise and schedule.

    The dense warm-up, which both share, is computed once.

    Args:
        pipeline: Pipeline of the model.
        settings: Settings of one video, from `pipeline.settings`, with the sparsity of the other
            run, or with an `attend` in its place.
        pattern: Labels of the heads: "svg" for online profiling; the others are ablations.
        callback_on_step_end: Function to call with "warm-up", "dense" or "sparse" and the record of
            each step.

    Raises:
        ValueError: If the settings are not those of one sparse video, or all steps are warm-up.
    """
    settings = pipeline.completed(settings)
    sparsity, warmup, attend = settings.sparsity, settings.warmup, settings.attend
    num_steps, seed = settings.num_inference_steps, settings.seed
    assert num_steps is not None
    assert seed is not None
    if (sparsity is None) == (attend is None):
        raise SettingError("sparsity", "is missing: pass either a sparsity or an attend")
    for field in ("labels", "state_file", "callback_on_step_end"):
        if getattr(settings, field) is not None:
            raise SettingError(field, "is of one run: a comparison takes none")
    if settings.num_videos != 1:
        raise SettingError(
            "prompt", f"of compare is one at a time, for one video: got {settings.num_videos}"
        )
    dense_steps = 0 if sparsity is None else dense_step_count(warmup or Warmup(), num_steps)
    if dense_steps == num_steps:
        raise SettingError("warmup.steps", f"leaves none of {num_steps} steps to be sparse")
    config, dtype = pipeline.transformer.config, np.dtype(pipeline.transformer.dtype)
    heads = (num_steps, config.num_attention_layers, 1, config.num_attention_heads)
    labels = labels_of_pattern(pattern, heads, seed)
    start = pipeline.prepare(with_values(settings, labels=labels))
    rest = range(dense_steps, num_steps)

    def tell(part: str) -> Callable[[StepRecord], None] | None:
        return callback_on_step_end and partial(callback_on_step_end, part)

    with in_memory(pipeline.transformer) as transformer:  # loaded once for all three parts
        loaded = dataclasses.replace(pipeline, transformer=transformer)
        warm, shared = loaded.denoise(
            start.dense(), steps=range(dense_steps), callback_on_step_end=tell("warm-up")
        )
        dense_run, dense_records = loaded.denoise(
            warm, steps=rest, callback_on_step_end=tell("dense")
        )
        sparse_run, sparse_records = loaded.denoise(
            dataclasses.replace(start, state=warm.state),
            steps=rest,
            callback_on_step_end=tell("sparse"),
        )
        del transformer, loaded
    form = {"output_type": settings.output_type, "vae_tiling": settings.vae_tiling}
    dense = pipeline.decode(dense_run, SamplingInfo(shared + dense_records), **form)
    sparse = pipeline.decode(sparse_run, SamplingInfo(shared + sparse_records), **form)

    report = ComparisonReport(
        prompt=settings.prompt if isinstance(settings.prompt, str) else "(given embeddings)",
        pattern=pattern if attend is None else getattr(attend, "__name__", type(attend).__name__),
        seed=start.seed,
        num_inference_steps=num_steps,
        dense_steps=dense_steps,
        guided_steps=sum(scale != 1 for scale in start.scales),
        latents=start.state.latents.shape[1:],
        num_tokens=start.layout.num_tokens,
        requested_density=None if sparsity is None else sparsity.density,
        implementation=pick_implementation(None, config.attention_head_dim, dtype),
        dtype=dtype.name,
        **_of_videos(dense, sparse),
        dense_seconds=median_seconds(dense_records),
        sparse_seconds=median_seconds(sparse_records),
        device=device_name(),
        versions=versions(),
    )
    return Comparison(dense, sparse, report)


def _of_videos(dense: VideoOutput, sparse: VideoOutput) -> dict[str, Any]:
    """Collect the figures of the two videos."""
    enough = dense.frames is not None and min(dense.frames.shape[2:4]) >= SSIM_WINDOW
    spatial_share, profiled = sparse.info.spatial_share, bool(sparse.info.profiles)
    return {
        "density": sparse.info.density if profiled else None,
        "psnr": _of_pixels(psnr, sparse, dense),
        "ssim": _of_pixels(ssim, sparse, dense) if enough else None,
        "spatial_share": () if spatial_share is None else tuple(spatial_share.tolist()),
    }


def labels_of_pattern(
    pattern: Pattern, shape: tuple[int, int, int, int], seed: int
) -> Bool[np.ndarray, "steps layers entries heads"] | None:
    """Make the labels of an ablation; None for "svg", which profiles.

    Raises:
        ValueError: If there is no such pattern.
    """
    if pattern == "svg":
        return None
    if pattern == "random":
        return np.random.default_rng(seed).random(shape) < 0.5
    if pattern not in ("spatial", "temporal"):
        raise SettingError("pattern", f"is svg, spatial, temporal or random: got {pattern!r}")
    return np.full(shape, pattern == "temporal")


def _of_pixels(
    metric: Callable[[np.ndarray, np.ndarray], float], video: VideoOutput, reference: VideoOutput
) -> float | None:
    if video.frames is None or reference.frames is None:
        return None
    return metric(2 * video.frames[0] - 1, 2 * reference.frames[0] - 1)
