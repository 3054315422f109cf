"""The contract of the attention kernels, and the choice of an implementation.

All arrays are [batch, tokens, heads, head_dim], as in `jax.nn.dot_product_attention`. Rows without
a key and padding rows give 0, with a log-sum-exp of -inf.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from svg_jax.kernels import cudnn, mosaic_attention, mosaic_common, reference, xla
from svg_jax.kernels.batching import vmap_as_batch
from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.checks import check_arrays, check_integers, check_range, check_scale
from svg_jax.kernels.sharding import on_each_device

Implementation = Literal["mosaic_gpu", "xla", "reference"]


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
        query: Queries in float32, bfloat16, float16 or float64; sums are float32 or wider.
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
    check_arrays(query, key, value)
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
    check_integers("mask_of_head", mask_of_head, (batch, heads), "[batch, heads]")
    check_integers("text_length", text_length, (batch,), "[batch]")
    texts = {(mask.text_start, mask.text_tokens) for mask in masks}
    if text_length is not None and not any(tokens for _, tokens in texts):
        raise ValueError("text_length is given but no mask has text_tokens: leave it None")
    if text_length is not None and len(texts) > 1:
        raise ValueError(f"one text_length is given, but the masks place text apart: {masks}")
    scale = check_scale(scale, query.shape[-1])

    implementation = pick_implementation(implementation, query.shape[-1], query.dtype)
    portable = partial(_portable, masks=masks, scale=scale)
    on_hopper = partial(mosaic_attention.block_sparse_attention, masks=masks, scale=scale)
    attend = {
        "mosaic_gpu": _with_gradients(on_hopper, portable),
        "xla": portable,
        "reference": partial(_reference, masks=masks, scale=scale),
    }[implementation]
    on_devices = on_each_device(attend, ("btho", "btho", "btho", "bh", "b"), ("btho", "bht"))
    out, lse = on_devices(query, key, value, mask_of_head, text_length)
    return (out, lse.astype(jnp.float32)) if return_lse else out


def pick_implementation(
    implementation: Implementation | None, head_dim: int, dtype: DTypeLike
) -> Implementation:
    """Pick the implementation that runs such queries on the default device.

    Raises:
        ValueError: If the one that is asked for cannot run here.
    """
    if implementation not in (None, "mosaic_gpu", "xla", "reference"):
        raise ValueError(
            f"implementation is None, 'mosaic_gpu', 'xla' or 'reference', not {implementation!r}"
        )
    if implementation in ("xla", "reference"):
        return implementation
    why_not = mosaic_common.why_not(head_dim, dtype)
    if implementation is None:
        return "xla" if why_not else "mosaic_gpu"
    if why_not:
        raise ValueError(f"implementation='mosaic_gpu' cannot run here: {why_not}")
    return implementation


def sparse_attention_pays(head_dim: int, dtype: DTypeLike) -> bool:
    """Tell whether block-sparse attention is faster than dense attention on the default device.

    On a GPU where cuDNN runs dense attention but the Hopper kernel cannot run, it is slower: at
    density 0.3 of Wan's 480p sequence "xla" takes 7 times as long as cuDNN's dense attention.

    Args:
        head_dim: Width of a head.
        dtype: Dtype of queries, keys and values.
    """
    is_portable = pick_implementation(None, head_dim, dtype) == "xla"
    return not is_portable or bool(cudnn.why_not(head_dim, dtype))


def _with_gradients(on_hopper: Callable, portable: Callable) -> Callable:
    """Give a Hopper kernel the gradients of the portable one, and let vmap enlarge its batch.

    Args:
        on_hopper: Function of queries, keys, values and two arrays of numbers, or None.
        portable: Function of the same arguments that differentiates.
    """
    attend = jax.custom_vjp(vmap_as_batch(on_hopper))

    def forward(*arrays):
        return attend(*arrays), arrays

    def backward(arrays, cotangents):
        query, key, value, *numbers = arrays
        _, pull_back = jax.vjp(lambda *qkv: portable(*qkv, *numbers), query, key, value)
        return *pull_back(cotangents), None, None

    attend.defvjp(forward, backward)
    return attend


def _portable(query, key, value, mask_of_head, text_length, *, masks, scale):
    def run(query, key, value):
        return xla.block_sparse_attention(
            query, key, value, mask_of_head, text_length, masks=masks, scale=scale
        )

    return _without_padding(run, (query, key, value), masks[0].num_tokens)


def _reference(query, key, value, mask_of_head, text_length, *, masks, scale):
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
    """Attend to any blocks of keys: for research on other patterns. Differentiable.

    Args:
        query: Queries, in blocks of 128; the last may be partial.
        key: Keys, of the same shape and dtype, in blocks of 128.
        value: Values, of the same shape and dtype.
        counts: How many blocks of keys each block of queries attends to; 0 gives zeros.
        blocks: Their numbers, each once; those behind `counts` are ignored. As data, so that a new
            choice does not compile anew. Under a trace, where numbers cannot be checked, one out of
            range counts as not listed, and `counts` is clamped.
        scale: Factor of the logits, positive; None means 1/sqrt(head_dim).
        implementation: As for `block_sparse_attention`.

    Returns:
        The output, in the query's dtype, and the natural log-sum-exp of the scaled logits, float32.

    Raises:
        ValueError: If shapes, dtypes or arguments do not fit together, or a number is out of range.
    """
    check_arrays(query, key, value)
    batch, tokens, heads, _ = query.shape
    if key.shape != query.shape:
        raise ValueError(
            f"self-attention needs as many keys as queries: query is {query.shape}, key {key.shape}"
        )
    num_blocks = -(-tokens // mosaic_attention.BLOCK_Q)
    shape = (batch, heads, num_blocks)
    check_integers("counts", counts, shape, "[batch, heads, blocks of queries]")
    most = jnp.shape(blocks)[-1] if jnp.ndim(blocks) else 0
    check_integers(
        "blocks", blocks, (*shape, most), "[batch, heads, blocks of queries, most blocks of keys]"
    )
    check_range("counts", counts, 0, most)
    scale = check_scale(scale, query.shape[-1])
    implementation = pick_implementation(implementation, query.shape[-1], query.dtype)
    place = jnp.arange(most, dtype=jnp.int32)[None, None, None]
    listed = place < counts.astype(jnp.int32)[..., None]
    check_range("blocks", jnp.where(listed, blocks, 0), 0, num_blocks - 1)
    listed &= (blocks >= 0) & (blocks < num_blocks)
    # What is not listed goes to the end, behind the count.
    blocks = jnp.sort(jnp.where(listed, blocks, num_blocks).astype(jnp.int32), axis=-1)
    counts = listed.sum(-1, dtype=jnp.int32)
    portable = partial(xla.block_list_attention, scale=scale)
    attend = {
        "mosaic_gpu": _with_gradients(
            partial(mosaic_attention.block_list_attention, scale=scale), portable
        ),
        "xla": portable,
        "reference": partial(_reference_lists, scale=scale),
    }[implementation]
    words = ("btho", "btho", "btho", "bhq", "bhqm")
    return on_each_device(attend, words, ("btho", "bht"))(query, key, value, counts, blocks)


def _reference_lists(query, key, value, counts, blocks, *, scale):
    tokens, num_blocks = query.shape[1], counts.shape[-1]
    del counts  # what they do not count is no number of a block
    size = mosaic_attention.BLOCK_Q
    of_blocks = jax.nn.one_hot(blocks, num_blocks, dtype=bool).any(-2)
    keep = of_blocks.repeat(size, axis=2).repeat(size, axis=3)[..., :tokens, :tokens]
    out, lse = reference.masked_attention(query, key, value, keep, scale=scale)
    return out, lse.astype(jnp.float32)
