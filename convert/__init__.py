"""Checkpoints in and out: a pipeline folder in diffusers' layout to an orbax one, and back."""

if __name__ != "svg_jax.convert":
    raise ImportError(
        f"import svg_jax.convert, not {__name__}: install the project with `pip install -e .`"
    )

from svg_jax.convert.export import export_pipeline, verify_pipeline
from svg_jax.convert.load import load_text_encoder, load_transformer
from svg_jax.convert.manifest import Manifest, TensorRecord, read_manifest
from svg_jax.convert.pipeline import convert_pipeline
from svg_jax.convert.rules import (
    ConversionError,
    Leaf,
    Rule,
    convert_state,
    match_rules,
    restore_state,
)

__all__ = [
    "ConversionError",
    "Leaf",
    "Manifest",
    "Rule",
    "TensorRecord",
    "convert_pipeline",
    "convert_state",
    "export_pipeline",
    "load_text_encoder",
    "load_transformer",
    "match_rules",
    "read_manifest",
    "restore_state",
    "verify_pipeline",
]
