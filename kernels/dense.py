"""Dense attention, by the fastest way of the device: what sparse attention is compared with."""

from functools import partial
from typing import Any, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from svg_jax.kernels import cudnn, mosaic_common, reference, xla
from svg_jax.kernels.attention import block_sparse_attention
from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.checks import check_arrays, check_integers, check_scale
from svg_jax.kernels.sharding import on_each_device


@overload
def dense_attention(
    query: Array, key: Array, value: Array, *, return_lse: Literal[True], **options: Any
) -> tuple[Array, Array]: ...


@overload
def dense_attention(
    query: Array, key: Array, value: Array, *, return_lse: Literal[False] = False, **options: Any
) -> Array: ...


def dense_attention(  # pyright: ignore[reportInconsistentOverload]
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    query_seq_lengths: Int[Array, " batch"] | None = None,
    key_value_seq_lengths: Int[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: Literal["cudnn", "mosaic_gpu", "xla", "reference"] | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch queries heads head_dim"]
    | tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]
):
    """Attend to all real keys, by the fastest way of the device.

    Args:
        query: Queries: float32, bfloat16, float16 or float64; sums are float32 or wider.
        key: Keys, of the same dtype and head_dim; their number may differ.
        value: Values, of the keys' shape and dtype.
        query_seq_lengths: Real queries of each entry, int32; those behind are padding. None: all.
        key_value_seq_lengths: Real keys of each entry, int32; those behind are padding. None: all.
        scale: Factor of the logits, positive; None means 1/sqrt(head_dim).
        implementation: "cudnn" (NVIDIA GPU, bfloat16 or float16, no log-sum-exp), "mosaic_gpu" (the
            block-sparse kernel with every block; as many keys as queries, all real), "xla" (by
            blocks of rows, any device), "reference" (builds S×S arrays) or None for the first of
            cudnn, mosaic_gpu and xla that can run on the default device.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        The output, in the query's dtype; with `return_lse` a pair of it and the natural log-sum-exp
        of the scaled logits, float32 [batch, heads, queries].

    Raises:
        ValueError: If shapes, dtypes or arguments do not fit together or cuDNN cannot run them.
    """
    check_arrays(query, key, value)
    batch, head_dim = query.shape[0], query.shape[-1]
    check_integers("query_seq_lengths", query_seq_lengths, (batch,), "[batch]")
    check_integers("key_value_seq_lengths", key_value_seq_lengths, (batch,), "[batch]")
    scale = check_scale(scale, head_dim)
    why_not_cudnn = cudnn.why_not(head_dim, query.dtype)
    if return_lse:
        why_not_cudnn = why_not_cudnn or "it returns no log-sum-exp"
    why_not_hopper = mosaic_common.why_not(head_dim, query.dtype)
    if key.shape != query.shape or (query_seq_lengths, key_value_seq_lengths) != (None, None):
        why_not_hopper = why_not_hopper or "it takes as many keys as queries, all of them real"
    if implementation is None:
        on_any = "xla" if why_not_hopper else "mosaic_gpu"
        implementation = on_any if why_not_cudnn else "cudnn"

    if implementation == "cudnn" and why_not_cudnn:
        raise ValueError(f"implementation='cudnn' cannot run here: {why_not_cudnn}")
    if implementation == "mosaic_gpu" and why_not_hopper:
        raise ValueError(f"implementation='mosaic_gpu' cannot run here: {why_not_hopper}")
    run = {
        "cudnn": cudnn.cudnn_attention,
        "mosaic_gpu": _on_hopper,
        "xla": xla.dense_attention,
        "reference": _reference,
    }.get(implementation)
    if run is None:
        raise ValueError(
            "implementation is None, 'cudnn', 'mosaic_gpu', 'xla' or 'reference', not "
            f"{implementation!r}"
        )
    words = ("btho", "bkho", "bkho", "b", "b")
    on_devices = on_each_device(partial(run, scale=scale), words, ("btho", "bht"))
    out, lse = on_devices(query, key, value, query_seq_lengths, key_value_seq_lengths)
    return (out, lse.astype(jnp.float32)) if return_lse else out


def _on_hopper(query, key, value, query_seq_lengths, key_value_seq_lengths, *, scale):
    del query_seq_lengths, key_value_seq_lengths
    return block_sparse_attention(
        query,
        key,
        value,
        masks=(BandMask(query.shape[1], query.shape[1]),),
        scale=scale,
        implementation="mosaic_gpu",
        return_lse=True,
    )


def _reference(query, key, value, query_seq_lengths, key_value_seq_lengths, *, scale):
    batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    keep = jnp.ones((batch, 1, num_queries, num_keys), bool)
    if query_seq_lengths is not None:
        keep &= cudnn.below(num_queries, query_seq_lengths)[:, None, :, None]
    if key_value_seq_lengths is not None:
        keep &= cudnn.below(num_keys, key_value_seq_lengths)[:, None, None, :]
    return reference.masked_attention(query, key, value, keep, scale=scale)
