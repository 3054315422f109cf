"""A converted folder to a pipeline that can be called."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from svg_jax.convert import (
    ConversionError,
    load_component,
    load_text_encoder,
    load_transformer,
    load_vae,
    read_manifest,
)
from svg_jax.convert.components import read_component_config, read_pipeline_index
from svg_jax.convert.reader import read_json
from svg_jax.models import CogVideoXTransformer
from svg_jax.sampling.cogvideox import CogVideoXPipeline
from svg_jax.sampling.flow import FlowConfig
from svg_jax.sampling.hunyuan_video import HunyuanVideoPipeline
from svg_jax.sampling.hunyuan_video_text import HunyuanVideoEncoders
from svg_jax.sampling.images import load_image_processor
from svg_jax.sampling.pipeline import Lazy, VideoPipeline
from svg_jax.sampling.schedulers import SchedulerConfig
from svg_jax.tokenizer import load_tokenizer


def from_pretrained(folder: str | Path, *, dtype: DTypeLike | None = None) -> VideoPipeline:
    """Loads what `svg-jax convert` made, onto the default device.

    Args:
        folder: A converted pipeline.
        dtype: Of matrix products; parameters stay as they are stored. Default: bfloat16 on an
            accelerator, float32 on a CPU.

    Raises:
        ValueError: If the folder is not a whole converted one; a diffusers folder is to be
            converted first.
        OSError: If a file cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = read_pipeline_index(folder)
    if dtype is None:
        dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if index.pipeline.startswith("HunyuanVideo"):
        return _hunyuan_video(folder, dtype)
    if not index.pipeline.startswith("CogVideoX"):
        raise ValueError(
            f"{folder}: is a {index.pipeline}, whose pipeline does not run yet: its transformer "
            "loads with `svg_jax.convert.load_transformer`."
        )
    has_text_encoder = "text_encoder" in manifest.components
    transformer = load_transformer(folder, dtype=dtype)
    assert isinstance(transformer, CogVideoXTransformer)
    return CogVideoXPipeline(
        transformer=transformer,
        scheduler=SchedulerConfig.from_dict(_scheduler(folder)),
        text_encoder=load_text_encoder(folder, dtype=dtype) if has_text_encoder else None,
        tokenizer=load_tokenizer(folder / "tokenizer") if has_text_encoder else None,
        has_vae="vae" in index.classes,
        vae=load_vae(folder, dtype=dtype) if "vae" in manifest.components else None,
    )


def _hunyuan_video(folder: Path, dtype: DTypeLike) -> HunyuanVideoPipeline:
    names = "transformer", "text_encoder", "text_encoder_2", "vae"
    transformer, text_encoder, text_encoder_2, vae = (_lazy(folder, n, dtype) for n in names)
    if transformer is None:
        raise ConversionError(f"{folder}: holds no transformer: convert the source again with it.")
    has_processor = (folder / "image_processor").is_dir()
    return HunyuanVideoPipeline(
        transformer=transformer,
        scheduler=FlowConfig.from_dict(_scheduler(folder)),
        vae=vae,
        encoders=HunyuanVideoEncoders(
            text_encoder=text_encoder,
            tokenizer=text_encoder and load_tokenizer(folder / "tokenizer"),
            text_encoder_2=text_encoder_2,
            tokenizer_2=text_encoder_2 and load_tokenizer(folder / "tokenizer_2"),
            image_processor=(
                load_image_processor(folder / "image_processor") if has_processor else None
            ),
        ),
    )


def _lazy(folder: Path, name: str, dtype: DTypeLike) -> Lazy[Any] | None:
    """A component, or None if the checkpoint was converted without it."""
    if name not in read_manifest(folder).components:
        return None
    config = read_component_config(folder / name, read_pipeline_index(folder).classes[name])
    return Lazy(config, dtype, partial(load_component, folder, name, dtype=dtype))


def _scheduler(folder: Path) -> dict[str, Any]:
    return read_json(folder / "scheduler" / "scheduler_config.json")
