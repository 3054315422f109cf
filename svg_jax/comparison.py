"""One video twice, with dense and with sparse attention, and how the two differ."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool

from svg_jax.config import SparsityConfig, dense_step_count
from svg_jax.kernels import pick_implementation
from svg_jax.masks import sparse_mask
from svg_jax.metrics import SSIM_WINDOW, psnr, ssim
from svg_jax.report import ComparisonReport
from svg_jax.sampling.components import in_memory
from svg_jax.sampling.pipeline import VideoOutput, VideoPipeline
from svg_jax.sampling.record import SamplingInfo, StepRecord, median_seconds

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
    sparsity: SparsityConfig,
    pattern: Pattern = "svg",
    seed: int = 0,
    callback_on_step_end: Callable[[str, StepRecord], None] | None = None,
    **arguments: Any,
) -> Comparison:
    """Generates a video with dense and with sparse attention from the same noise and schedule.

    The dense warm-up, which both share, is computed once.

    Args:
        pipeline: What generates.
        prompt: One prompt; or None, and prompt_embeds among the arguments.
        sparsity: Of the sparse run; its warm-up must leave steps to compare.
        pattern: "svg" profiles heads online; the others give all heads these labels, as ablations.
        seed: Of the noise, the sampled rows, and random labels.
        callback_on_step_end: Called with "warm-up", "dense" or "sparse" and the step's record.
        **arguments: More of the pipeline's `prepare`.

    Raises:
        ValueError: On arguments that do not fit, or a warm-up that takes all steps.
    """
    start = pipeline.prepare(prompt, seed=seed, **arguments)
    if len(start.state.latents) != 1:
        raise ValueError(f"compare takes one prompt at a time: got {len(start.state.latents)}")
    sparse_mask(start.layout, sparsity)  # a density that leaves nothing: not after dense steps
    num_steps = start.schedule.num_steps
    dense_steps = dense_step_count(sparsity, num_steps)
    if dense_steps == num_steps:
        raise ValueError(
            f"dense_steps={sparsity.dense_steps} leaves none of {num_steps} steps to be sparse"
        )

    def tell(part: str) -> Callable[[StepRecord], None]:
        def callback(record: StepRecord) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(part, record)

        return callback

    config, dtype = pipeline.transformer.config, np.dtype(pipeline.transformer.dtype)
    heads = (num_steps, config.num_attention_layers, 1, config.num_attention_heads)
    labels = labels_of_pattern(pattern, heads, seed)
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
            labels=labels,
            steps=rest,
            callback_on_step_end=tell("sparse"),
        )
        del transformer, loaded
    dense = pipeline.decode(dense_run, SamplingInfo(shared + dense_records))
    sparse = pipeline.decode(sparse_run, SamplingInfo(shared + sparse_records))

    enough = dense.frames is not None and min(dense.frames.shape[2:4]) >= SSIM_WINDOW
    spatial_share = sparse.info.spatial_share
    assert spatial_share is not None
    report = ComparisonReport(
        prompt=prompt or "(given embeddings)",
        seed=seed,
        pattern=pattern,
        num_inference_steps=num_steps,
        dense_steps=dense_steps,
        guided_steps=int((start.scales != 1).sum()),
        requested_density=sparsity.density,
        density=sparse.info.density,
        latents=start.state.latents.shape[1:],
        num_tokens=start.layout.num_tokens,
        psnr=_of_pixels(psnr, sparse, dense),
        ssim=_of_pixels(ssim, sparse, dense) if enough else None,
        dense_seconds=median_seconds(dense_records),
        sparse_seconds=median_seconds(sparse_records),
        spatial_share=tuple(spatial_share.tolist()),
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
        raise ValueError(f"pattern is svg, spatial, temporal or random: got {pattern!r}")
    return np.full(shape, pattern == "temporal")


def _of_pixels(
    metric: Callable[[np.ndarray, np.ndarray], float], video: VideoOutput, reference: VideoOutput
) -> float | None:
    if video.frames is None or reference.frames is None:
        return None
    return metric(2 * video.frames[0] - 1, 2 * reference.frames[0] - 1)


def device_name() -> str:
    """The accelerator, or the processor and the number of its cores that may be used."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux alone has it
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    packages = ("svg-jax", "jax", "jaxlib", "flax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
