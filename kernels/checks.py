"""What all attention functions ask of their arguments."""

import jax.numpy as jnp
from jaxtyping import Array

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """ValueError unless the three fit together and are of a dtype that attention takes."""
    if key.shape != value.shape:
        raise ValueError(f"key and value differ in shape: {key.shape} and {value.shape}")
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            f"query {query.shape} and key {key.shape} must agree in batch, heads and head_dim"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"attention over nothing: query is {query.shape}, key {key.shape}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one dtype: {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.dtype.name not in _DTYPES:
        raise ValueError(f"attention takes {', '.join(_DTYPES)}, not {query.dtype}")


def check_integers(name: str, array: Array | None, shape: tuple[int, ...]) -> None:
    """ValueError unless an array, if there is one, holds integers and has this shape."""
    if array is None:
        return
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape {shape}, not {array.dtype}{list(array.shape)}"
        )


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale, or 1/sqrt(head_dim) for None; ValueError unless it is positive."""
    if scale is None:
        return head_dim**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    return float(scale)
