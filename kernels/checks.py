"""What all attention functions ask of their arguments, said in one sentence each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

AXES = "[batch, tokens, heads, head_dim]"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """ValueError unless the three fit together and are of a dtype that attention takes."""
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        _check_is_array(name, x, f"an array {AXES}")
        if x.ndim != 4:
            hint = f": give {name}[None] for a batch of one" if x.ndim == 3 else ""
            raise ValueError(f"{name} must be {AXES}, not of shape {_shape(x)}{hint}")
    if key.shape[:3] == value.shape[:3] and key.shape[3] != value.shape[3]:
        raise ValueError(
            f"value has a head_dim of {value.shape[3]} and key of {key.shape[3]}: they must be "
            f"equal, {AXES}"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"key and value differ in shape: {_shape(key)} and {_shape(value)} as {AXES}"
        )
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads and heads > kv_heads and heads % kv_heads == 0 and query.shape[0] == key.shape[0]:
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}: grouped heads are not taken, repeat keys "
            f"and values first, jnp.repeat(key, {heads // kv_heads}, axis=2)"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            f"query {_shape(query)} and key {_shape(key)} must agree in batch, heads and head_dim, "
            f"as {AXES}"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"attention over nothing: query is {_shape(query)}, key {_shape(key)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one dtype: {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.dtype.name not in _DTYPES:
        raise ValueError(f"attention takes {', '.join(_DTYPES)}, not {query.dtype}: cast first")


def check_tokens(name: str, x: Array, num_tokens: int, whose: object) -> None:
    """ValueError unless an array has as many tokens as something that it is to fit."""
    if x.shape[1] == num_tokens:
        return
    hint = f": give {name}.swapaxes(1, 2)" if x.shape[2] == num_tokens else ""
    raise ValueError(
        f"{name} {_shape(x)} has {x.shape[1]} tokens, as {AXES}, but {whose} has {num_tokens}{hint}"
    )


def check_integers(name: str, array: Array | None, shape: tuple[int, ...], axes: str) -> None:
    """ValueError unless an array, if there is one, holds integers and has this shape."""
    _check_kind(name, array, shape, f"integers {axes}", jnp.integer)


def _check_kind(name: str, array: Array | None, shape: tuple[int, ...], what: str, kind: Any):
    if array is None:
        return
    wanted = f"{what} of shape {shape}"
    _check_is_array(name, array, wanted)
    if array.shape != shape or not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} must be {wanted}, not {array.dtype}{_shape(array)}")


def check_range(name: str, array: Array | None, least: int, most: int) -> None:
    """ValueError if a number lies outside, where numbers are known: under a trace they are not."""
    if array is None or isinstance(array, Tracer):
        return
    numbers = np.asarray(array)
    if numbers.size and not least <= numbers.min() <= numbers.max() <= most:
        raise ValueError(
            f"{name} lies between {least} and {most}, but holds {numbers.min()} … {numbers.max()}"
        )


def check_booleans(name: str, array: Array | None, shape: tuple[int, ...], axes: str) -> None:
    """ValueError unless an array, if there is one, holds booleans and has this shape."""
    _check_kind(name, array, shape, f"booleans {axes}", jnp.bool_)


def check_key(name: str, key: Any) -> None:
    """ValueError unless it is one PRNG key: typed, or raw words of jax's default kind."""
    _check_is_array(name, key, "one PRNG key, such as jax.random.key(0)")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if (key.shape != ()) if typed else ((key.shape, key.dtype) != (raw.shape, raw.dtype)):
        raise ValueError(
            f"{name} must be one PRNG key, such as jax.random.key(0), not {key.dtype}{_shape(key)}"
        )


def check_scale(scale: float | None, head_dim: int) -> float:
    """Give the scale, 1/sqrt(head_dim) for None; ValueError unless positive and finite."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)):
        raise ValueError(f"scale must be a positive number, not {type(scale).__name__}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, not {scale}")
    return float(scale)


def _check_is_array(name: str, x: object, wanted: str) -> None:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ValueError(f"{name} must be {wanted}, not {type(x).__name__}")


def _shape(x: Array) -> list[int]:
    return list(x.shape)
