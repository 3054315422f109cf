"""Load modules from a converted folder onto the default device."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from svg_jax.convert.checkpoint.folder import WEIGHTS, check_components, open_folder
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
        folder: Converted folder.
        name: Name of the component, e.g. "vae" or "image_encoder".
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to, except those that the model keeps in float32
            (see `WanTransformer`); None keeps each as it is stored.
        classes: Classes that are allowed, by their names in model_index.json.
        verify: Whether to read the files of the weights first and compare them with the manifest;
            otherwise only their names, kinds, sizes and layout are checked.
        progress: Function called with (bytes done, bytes in all, component) during that.
        **options: Arguments of the module's class.

    Returns:
        The module that implements the component's class.

    Raises:
        ConversionError: If the folder is no complete converted one, or lacks the component.
        DamageError: If a file is not as it was converted.
        RefusedError: If the system does not let it be read.
    """
    opened = open_folder(folder)
    class_name, there = opened.index.classes.get(name), sorted(opened.manifest.components)
    if class_name is None or name not in there or class_name not in classes:
        raise ConversionError(
            f"{opened.path}: holds no {name} of class {' or '.join(classes)} (it holds "
            f"{', '.join(there)}): convert the source again with it."
        )
    stored = check_components(opened, [name], verify=verify, progress=progress)[name]
    config = read_component_config(opened.path / name, class_name)
    made_in = jnp.float32 if param_dtype is None else param_dtype
    graph, state = nnx.split(_outline(class_name, config, dtype, made_in, **options))
    dtypes, params = _dtypes(state), {}
    # Leaf by leaf, since orbax would cast silently and, after a leaf that cannot be read, leave
    # other reads running into its closed event loop. The largest comes first: there are two copies
    # of it while its axes are permuted.
    for path in sorted(stored, key=lambda path: -stored[path].size):
        # Read in the order on disk; the device permutes the axes.
        order = stored[path].chunk_layout.inner_order or ()
        with readable(opened.path / name / WEIGHTS, path):
            param = jnp.asarray(stored[path].transpose(order).read().result())
        if list(order) != sorted(order):
            param = jnp.transpose(param, np.argsort(order).tolist())
        params[path] = param if param_dtype is None else param.astype(dtypes[path])
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(params))
    return nnx.merge(graph, state)


def param_dtypes(
    class_name: str, config: Any, param_dtype: DTypeLike
) -> dict[tuple[str, ...], np.dtype]:
    """Return the dtype of each parameter of a model made with `param_dtype`, by its path.

    It is `param_dtype` except where the model keeps float32, as the original does.
    """
    return _dtypes(nnx.state(_outline(class_name, config, jnp.float32, param_dtype)))


def _outline(
    class_name: str, config: Any, dtype: DTypeLike, param_dtype: DTypeLike, **options: Any
) -> nnx.Module:
    """Make a module whose parameters are shapes and dtypes alone."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, **options}
    module = MODEL_CLASSES[class_name].module
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), **kwargs))


def _dtypes(state: Any) -> dict[tuple[str, ...], np.dtype]:
    leaves = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
    return {tuple(str(key) for key in path): leaf.dtype for path, leaf in leaves.items()}


def load_transformer(
    folder: str | Path,
    *,
    name: str = "transformer",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    residual_dtype: DTypeLike | None = None,
) -> Transformer:
    """Load the transformer of a converted folder of any family, by `load_component`.

    Args:
        folder: Converted folder.
        name: Name of the component; Wan 2.2 also has a "transformer_2".
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.
        residual_dtype: Dtype of the residual stream; None is `dtype`.
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
    folder: str | Path, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike | None = None
) -> T5Encoder:
    """Load the T5 or UMT5 encoder of a converted folder, by `load_component`.

    Args:
        folder: Converted folder.
        dtype: Dtype of the matrix products; float16 is refused, since T5 overflows in it.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.
    """
    return load_component(
        folder, "text_encoder", dtype=dtype, param_dtype=param_dtype, classes=_T5_CLASSES
    )


def load_vae(
    folder: str | Path, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike | None = None
) -> VAE:
    """Load the video autoencoder of a converted folder of any family, by `load_component`.

    Args:
        folder: Converted folder.
        dtype: Dtype of the matrix products.
        param_dtype: Dtype to cast the parameters to; None keeps each as it is stored.
    """
    return load_component(
        folder, "vae", dtype=dtype, param_dtype=param_dtype, classes=classes_of("vae")
    )
