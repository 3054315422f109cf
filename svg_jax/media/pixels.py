"""Pixels of NumPy, JAX, PyTorch or Pillow, in any usual order and range.

The results are [..., height, width, 3]; the dtype determines the range: uint8 from 0 to 255, or
float32 from 0 to 1.
"""

from typing import Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float32, Shaped, UInt8

Pixels = UInt8[np.ndarray, "*frames height width 3"] | Float32[np.ndarray, "*frames height width 3"]
_COLOURS = 3
_ROUNDING = 1 / 128  # bfloat16's step above 1


def as_numpy(value: Any, name: str) -> Shaped[np.ndarray, "..."]:
    """Copy an array of any library to NumPy.

    Tensors of PyTorch are recognised by their methods, so that it is not imported. They may be on
    a device or have a gradient; floating point becomes float32.

    Args:
        value: Array, or anything that NumPy can turn into one.
        name: Name of the argument, for the error.

    Raises:
        ValueError: If NumPy can make no array of it.
    """
    try:
        if callable(getattr(value, "cpu", None)):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        return np.asarray(value)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name}: no array can be made of this {type(value).__name__}: {reason}"
        ) from error


def channels_last(array: np.ndarray, name: str) -> Shaped[np.ndarray, "*frames height width 3"]:
    """Put the colours of [..., height, width, 3] or [..., 3, height, width] last.

    If both axes are 3, the last one is the colours. Greys, of one colour, are repeated.

    Raises:
        ValueError: If neither axis can be the colours, or there are no pixels.
    """
    if array.size == 0:
        raise ValueError(f"{name} has no pixels: its shape is {array.shape}")
    if array.shape[-1] == _COLOURS:
        return array
    if array.shape[-3] == _COLOURS:
        return np.moveaxis(array, -3, -1)
    for axis in (-1, -3):
        if array.shape[axis] == 1:
            return np.repeat(np.moveaxis(array, axis, -1), _COLOURS, axis=-1)
    has_alpha = 4 in (array.shape[-1], array.shape[-3])
    hint = "; transparency has to be dropped first" if has_alpha else ""
    raise ValueError(
        f"{name} must have 3 colours as its last axis, or as the one before height and width: got "
        f"the shape {array.shape}{hint}"
    )


def in_known_range(array: np.ndarray, name: str) -> UInt8[np.ndarray, "..."] | Float32[Any, "..."]:
    """Turn pixels of any dtype into bytes, or into float32 from 0 to 1.

    The dtype decides the range: integers are from 0 to 255, floating point is from 0 to 1. Values
    outside it by no more than rounding are clipped.

    Raises:
        ValueError: If a value is outside the range, or the dtype has no known range.
    """
    dtype = array.dtype
    if dtype == np.uint8:
        return array
    is_float = jax.dtypes.issubdtype(dtype, np.floating)  # NumPy does not know bfloat16
    if dtype == np.uint16 or not (is_float or dtype.kind in "iu"):
        hint = " (divide 16 bits by 65535)" if dtype == np.uint16 else ""
        raise ValueError(
            f"{name} must have pixels of uint8 from 0 to 255, or in floating point from 0 to 1: "
            f"got {dtype}{hint}"
        )
    low, high = array.min(), array.max()
    if not is_float:
        if low < 0 or high > 255:
            raise ValueError(f"{name} in integers has values from 0 to 255: got {low} to {high}")
        return array.astype(np.uint8)
    low, high = float(low), float(high)
    if not np.isfinite([low, high]).all():
        raise ValueError(
            f"{name} in floating point has values from 0 to 1: some of these are not finite"
        )
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        hint = ""
        if low >= -_ROUNDING and 2 < high <= 255:
            hint = "; if they are from 0 to 255, cast them to uint8"
        elif low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
            hint = "; if they are from -1 to 1, take (x + 1) / 2"
        raise ValueError(
            f"{name} in floating point has values from 0 to 1: got {low:.3g} to {high:.3g}{hint}"
        )
    pixels = array.astype(np.float32, copy=False)
    return pixels if low >= 0 and high <= 1 else pixels.clip(0, 1)


def rgb_of_pillow(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Convert an image to three colours of 8 bits.

    Transparency is dropped, as by diffusers' `load_image`.

    Raises:
        ValueError: If its greys have no known range, or it cannot be decoded.
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name}: an image of mode {image.mode} has no known range: save it with 8 bits"
        )
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: it is of {image.width} x {image.height}")
    try:
        if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255
            greys = np.asarray(image) / 257
            image = PIL.Image.fromarray(greys.round().astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # or Pillow warns
        return image.convert("RGB")
    except Exception as error:  # a file that was opened and not yet read fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: the image cannot be decoded: {reason}") from error
