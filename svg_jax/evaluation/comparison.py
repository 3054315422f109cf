"""One video twice, with dense and with sparse attention, and how the two differ."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from svg_jax.config import SparsityConfig, Warmup, dense_step_count
from svg_jax.evaluation.report import ComparisonReport
from svg_jax.kernels import pick_implementation
from svg_jax.masks import sparse_mask
from svg_jax.media.metrics import SSIM_WINDOW, psnr, ssim
from svg_jax.models import Attend
from svg_jax.provenance import device_name, versions
from svg_jax.sampling.components import in_memory
from svg_jax.sampling.pipeline import VideoOutput, VideoPipeline
from svg_jax.sampling.records import SamplingInfo, StepRecord, median_seconds
from svg_jax.sampling.settings import SettingError, check_settings, count_prompts

Pattern = Literal["svg", "spatial", "temporal", "random"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The two videos and what was measured."""

    dense: VideoOutput
    sparse: VideoOutput
    report: ComparisonReport


def compare(
    pipeline: VideoPipeline,
    prompt: str | None,
    *,
    sparsity: SparsityConfig | None = None,
    warmup: Warmup | None = None,
    attend: Attend | None = None,
    pattern: Pattern = "svg",
    seed: int | None = 0,
    callback_on_step_end: Callable[[str, StepRecord], None] | None = None,
    **arguments: Any,
) -> Comparison:
    """Generate a video with dense and with other attention from the same noise and schedule.

    The dense warm-up, which both share, is computed once.

    Args:
        pipeline: What generates.
        prompt: One prompt; or None, and prompt_embeds among the arguments.
        sparsity: Sparsity of the other run.
        warmup: Its dense warm-up, which must leave steps to compare; None is `Warmup()`.
        attend: An attention of one's own in its place, in all steps (see `VideoPipeline`).
        pattern: "svg" profiles heads online; the others give all heads these labels, as ablations.
        seed: Seed of the noise, the sampled rows, and random labels; None draws one.
        callback_on_step_end: Called with "warm-up", "dense" or "sparse" and the step's record.
        **arguments: More of the pipeline's `prepare`.

    Raises:
        ValueError: On arguments that do not fit, or a warm-up that takes all steps.
    """
    check_settings({"sparsity": sparsity, "warmup": warmup, "attend": attend})
    if (sparsity is None) == (attend is None):
        raise SettingError("sparsity", "is missing: pass either a sparsity or an attend")
    settings = pipeline.settings(prompt, seed=seed, **arguments)
    num_steps = settings["num_inference_steps"]
    videos = count_prompts(settings["prompt"], settings["prompt_embeds"])
    videos *= settings["num_videos_per_prompt"]
    if videos != 1:
        raise SettingError("prompt", f"of compare is one at a time, for one video: got {videos}")
    dense_steps = 0 if sparsity is None else dense_step_count(warmup or Warmup(), num_steps)
    if dense_steps == num_steps:
        raise SettingError("warmup.steps", f"leaves none of {num_steps} steps to be sparse")
    config, dtype = pipeline.transformer.config, np.dtype(pipeline.transformer.dtype)
    heads = (num_steps, config.num_attention_layers, 1, config.num_attention_heads)
    labels = labels_of_pattern(pattern, heads, settings["seed"])
    start = pipeline.prepare(**settings)
    if sparsity is not None:
        sparse_mask(start.layout, sparsity)  # a density that leaves nothing: not after dense steps

    def tell(part: str) -> Callable[[StepRecord], None]:
        def callback(record: StepRecord) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(part, record)

        return callback

    rest = range(dense_steps, num_steps)
    with in_memory(pipeline.transformer) as transformer:  # loaded once for all three parts
        loaded = dataclasses.replace(pipeline, transformer=transformer)
        warm, shared = loaded.denoise(
            start, steps=range(dense_steps), callback_on_step_end=tell("warm-up")
        )
        dense_run, dense_records = loaded.denoise(
            warm, steps=rest, callback_on_step_end=tell("dense")
        )
        sparse_run, sparse_records = loaded.denoise(
            warm,
            sparsity=sparsity,
            warmup=warmup,
            attend=attend,
            labels=labels,
            steps=rest,
            callback_on_step_end=tell("sparse"),
        )
        del transformer, loaded
    dense = pipeline.decode(dense_run, SamplingInfo(shared + dense_records))
    sparse = pipeline.decode(sparse_run, SamplingInfo(shared + sparse_records))

    enough = dense.frames is not None and min(dense.frames.shape[2:4]) >= SSIM_WINDOW
    spatial_share, profiled = sparse.info.spatial_share, bool(sparse.info.profiles)
    report = ComparisonReport(
        prompt=prompt or "(given embeddings)",
        seed=start.seed,
        pattern=pattern if attend is None else getattr(attend, "__name__", type(attend).__name__),
        num_inference_steps=num_steps,
        dense_steps=dense_steps,
        guided_steps=sum(scale != 1 for scale in start.scales),
        requested_density=None if sparsity is None else sparsity.density,
        density=sparse.info.density if profiled else None,
        latents=start.state.latents.shape[1:],
        num_tokens=start.layout.num_tokens,
        psnr=_of_pixels(psnr, sparse, dense),
        ssim=_of_pixels(ssim, sparse, dense) if enough else None,
        dense_seconds=median_seconds(dense_records),
        sparse_seconds=median_seconds(sparse_records),
        spatial_share=() if spatial_share is None else tuple(spatial_share.tolist()),
        implementation=pick_implementation(None, config.attention_head_dim, dtype),
        dtype=dtype.name,
        device=device_name(),
        versions=versions(),
    )
    return Comparison(dense, sparse, report)


def labels_of_pattern(
    pattern: Pattern, shape: tuple[int, int, int, int], seed: int
) -> Bool[np.ndarray, "steps layers entries heads"] | None:
    """Labels for an ablation; None for "svg", which profiles.

    Raises:
        ValueError: At another pattern.
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
