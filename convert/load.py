"""Modules from a converted folder, straight onto the default device."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import tensorstore as ts
from flax import nnx
from jax.typing import DTypeLike

from svg_jax.convert.components import read_component_config, read_pipeline_index
from svg_jax.convert.manifest import read_manifest
from svg_jax.convert.rules import ConversionError
from svg_jax.convert.writer import open_leaves, readable
from svg_jax.models.cogvideox import CogVideoXTransformer
from svg_jax.models.t5 import T5Encoder

Module = TypeVar("Module", bound=nnx.Module)


def load_transformer(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    residual_dtype: DTypeLike | None = None,
) -> CogVideoXTransformer:
    """Loads the transformer of a converted folder.

    Args:
        folder: What `convert_pipeline` made.
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.
        residual_dtype: Dtype of the residual stream; None is `dtype`.

    Raises:
        ConversionError: If the folder is not a whole converted one, or its weights are not the
            model that its config describes.
    """

    def make(config: Any) -> CogVideoXTransformer:
        return CogVideoXTransformer(
            config, dtype=dtype, residual_dtype=residual_dtype, rngs=nnx.Rngs(0)
        )

    return _load(Path(folder), "transformer", "CogVideoXTransformer3DModel", make, param_dtype)


def load_text_encoder(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
) -> T5Encoder:
    """Loads the T5 encoder of a converted folder.

    Args:
        folder: What `convert_pipeline` made.
        dtype: Dtype of the matrix products; float16 is refused, T5 overflows in it.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.

    Raises:
        ConversionError: If the folder is not a whole converted one, or its weights are not the
            model that its config describes.
    """

    def make(config: Any) -> T5Encoder:
        return T5Encoder(config, dtype=dtype, rngs=nnx.Rngs(0))

    return _load(Path(folder), "text_encoder", "T5EncoderModel", make, param_dtype)


def _load(
    folder: Path,
    name: str,
    class_name: str,
    make: Callable[[Any], Module],
    param_dtype: DTypeLike | None,
) -> Module:
    manifest = read_manifest(folder)
    found = read_pipeline_index(folder).classes.get(name)
    if name not in manifest.components or found != class_name:
        there = ", ".join(sorted(manifest.components))
        raise ConversionError(
            f"{folder}: holds no {name} of class {class_name} (it holds {there}): convert the "
            "source again with it."
        )
    config = read_component_config(folder / name, class_name)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(config)))
    weights = folder / name / "weights"
    stored = open_leaves(weights)
    _check_shapes(weights, nnx.to_pure_dict(state), stored)
    # Leaf by leaf: orbax would cast to another dtype without a word, and after a leaf that cannot
    # be read it leaves the others' reads running into its closed event loop.
    params = {}
    with readable(weights):
        for path, leaf in stored.items():
            param = jnp.asarray(leaf.read().result())
            params[path] = param if param_dtype is None else param.astype(param_dtype)
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(params))
    return nnx.merge(graph, state)


def _check_shapes(
    weights: Path, expected: Mapping[str, Any], stored: Mapping[tuple[str, ...], ts.TensorStore]
) -> None:
    wanted = {
        tuple(str(key) for key in path): leaf.shape
        for path, leaf in nnx.traversals.flatten_mapping(expected).items()
    }
    found = {path: leaf.shape for path, leaf in stored.items()}
    if wanted != found:
        differ = sorted({".".join(path) for path, _ in wanted.items() ^ found.items()})
        raise ConversionError(
            f"{weights}: is not the model of its config.json ({len(differ)} parameters differ, "
            f"first {differ[0]}): convert the source again."
        )
