"""Modules from a converted folder, straight onto the default device."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx
from jax.typing import DTypeLike

from svg_jax.convert.checkpoint.folder import (
    WEIGHTS,
    ConvertedFolder,
    check_components,
    open_folder,
)
from svg_jax.convert.checkpoint.orbax_writer import readable
from svg_jax.convert.components import read_component_config
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.progress import Progress
from svg_jax.convert.tables.registry import MODEL_CLASSES, classes_of
from svg_jax.models.cogvideox import CogVideoXTransformer
from svg_jax.models.cogvideox_vae import CogVideoXVAE
from svg_jax.models.hunyuan_video import HunyuanVideoTransformer
from svg_jax.models.hunyuan_video_vae import HunyuanVideoVAE
from svg_jax.models.t5 import T5Encoder
from svg_jax.models.wan import WanTransformer
from svg_jax.models.wan_vae import WanVAE

Transformer = CogVideoXTransformer | HunyuanVideoTransformer | WanTransformer
VAE = CogVideoXVAE | HunyuanVideoVAE | WanVAE

_T5_CLASSES = ("T5EncoderModel", "UMT5EncoderModel")


def load_component(
    folder: str | Path,
    name: str,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    classes: Collection[str] = MODEL_CLASSES.keys(),
    verify: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Any:
    """Load a component of a converted folder: a transformer, an encoder or a VAE.

    Args:
        folder: What `convert_pipeline` made.
        name: Name of the component, e.g. "vae" or "image_encoder".
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to, but those that the model keeps in float32 (see
            `WanTransformer`); None keeps each as it is stored.
        classes: Classes that are allowed, by their names in model_index.json.
        verify: Whether to read the files of its weights first and to compare them with the
            manifest. Otherwise their names, kinds, sizes and layout are checked, and their numbers
            are taken as they lie there.
        progress: Called with (bytes done, bytes in all, component) while files are compared.
        **options: Passed to the module's class.

    Returns:
        The module, the port of the component's class.

    Raises:
        ConversionError: If the folder is not a whole converted one, or holds no such component.
        DamageError: If a file is not as it was converted.
        RefusedError: If the system does not let it be read.
    """
    opened = open_folder(folder)
    class_name = _class_of(opened, name, classes)
    stored = check_components(opened, [name], verify=verify, progress=progress)[name]

    def make(config: Any) -> nnx.Module:
        return MODEL_CLASSES[class_name].module(
            config,
            dtype=dtype,
            param_dtype=jnp.float32 if param_dtype is None else param_dtype,
            rngs=nnx.Rngs(0),
            **options,
        )

    config = read_component_config(opened.path / name, class_name)
    weights = opened.path / name / WEIGHTS
    return _load(weights, stored, lambda: make(config), cast=param_dtype is not None)


def param_dtypes(
    class_name: str, config: Any, param_dtype: DTypeLike
) -> dict[tuple[str, ...], np.dtype]:
    """The dtype of each parameter of a model that is made with `param_dtype`, by its path.

    It is `param_dtype` but for those that the model keeps in float32, as the original does.
    """
    module = MODEL_CLASSES[class_name].module
    made = nnx.eval_shape(
        lambda: module(config, dtype=jnp.float32, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    leaves = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(made)))
    return {tuple(str(key) for key in path): leaf.dtype for path, leaf in leaves.items()}


def load_transformer(
    folder: str | Path,
    *,
    name: str = "transformer",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    residual_dtype: DTypeLike | None = None,
) -> Transformer:
    """Load a transformer of a converted folder, of whichever family it is.

    Args:
        folder: What `convert_pipeline` made.
        name: Name of the component: Wan 2.2 has a "transformer_2", too.
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.
        residual_dtype: Dtype of the residual stream; None is `dtype`.

    Raises:
        ConversionError: If the folder is not a whole converted one, or holds no such component.
    """
    return load_component(
        folder,
        name,
        dtype=dtype,
        param_dtype=param_dtype,
        classes=classes_of("transformer"),
        residual_dtype=residual_dtype,
    )


def load_text_encoder(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
) -> T5Encoder:
    """Load the T5 or UMT5 encoder of a converted folder.

    Args:
        folder: What `convert_pipeline` made.
        dtype: Dtype of the matrix products; float16 is refused, T5 overflows in it.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.

    Raises:
        ConversionError: If the folder is not a whole converted one, or holds no such component.
    """
    return load_component(
        folder, "text_encoder", dtype=dtype, param_dtype=param_dtype, classes=_T5_CLASSES
    )


def load_vae(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
) -> VAE:
    """Load the video autoencoder of a converted folder, of whichever family it is.

    Args:
        folder: What `convert_pipeline` made.
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.

    Raises:
        ConversionError: If the folder is not a whole converted one, or holds no such component.
    """
    return load_component(
        folder, "vae", dtype=dtype, param_dtype=param_dtype, classes=classes_of("vae")
    )


def _class_of(folder: ConvertedFolder, name: str, known: Collection[str]) -> str:
    components = folder.manifest.components
    found = folder.classes.get(name)
    if found is None or name not in components or found not in known:
        there = ", ".join(sorted(components))
        raise ConversionError(
            f"{folder.path}: holds no {name} of class {' or '.join(known)} (it holds {there}): "
            "convert the source again with it."
        )
    return found


def _load(
    weights: Path,
    stored: Mapping[tuple[str, ...], ts.TensorStore],
    make: Callable[[], nnx.Module],
    *,
    cast: bool,
) -> nnx.Module:
    graph, state = nnx.split(nnx.eval_shape(make))
    # Leaf by leaf: orbax would cast to another dtype without a word, and after a leaf that cannot
    # be read it leaves the others' reads running into its closed event loop.
    params = {}
    dtypes = {
        tuple(str(key) for key in path): leaf.dtype
        for path, leaf in nnx.traversals.flatten_mapping(nnx.to_pure_dict(state)).items()
    }
    # The largest first: while it is turned, there are two of it.
    for path in sorted(stored, key=lambda path: -stored[path].size):
        param = _read(weights, path, stored[path])
        params[path] = param.astype(dtypes[path]) if cast else param
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(params))
    return nnx.merge(graph, state)


def _read(weights: Path, path: tuple[str, ...], leaf: ts.TensorStore) -> jax.Array:
    """Read a leaf in the order in which it lies, and turn its axes on the device."""
    order = leaf.chunk_layout.inner_order or ()
    with readable(weights, path):
        read = leaf.transpose(order).read().result()
    lying = jnp.asarray(read)
    return (
        jnp.transpose(lying, np.argsort(order).tolist()) if list(order) != sorted(order) else lying
    )
