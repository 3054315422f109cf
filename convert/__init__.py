"""Convert pipelines in diffusers' layout into orbax checkpoints, load them, and export them."""

if __name__ != "svg_jax.convert":
    raise ImportError(
        f"import svg_jax.convert, not {__name__}: install the project with `pip install -e .`"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_jax.convert.checkpoint.export import export_pipeline
    from svg_jax.convert.checkpoint.load import (
        load_component,
        load_text_encoder,
        load_transformer,
        load_vae,
    )
    from svg_jax.convert.checkpoint.manifest import Manifest, TensorRecord, read_manifest
    from svg_jax.convert.checkpoint.verify import verify_pipeline
    from svg_jax.convert.contents import Contents, read_contents
    from svg_jax.convert.errors import ConversionError, DamageError, RefusedError
    from svg_jax.convert.pipeline import convert_pipeline, write_plan
    from svg_jax.convert.plan import ConversionPlan, make_plan, plan_conversion
    from svg_jax.convert.releases.recognise import OriginalComponent, find_original, read_original
    from svg_jax.convert.settings import ConversionSettings, LoraSource
    from svg_jax.convert.tables.rules import Leaf, Rule, convert_state, match_rules, restore_state

__all__ = [
    "Contents",
    "ConversionError",
    "ConversionPlan",
    "ConversionSettings",
    "DamageError",
    "Leaf",
    "LoraSource",
    "Manifest",
    "OriginalComponent",
    "RefusedError",
    "Rule",
    "TensorRecord",
    "convert_pipeline",
    "convert_state",
    "export_pipeline",
    "find_original",
    "load_component",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "make_plan",
    "match_rules",
    "plan_conversion",
    "read_contents",
    "read_manifest",
    "read_original",
    "restore_state",
    "verify_pipeline",
    "write_plan",
]

_HOME = {
    "checkpoint.export": ("export_pipeline",),
    "checkpoint.load": ("load_component", "load_text_encoder", "load_transformer", "load_vae"),
    "checkpoint.manifest": ("Manifest", "TensorRecord", "read_manifest"),
    "checkpoint.verify": ("verify_pipeline",),
    "contents": ("Contents", "read_contents"),
    "errors": ("ConversionError", "DamageError", "RefusedError"),
    "pipeline": ("convert_pipeline", "write_plan"),
    "plan": ("ConversionPlan", "make_plan", "plan_conversion"),
    "releases.recognise": ("OriginalComponent", "find_original", "read_original"),
    "settings": ("ConversionSettings", "LoraSource"),
    "tables.rules": ("Leaf", "Rule", "convert_state", "match_rules", "restore_state"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: the rules need neither flax nor orbax."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
