"""Attach the scales of float8 weights, which are stored as separate tensors."""

import math
from collections.abc import Mapping
from dataclasses import replace

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.show import show
from svg_jax.convert.formats.stored_tensor import FLOAT8, StoredTensor

# ComfyUI and musubi-tuner; LightX2V and compressed-tensors; DeepSeek, where "inv" multiplies, too.
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def attach_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Attach to float8 weights their scales, which are then no longer listed themselves.

    Raises:
        ConversionError: If a scale does not fit equal blocks of its weight, or is no float.
    """
    tensors = dict(stored)
    for name in stored:
        ending = next((ending for ending in _SCALES if name.endswith(ending)), None)
        weight = f"{name.removesuffix(ending)}.weight" if ending else ""
        if weight in tensors and tensors[weight].dtype in FLOAT8.values():
            if tensors[weight].scale is not None:
                raise ConversionError(
                    f"{stored[name].file}: {show(weight)} has two scales: keep one of them."
                )
            tensors[weight] = _scaled(tensors[weight], tensors.pop(name))
    return tensors


def check_scales(tensors: Mapping[str, StoredTensor], prefix: str) -> None:
    """Refuse a scale that `attach_scales` left, whose weight is missing or not float8.

    Args:
        tensors: All tensors.
        prefix: Prefix of the names of the weights to read; others may be of any dtype.

    Raises:
        ConversionError: If there is one.
    """
    for name, scale in tensors.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if not name.endswith(_SCALES) or (weight in tensors and not name.startswith(prefix)):
            continue
        what = f"is {tensors[weight].dtype}" if weight in tensors else "is not there"
        raise ConversionError(
            f"{scale.file}: {show(name)} is a scale and {show(weight)} {what}: only float8 weights "
            "are read with scales; fetch the unquantised weights."
        )


def _scaled(weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    rows, columns = weight.shape[0] if weight.shape else 1, math.prod(weight.shape[1:])
    count = math.prod(scale.shape)
    if count == 1:
        blocks = (1, 1)
    elif scale.shape[0] == rows:
        blocks = (rows, count // rows)
    else:
        blocks = (scale.shape[0], count // max(scale.shape[0], 1))
    if (
        scale.dtype.name not in _FLOATS
        or math.prod(blocks) != count
        or not all(blocks)
        or rows % blocks[0]
        or columns % blocks[1]
        or not scale.is_plain
        or scale.strides is not None
    ):
        raise ConversionError(
            f"{scale.file}: {show(scale.name)} ({scale.dtype}, {show(list(scale.shape))}) is no "
            f"scale of equal blocks of {show(weight.name)}, {show(list(weight.shape))}: fetch the "
            "unquantised weights."
        )
    if not rows * columns:
        return weight
    return replace(weight, scale=replace(scale, shape=blocks))
