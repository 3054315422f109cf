"""Dense attention by cuDNN, on an NVIDIA GPU: jax's door to it, with what that leaves to a caller.

cuDNN has no gradient where queries or keys are odd in number, and reads what padding holds.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from svg_jax.kernels.sharding import vary_like


def why_not(head_dim: int, dtype: DTypeLike) -> str:
    """Say in a clause why cuDNN cannot run on the default device, or nothing where it can."""
    if jax.default_backend() != "gpu":
        return f"the default device is {jax.default_backend()}, not an NVIDIA GPU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"it takes a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    return ""


def cudnn_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    query_seq_lengths: Int[Array, " batch"] | None,
    key_value_seq_lengths: Int[Array, " batch"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "batch queries heads head_dim"], None]:
    """Attend to all real keys, without a log-sum-exp; see `svg_jax.kernels.dense_attention`."""
    num_queries = query.shape[1]
    # cuDNN reads whole tiles, padding too, and a weight of 0 does not hide a NaN.
    query, query_lengths = _evened(_blanked(query, query_seq_lengths), query_seq_lengths)
    value, _ = _evened(_blanked(value, key_value_seq_lengths), key_value_seq_lengths)
    key, key_lengths = _evened(_blanked(key, key_value_seq_lengths), key_value_seq_lengths)
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )[:, :num_queries]
    if key_value_seq_lengths is not None:
        some = (key_value_seq_lengths > 0)[:, None, None, None]
        out = jnp.where(some, out, jnp.zeros((), out.dtype))
    return _blanked(out, query_seq_lengths), None


def below(size: int, lengths: Int[Array, " batch"]) -> Bool[Array, "batch {size}"]:
    """Tell which of `size` tokens are real."""
    return jnp.arange(size, dtype=lengths.dtype)[None] < lengths[:, None]


def _evened(x: Array, lengths: Array | None) -> tuple[Array, Array | None]:
    """Add a token of zeros to an odd number of them, and say in lengths that it is not real."""
    batch, tokens = x.shape[:2]
    if tokens % 2:
        x = jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)])
        if lengths is None:
            lengths = vary_like(jnp.full(batch, tokens, jnp.int32), x)
    return x, None if lengths is None else lengths.astype(jnp.int32)


def _blanked(x: Array, lengths: Array | None) -> Array:
    """Put 0 behind the lengths."""
    if lengths is None:
        return x
    return jnp.where(below(x.shape[1], lengths)[:, :, None, None], x, jnp.zeros((), x.dtype))
