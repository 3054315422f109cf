"""The contract of the attention kernels, and the choice of an implementation.

All arrays are [batch, tokens, heads, head_dim], as in `jax.nn.dot_product_attention`. Rows without
a key and padding rows give 0, with a log-sum-exp of -inf.
"""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from svg_jax.kernels import mosaic_attention, mosaic_gpu, reference, xla
from svg_jax.kernels.batching import vmap_as_batch
from svg_jax.kernels.block_mask import BandMask

Implementation = Literal["mosaic_gpu", "xla", "reference"]
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@overload
def block_sparse_attention(
    query: Array, key: Array, value: Array, *, return_lse: Literal[True], **options: Any
) -> tuple[Array, Array]: ...


@overload
def block_sparse_attention(
    query: Array, key: Array, value: Array, *, return_lse: Literal[False] = False, **options: Any
) -> Array: ...


def block_sparse_attention(  # pyright: ignore[reportInconsistentOverload]
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    masks: BandMask | tuple[BandMask, ...],
    mask_of_head: Int[Array, "batch heads"] | None = None,
    text_length: Int[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch tokens heads head_dim"]
    | tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]
):
    """Attend to the keys that a closed-form mask keeps, exact for every token.

    The masks are static: each makes its own program. `mask_of_head` and `text_length` are data, so
    neither labels nor prompts compile anew. Differentiable with memory linear in the sequence.

    Up to 7 tokens more than the masks know are padding that is to be finite: the Hopper kernel
    reads tokens in eights and copies arrays whose length is no multiple of eight.

    Args:
        query: Queries: float32, bfloat16, float16 or float64; sums are float32 or wider.
        key: Keys, of the same shape and dtype.
        value: Values, of the same shape and dtype.
        masks: One mask for all heads, or several to choose from.
        mask_of_head: Index into `masks` for each head, clamped to it; None means the first.
        text_length: Real text tokens of each entry, int32; text beyond it is padding, whose content
            never matters, be it NaN. None means that all text is real.
        scale: Factor of the logits, positive; None means 1/sqrt(head_dim).
        implementation: "mosaic_gpu" (a Pallas kernel for Hopper: bfloat16 or float16, head_dim up
            to 64 or 128; its gradients are those of "xla"), "xla" (block-sparse on any device),
            "reference" (an oracle that builds S×S arrays) or None for the fastest that can run on
            the default device.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        The output, in the query's dtype; with `return_lse` a pair of it and the natural log-sum-exp
        of the scaled logits, float32 [batch, heads, tokens].

    Raises:
        ValueError: If shapes, dtypes, masks or arguments do not fit together.
    """
    masks = masks if isinstance(masks, tuple) else (masks,)
    _check_arrays(query, key, value)
    batch, tokens, heads, _ = query.shape
    if key.shape != query.shape:
        raise ValueError(
            f"self-attention needs as many keys as queries: query is {query.shape}, key {key.shape}"
        )
    if not masks:
        raise ValueError("masks is empty: give at least one BandMask")
    for mask in masks:
        if not mask.num_tokens <= tokens < mask.num_tokens + 8:
            raise ValueError(
                f"the mask is made for {mask.num_tokens} tokens but query has {tokens}: {mask}"
            )
    if mask_of_head is None and len(masks) > 1:
        raise ValueError(
            f"{len(masks)} masks are given: mask_of_head must say which head runs which"
        )
    _check_integers("mask_of_head", mask_of_head, (batch, heads))
    _check_integers("text_length", text_length, (batch,))
    texts = {(mask.text_start, mask.text_tokens) for mask in masks}
    if text_length is not None and not any(tokens for _, tokens in texts):
        raise ValueError("text_length is given but no mask has text_tokens: leave it None")
    if text_length is not None and len(texts) > 1:
        raise ValueError(f"one text_length is given, but the masks place text apart: {masks}")
    scale = _check_scale(scale, query.shape[-1])

    implementation = pick_implementation(implementation, query.shape[-1], query.dtype)
    run = {"mosaic_gpu": _on_hopper, "xla": _portable, "reference": _reference}[implementation]
    out, lse = run(query, key, value, mask_of_head, text_length, masks, scale)
    return (out, lse.astype(jnp.float32)) if return_lse else out


def pick_implementation(
    implementation: Implementation | None, head_dim: int, dtype: DTypeLike
) -> Implementation:
    """The implementation of block-sparse attention that runs such queries on the default device.

    Raises:
        ValueError: If the one that is asked for cannot run here.
    """
    if implementation not in (None, "mosaic_gpu", "xla", "reference"):
        raise ValueError(
            f"implementation is None, 'mosaic_gpu', 'xla' or 'reference', not {implementation!r}"
        )
    if implementation in ("xla", "reference"):
        return implementation
    why_not = mosaic_gpu.why_not(head_dim, dtype)
    if implementation is None:
        return "xla" if why_not else "mosaic_gpu"
    if why_not:
        raise ValueError(f"implementation='mosaic_gpu' cannot run here: {why_not}")
    return implementation


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _on_hopper(query, key, value, mask_of_head, text_length, masks, scale) -> tuple[Array, Array]:
    def run(query, key, value, mask_of_head, text_length):
        return mosaic_attention.block_sparse_attention(
            query,
            key,
            value,
            masks=masks,
            mask_of_head=mask_of_head,
            text_length=text_length,
            scale=scale,
        )

    return vmap_as_batch(run)(query, key, value, mask_of_head, text_length)


def _forward(query, key, value, mask_of_head, text_length, masks, scale):
    arrays = (query, key, value, mask_of_head, text_length)
    return _on_hopper(*arrays, masks, scale), arrays


def _backward(masks, scale, arrays, cotangents):
    query, key, value, mask_of_head, text_length = arrays

    def run(query, key, value):
        return _portable(query, key, value, mask_of_head, text_length, masks, scale)

    return *jax.vjp(run, query, key, value)[1](cotangents), None, None


_on_hopper.defvjp(_forward, _backward)


def _portable(query, key, value, mask_of_head, text_length, masks, scale):
    return _without_padding(
        partial(
            xla.block_sparse_attention,
            masks=masks,
            mask_of_head=mask_of_head,
            text_length=text_length,
            scale=scale,
        ),
        (query, key, value),
        masks[0].num_tokens,
    )


def _reference(query, key, value, mask_of_head, text_length, masks, scale):
    if mask_of_head is None:
        mask_of_head = jnp.zeros((query.shape[0], query.shape[2]), jnp.int32)
    keep = reference.keep_table(masks, mask_of_head, text_length)
    run = partial(reference.masked_attention, keep=keep, scale=scale)
    return _without_padding(run, (query, key, value), masks[0].num_tokens)


def _without_padding(run, arrays, num_tokens: int):
    """Attend to the first tokens; those behind them give 0 and -inf."""
    padding = arrays[0].shape[1] - num_tokens
    if not padding:
        return run(*arrays)
    out, lse = run(*(x[:, :num_tokens] for x in arrays))
    out = jnp.pad(out, [(0, 0), (0, padding), (0, 0), (0, 0)])
    return out, jnp.pad(lse, [(0, 0), (0, 0), (0, padding)], constant_values=-jnp.inf)


def block_list_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    counts: Int[Array, "batch heads q_blocks"],
    blocks: Int[Array, "batch heads q_blocks most"],
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]:
    """Attend to any blocks of keys: for research on other patterns. Has no gradient on a GPU.

    Args:
        query: Queries, in blocks of 128; the last may be partial.
        key: Keys, of the same shape and dtype, in blocks of 128.
        value: Values, of the same shape and dtype.
        counts: How many blocks of keys each block of queries attends to; 0 gives zeros.
        blocks: Their numbers, each once; what stands behind `counts` is ignored. Data, so a new
            choice does not compile anew.
        scale: Factor of the logits, positive; None means 1/sqrt(head_dim).
        implementation: As for `block_sparse_attention`.

    Returns:
        The output, in the query's dtype, and the natural log-sum-exp of the scaled logits, float32.

    Raises:
        ValueError: If shapes, dtypes or arguments do not fit together.
    """
    _check_arrays(query, key, value)
    batch, tokens, heads, _ = query.shape
    num_blocks = -(-tokens // mosaic_attention.BLOCK_Q)
    _check_integers("counts", counts, (batch, heads, num_blocks))
    _check_integers("blocks", blocks, (batch, heads, num_blocks, blocks.shape[-1]))
    scale = _check_scale(scale, query.shape[-1])
    implementation = pick_implementation(implementation, query.shape[-1], query.dtype)
    if implementation == "mosaic_gpu":
        return mosaic_attention.block_list_attention(
            query, key, value, counts=counts, blocks=blocks, scale=scale
        )
    if implementation == "xla":
        return xla.block_list_attention(
            query, key, value, counts=counts, blocks=blocks, scale=scale
        )
    listed = jnp.arange(blocks.shape[-1])[None, None, None] < counts[..., None]
    block = jnp.where(listed, blocks, num_blocks)
    of_blocks = jax.nn.one_hot(block, num_blocks, dtype=bool).any(-2)
    size = mosaic_attention.BLOCK_Q
    keep = of_blocks.repeat(size, axis=2).repeat(size, axis=3)[..., :tokens, :tokens]
    out, lse = reference.masked_attention(query, key, value, keep, scale=scale)
    return out, lse.astype(jnp.float32)


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
    _check_arrays(query, key, value)
    batch, num_queries, _, head_dim = query.shape
    num_keys = key.shape[1]
    _check_integers("query_seq_lengths", query_seq_lengths, (batch,))
    _check_integers("key_value_seq_lengths", key_value_seq_lengths, (batch,))
    scale = _check_scale(scale, head_dim)
    why_not_hopper = mosaic_gpu.why_not(head_dim, query.dtype)
    if key.shape != query.shape or (query_seq_lengths, key_value_seq_lengths) != (None, None):
        why_not_hopper = why_not_hopper or "it takes as many keys as queries, all of them real"
    if implementation is None:
        if not _why_not_cudnn(query, return_lse):
            implementation = "cudnn"
        else:
            implementation = "xla" if why_not_hopper else "mosaic_gpu"

    match implementation:
        case "cudnn":
            why_not = _why_not_cudnn(query, return_lse)
            if why_not:
                raise ValueError(f"implementation='cudnn' cannot run here: {why_not}")
            return _cudnn_attention(
                query, key, value, query_seq_lengths, key_value_seq_lengths, scale
            )
        case "mosaic_gpu":
            if why_not_hopper:
                raise ValueError(f"implementation='mosaic_gpu' cannot run here: {why_not_hopper}")
            everything = BandMask(num_queries, num_queries)
            result: Any = _on_hopper(query, key, value, None, None, (everything,), scale)
            out, lse = result
        case "xla":
            out, lse = xla.dense_attention(
                query,
                key,
                value,
                query_seq_lengths=query_seq_lengths,
                key_value_seq_lengths=key_value_seq_lengths,
                scale=scale,
            )
        case "reference":
            keep = jnp.ones((batch, 1, num_queries, num_keys), bool)
            if query_seq_lengths is not None:
                keep &= _below(num_queries, query_seq_lengths)[:, None, :, None]
            if key_value_seq_lengths is not None:
                keep &= _below(num_keys, key_value_seq_lengths)[:, None, None, :]
            out, lse = reference.masked_attention(query, key, value, keep, scale=scale)
        case _:
            raise ValueError(
                "implementation is None, 'cudnn', 'mosaic_gpu', 'xla' or 'reference', not "
                f"{implementation!r}"
            )
    return (out, lse.astype(jnp.float32)) if return_lse else out


def _cudnn_attention(query, key, value, query_seq_lengths, key_value_seq_lengths, scale):
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        implementation="cudnn",
    )
    real = None
    if query_seq_lengths is not None:
        real = _below(query.shape[1], query_seq_lengths)
    if key_value_seq_lengths is not None:
        some = (key_value_seq_lengths > 0)[:, None]
        real = some if real is None else real & some
    if real is None:
        return out
    return jnp.where(real[:, :, None, None], out, jnp.zeros((), out.dtype))


def _why_not_cudnn(query: Array, return_lse: bool) -> str:
    """Say in a clause why cuDNN cannot run, or nothing where it can."""
    if jax.default_backend() != "gpu":
        return f"the default device is {jax.default_backend()}, not an NVIDIA GPU"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"it takes a head_dim that is a multiple of 8 up to 128, not {query.shape[-1]}"
    if return_lse:
        return "it returns no log-sum-exp"
    return ""


def _below(size: int, lengths: Int[Array, " batch"]) -> Array:
    return jnp.arange(size)[None] < lengths[:, None]


def _check_arrays(query: Array, key: Array, value: Array) -> None:
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


def _check_integers(name: str, array: Array | None, shape: tuple[int, ...]) -> None:
    if array is None:
        return
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape {shape}, not {array.dtype}{list(array.shape)}"
        )


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    return float(scale)
