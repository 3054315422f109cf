"""Checkpoints in and out: a diffusers folder to an orbax one, and back."""

if __name__ != "svg_jax.convert":
    raise ImportError(
        f"import svg_jax.convert, not {__name__}: install the project with `pip install -e .`"
    )

from svg_jax.convert.rules import (
    ConversionError as ConversionError,
    Leaf as Leaf,
    Rule as Rule,
    convert_state as convert_state,
    match_rules as match_rules,
    restore_state as restore_state,
)
