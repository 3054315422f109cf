"""A converted folder to a pipeline that can be called."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from svg_jax.convert import load_text_encoder, load_transformer, load_vae, read_manifest
from svg_jax.convert.components import read_pipeline_index
from svg_jax.models import CogVideoXTransformer
from svg_jax.sampling.cogvideox import CogVideoXPipeline
from svg_jax.sampling.schedulers import SchedulerConfig
from svg_jax.tokenizer import load_tokenizer


def from_pretrained(folder: str | Path, *, dtype: DTypeLike | None = None) -> CogVideoXPipeline:
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
    if not index.pipeline.startswith("CogVideoX"):
        raise ValueError(
            f"{folder}: is a {index.pipeline}, and only CogVideoX's pipelines run so far: its "
            "transformer loads with `svg_jax.convert.load_transformer`."
        )
    classes = index.classes
    if dtype is None:
        dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    has_text_encoder = "text_encoder" in manifest.components
    entries = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    transformer = load_transformer(folder, dtype=dtype)
    assert isinstance(transformer, CogVideoXTransformer)
    return CogVideoXPipeline(
        transformer=transformer,
        scheduler=SchedulerConfig.from_dict(entries),
        text_encoder=load_text_encoder(folder, dtype=dtype) if has_text_encoder else None,
        tokenizer=load_tokenizer(folder / "tokenizer") if has_text_encoder else None,
        has_vae="vae" in classes,
        vae=load_vae(folder, dtype=dtype) if "vae" in manifest.components else None,
    )
