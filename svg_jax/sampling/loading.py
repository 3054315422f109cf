"""A model to a pipeline that can be called."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from svg_jax.convert import load_component, read_manifest
from svg_jax.convert.components import read_component_config, read_pipeline_index
from svg_jax.convert.progress import Progress
from svg_jax.convert.reader import read_json
from svg_jax.sampling.checkpoint import weights_digest
from svg_jax.sampling.cogvideox import CogVideoXPipeline
from svg_jax.sampling.converted import converted_folder
from svg_jax.sampling.flow import FlowConfig
from svg_jax.sampling.hunyuan_video import HunyuanVideoPipeline
from svg_jax.sampling.hunyuan_video_text import HunyuanVideoEncoders
from svg_jax.sampling.images import load_image_processor
from svg_jax.sampling.pipeline import Lazy, VideoPipeline
from svg_jax.sampling.schedulers import SchedulerConfig
from svg_jax.sampling.wan import WanPipeline
from svg_jax.tokenizer import load_tokenizer


def from_pretrained(
    model: str | Path,
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> VideoPipeline:
    """Loads a video model, onto the default device.

    What `svg-jax convert` made is used as it is. A folder in diffusers' layout, or one from the
    hub, is converted first: once, bit for bit, into a cache.

    Args:
        model: A converted folder, a folder in diffusers' layout, or a hub id ("owner/name"); what
            is there as a folder is never looked for on the hub.
        dtype: Of matrix products; parameters stay as they are stored. Default: bfloat16 on an
            accelerator, float32 on a CPU.
        revision: Of a hub id: a branch, tag or commit.
        variant: Weights to take where a component has them, e.g. "fp16"; elsewhere the plain ones.
        cache_dir: Keeps downloads and, in `svg-jax`, what was converted, in place of the hub's
            cache and of $SVG_JAX_CACHE, which is ~/.cache/svg-jax if it is not set.
        progress: Of a conversion: called with (bytes done, bytes in all, component).

    Returns:
        The pipeline of the checkpoint's family. Each component is loaded where it is used and freed
            behind: text encoder and transformer are never there together.

    Raises:
        ValueError: If there is no such model, it is damaged, or of a kind that does not run.
        OSError: If a file cannot be read or written, the hub cannot be reached, or it denies access
            (`PermissionError`: a gated model).
    """
    folder = converted_folder(
        model,
        revision=revision,
        variant=variant,
        cache_dir=cache_dir,
        check=_refuse_wan_2_2,
        progress=progress,
    )
    # Whatever else is wrong, say first that it is no whole converted folder.
    weights = weights_digest(read_manifest(folder))
    pipeline = read_pipeline_index(folder).pipeline
    if dtype is None:
        dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return replace(_PIPELINES[pipeline](folder, jnp.dtype(dtype)), weights=weights)


def _refuse_wan_2_2(folder: Path) -> None:
    entries = read_json(folder / "model_index.json")
    classes = read_pipeline_index(folder).classes
    if "transformer_2" in classes or entries.get("boundary_ratio") is not None:
        raise ValueError(f"{folder}: is a Wan 2.2 of two transformers, and only Wan 2.1 runs.")
    if entries.get("expand_timesteps"):
        raise ValueError(f"{folder}: is a Wan 2.2 with times by token, and only Wan 2.1 runs.")


def _load_cogvideox(folder: Path, dtype: Any) -> CogVideoXPipeline:
    return CogVideoXPipeline(
        **_shared(folder, dtype),
        vae=_lazy(folder, "vae", dtype),
        scheduler=SchedulerConfig.from_dict(_scheduler_entries(folder)),
        has_vae="vae" in read_pipeline_index(folder).classes,
    )


def _load_wan(folder: Path, dtype: Any) -> WanPipeline:
    _refuse_wan_2_2(folder)
    # As diffusers advises: small, and worth float32.
    image_encoder, vae = (
        _lazy(folder, name, jnp.dtype(jnp.float32)) for name in ("image_encoder", "vae")
    )
    return WanPipeline(
        **_shared(folder, dtype),
        vae=vae,
        scheduler=FlowConfig.from_dict(_scheduler_entries(folder)),
        image_encoder=image_encoder,
        image_processor=image_encoder and load_image_processor(folder / "image_processor"),
    )


def _load_hunyuan_video(folder: Path, dtype: Any) -> HunyuanVideoPipeline:
    shared = _shared(folder, dtype)
    text_encoder_2 = _lazy(folder, "text_encoder_2", dtype)
    has_processor = (folder / "image_processor").is_dir()
    return HunyuanVideoPipeline(
        transformer=shared["transformer"],
        vae=_lazy(folder, "vae", dtype),
        scheduler=FlowConfig.from_dict(_scheduler_entries(folder)),
        encoders=HunyuanVideoEncoders(
            text_encoder=shared["text_encoder"],
            tokenizer=shared["tokenizer"],
            text_encoder_2=text_encoder_2,
            tokenizer_2=text_encoder_2 and load_tokenizer(folder / "tokenizer_2"),
            image_processor=(
                load_image_processor(folder / "image_processor") if has_processor else None
            ),
        ),
    )


def _shared(folder: Path, dtype: Any) -> dict[str, Any]:
    """What every family has: a transformer, and an encoder of prompts with its tokenizer."""
    transformer, text_encoder = (
        _lazy(folder, name, dtype) for name in ("transformer", "text_encoder")
    )
    if transformer is None:
        raise ValueError(f"{folder}: holds no transformer: convert the source again with it.")
    return {
        "transformer": transformer,
        "text_encoder": text_encoder,
        "tokenizer": text_encoder and load_tokenizer(folder / "tokenizer"),
    }


def _lazy(folder: Path, name: str, dtype: Any) -> Lazy[Any] | None:
    """A component, or None if the checkpoint was converted without it."""
    if name not in read_manifest(folder).components:
        return None
    config = read_component_config(folder / name, read_pipeline_index(folder).classes[name])
    return Lazy(config, dtype, partial(load_component, folder, name, dtype=dtype))


def _scheduler_entries(folder: Path) -> dict[str, Any]:
    return read_json(folder / "scheduler" / "scheduler_config.json")


_PIPELINES: Mapping[str, Callable[[Path, Any], VideoPipeline]] = {
    "CogVideoXPipeline": _load_cogvideox,
    "CogVideoXImageToVideoPipeline": _load_cogvideox,
    "HunyuanVideoPipeline": _load_hunyuan_video,
    "HunyuanVideoImageToVideoPipeline": _load_hunyuan_video,
    "WanPipeline": _load_wan,
    "WanImageToVideoPipeline": _load_wan,
}
