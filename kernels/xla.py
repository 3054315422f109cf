"""Block-sparse and dense attention in plain XLA: portable, differentiable, really sparse on a CPU.

A few heads at a time, one block of query rows at a time: its keys are one contiguous window of the
band, and before it the text and the sink, which every row keeps. No array is larger than one
block's rows × keys.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.sharding import over_heads, vary_like
from svg_jax.kernels.windows import Window, band_windows

# On a CPU multiples of 128 keep two threads equally busy, and 128 wastes fewest keys.
BLOCK_ROWS = 128
DENSE_BLOCK_ROWS = 256
# Heads at once: one fills a CPU and spares its caches, an accelerator wants more.
ACCELERATOR_HEADS = 8


class _Keys(NamedTuple):
    """Some keys of one head, and what is added to a row's logits: 0 or -inf (None: nothing).

    Adding runs in one pass with the softmax, where selecting would take its own.
    """

    key: Float[Array, "keys head_dim"]
    value: Float[Array, "keys head_dim"]
    bias: Float[Array, "#rows keys"] | None = None


@partial(jax.jit, static_argnames=("masks", "scale", "block_rows"))
def block_sparse_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    mask_of_head: Int[Array, "batch heads"] | None,
    text_length: Int[Array, " batch"] | None,
    *,
    masks: tuple[BandMask, ...],
    scale: float,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]:
    """Attend under closed-form masks; see `svg_jax.kernels.attention` for the contract.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask_of_head: Number of each head's mask; None means the first.
        text_length: Real text tokens of each batch entry; None means all.
        masks: Masks to choose from.
        scale: Factor of the logits, positive.
        block_rows: Query rows in a block.
    """
    heads = query.shape[2]
    of_masks = [
        partial(_sparse_head, mask=mask, scale=scale, block_rows=block_rows) for mask in masks
    ]

    def one_head(query, key, value, index, length):
        if index is None:
            return of_masks[0](query, key, value, length)
        return lax.switch(index, of_masks, query, key, value, length)

    index = None if len(masks) == 1 else mask_of_head
    return _over_heads(one_head, query, key, value, index, _of_heads(text_length, heads))


@partial(jax.jit, static_argnames=("scale", "block"))
def block_list_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    counts: Int[Array, "batch heads q_blocks"],
    blocks: Int[Array, "batch heads q_blocks most"],
    *,
    scale: float,
    block: int = 128,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]:
    """Attend to listed blocks of keys, block after block; see `svg_jax.kernels.attention`."""
    tokens = query.shape[1]
    dtype = _accumulator(query.dtype)
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def one_head(args):
        *arrays, counts, blocks = args
        missing = -tokens % block
        query, key, value = (
            jnp.pad(x.astype(dtype), [(0, missing), (0, 0)]).reshape(-1, block, x.shape[-1])
            for x in arrays
        )

        @partial(jax.checkpoint, prevent_cse=False)
        def one_block(args):
            rows, count, listed = args

            def visit(carry, number, keys, values):
                out, row_max, row_sum = carry
                is_real = number * block + jnp.arange(block, dtype=jnp.int32) < tokens
                logits = jnp.where(is_real[None], dot(rows, keys.T) * scale, -jnp.inf)
                new_max = lax.stop_gradient(jnp.maximum(row_max, logits.max(-1, keepdims=True)))
                weights, rescale = jnp.exp(logits - new_max), jnp.exp(row_max - new_max)
                out = out * rescale + dot(weights, values)
                return out, new_max, row_sum * rescale + weights.sum(-1, keepdims=True)

            def step(carry, args):
                n, number = args
                visited = partial(visit, carry, number, key[number], value[number])
                return lax.cond(n < count, visited, lambda: carry), None

            column = jnp.zeros((block, 1), dtype)
            start = (jnp.zeros_like(rows), column + jnp.finfo(dtype).min, column)
            start = tuple(vary_like(x, rows) for x in start)
            most = jnp.arange(len(listed), dtype=jnp.int32)
            (out, row_max, row_sum), _ = lax.scan(step, start, (most, listed))
            return _normalised(out, row_max, row_sum)

        out, lse = lax.map(one_block, (query, counts, blocks))
        return out.reshape(-1, out.shape[-1])[:tokens], lse.reshape(-1)[:tokens]

    arrays = (x.swapaxes(1, 2) for x in (query, key, value))
    out, lse = over_heads(one_head, (*arrays, counts, blocks), heads_at_once=1)
    return out.swapaxes(1, 2).astype(query.dtype), lse.astype(jnp.float32)


@partial(jax.jit, static_argnames=("scale", "block_rows"))
def dense_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    query_seq_lengths: Int[Array, " batch"] | None,
    key_value_seq_lengths: Int[Array, " batch"] | None,
    *,
    scale: float,
    block_rows: int = DENSE_BLOCK_ROWS,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """Attend to all keys, block of rows by block of rows; see `svg_jax.kernels.attention`."""
    heads = query.shape[2]

    def one_head(query, key, value, num_queries, num_keys):
        keep = real = None
        if num_keys is not None:
            keep = jnp.arange(key.shape[0], dtype=jnp.int32) < num_keys
            key, value = _blank(keep, key), _blank(keep, value)
            real = jnp.broadcast_to(num_keys > 0, query.shape[:1])
        if num_queries is not None:
            below = jnp.arange(query.shape[0], dtype=jnp.int32) < num_queries
            real = below if real is None else real & below
            query = _blank(real, query)
        everything = _Keys(key, value, None if keep is None else _bias(keep[None], key.dtype))
        out, lse = _by_rows(_attend_all, query, everything, block_rows=block_rows, scale=scale)
        return _blank(real, out), lse if real is None else jnp.where(real, lse, -jnp.inf)

    lengths = (_of_heads(x, heads) for x in (query_seq_lengths, key_value_seq_lengths))
    return _over_heads(one_head, query, key, value, *lengths)


def _of_heads(lengths: Int[Array, " batch"] | None, heads: int) -> Int[Array, "batch heads"] | None:
    return None if lengths is None else jnp.repeat(lengths[:, None], heads, axis=1)


def _over_heads(one_head: Callable, query, key, value, *of_heads):
    """Map a function of one head's [tokens, head_dim] arrays over batch and heads."""

    def run(*args, widen: bool, heads_at_once: int):
        def widened(args):
            dtype = _accumulator(args[0].dtype) if widen else args[0].dtype
            out, lse = one_head(*(x.astype(dtype) for x in args[:3]), *args[3:])
            return out.astype(args[0].dtype), lse

        return over_heads(widened, args, heads_at_once)

    out, lse = lax.platform_dependent(
        *(x.swapaxes(1, 2) for x in (query, key, value)),
        *of_heads,
        # A CPU multiplies float32 faster than any narrower type, and one head's copy is small.
        cpu=partial(run, widen=True, heads_at_once=1),
        default=partial(run, widen=False, heads_at_once=ACCELERATOR_HEADS),
    )
    return out.swapaxes(1, 2), lse


def _sparse_head(query, key, value, text_length, *, mask: BandMask, scale: float, block_rows: int):
    """One head: the video rows by windows of the band, the text rows over everything."""
    text = slice(mask.text_start, mask.text_stop)
    video = slice(mask.video_start, mask.video_start + mask.video_tokens)
    if mask.text_tokens == 0 or text_length is None:
        text_length = real = None
    else:
        real = mask.is_real(jnp.arange(mask.num_tokens, dtype=jnp.int32), text_length)
        query, key, value = (_blank(real, x) for x in (query, key, value))

    outs, lses = [], []
    if mask.text_tokens:
        everything = _Keys(key, value, None if real is None else _bias(real[None], key.dtype))
        out, lse = _by_rows(
            _attend_all, query[text], everything, block_rows=block_rows, scale=scale
        )
        if real is not None:
            out, lse = _blank(real[text], out), jnp.where(real[text], lse, -jnp.inf)
        outs.append(out)
        lses.append(lse)
    for window in _windows(mask, block_rows):
        out, lse = _by_blocks(
            partial(_attend_window, mask=mask, window=window, scale=scale),
            query[video][window.first_row : window.stop_row],
            window.block_rows,
            (key[video], value[video], key[text], value[text], text_length),
        )
        outs.append(out)
        lses.append(lse)
    if mask.text_tokens and mask.text_start > 0:  # it stands behind the video
        outs, lses = outs[1:] + outs[:1], lses[1:] + lses[:1]
    return jnp.concatenate(outs), jnp.concatenate(lses)


def _windows(mask: BandMask, block_rows: int) -> tuple[Window, ...]:
    if not mask.video_tokens:
        return ()
    return band_windows(mask.video_tokens, mask.band_width, mask.video_sink_tokens, block_rows)


def _by_rows(body: Callable, query, arrays, *, block_rows: int, scale: float):
    """Apply a body to all rows, in blocks of `block_rows` and a smaller one for the rest."""
    body = partial(body, scale=scale)
    whole = query.shape[0] // block_rows * block_rows
    results = [
        _by_blocks(body, rows, min(block_rows, rows.shape[0]), arrays)
        for rows in (query[:whole], query[whole:])
        if rows.shape[0]
    ]
    outs, lses = zip(*results, strict=True)
    return jnp.concatenate(outs), jnp.concatenate(lses)


def _by_blocks(body: Callable, query, block_rows: int, arrays):
    """Apply a body to equal blocks of rows, one after another."""
    # Recomputing a block in the backward pass keeps its memory linear in the sequence.
    body = jax.checkpoint(body, prevent_cse=False)
    blocks = query.reshape(-1, block_rows, query.shape[-1])
    numbers = jnp.arange(len(blocks), dtype=jnp.int32)
    out, lse = lax.map(lambda xs: body(*xs, arrays), (numbers, blocks))
    return out.reshape(-1, out.shape[-1]), lse.reshape(-1)


def _attend_all(_index, query, everything: _Keys, *, scale: float):
    """Attend one block of rows to the same keys as all the others."""
    return _softmax(query, everything, scale)


def _attend_window(index, query, arrays, *, mask: BandMask, window: Window, scale: float):
    """Attend one block of video rows to text, sink and its window of the band.

    All keys are joined: on a CPU one product over all of them, with a bias that rides along, beats
    several products of which few need one.
    """
    key, value, text_key, text_value, text_length = arrays
    first_key = window.first_key + index * window.key_step

    def join(text, video):
        band = lax.dynamic_slice_in_dim(video, first_key, window.num_keys)
        return jnp.concatenate([text, video[: mask.video_sink_tokens], band])

    bias = None
    if text_length is not None or not window.is_full:
        bias = _window_bias(index, mask, window, text_length, _accumulator(query.dtype))
    return _softmax(query, _Keys(join(text_key, key), join(text_value, value), bias), scale)


def _window_bias(
    index, mask: BandMask, window: Window, text_length, dtype
) -> Float[Array, "rows keys"]:
    """Bias of a block's rows over text, sink and its window of the band.

    A row keeps a key that is no further from it than the key's reach. Places and reaches are
    vectors, and what is made of them is made again wherever the logits are read: an array of it
    would take as much of the cache as the logits do.
    """
    row = window.first_row + index * window.block_rows
    row += jnp.arange(window.block_rows, dtype=jnp.int32)
    in_front = mask.text_tokens + mask.video_sink_tokens  # keys that every row keeps
    in_band = jnp.arange(-in_front, window.num_keys, dtype=jnp.int32)
    place = window.first_key + index * window.key_step + in_band
    reach = jnp.where(in_band < 0, jnp.inf, mask.band_width - 0.5)
    if text_length is not None:
        text = jnp.arange(len(in_band), dtype=jnp.int32)
        reach = jnp.where((text_length <= text) & (text < mask.text_tokens), -1.0, reach)
    # Four times as far, so that the smallest excess, of a half, times the largest number is −inf:
    # a product is faster than a choice.
    row, place, reach = (4 * x.astype(dtype) for x in (row, place, reach))
    excess = jnp.minimum(reach[None] - jnp.abs(row[:, None] - place[None]), 0.0)
    return excess * jnp.finfo(dtype).max


def _bias(keep: Bool[Array, "#rows keys"], dtype) -> Float[Array, "#rows keys"]:
    return jnp.where(keep, 0.0, -jnp.inf).astype(_accumulator(dtype))


def _softmax(query, keys: _Keys, scale: float):
    """Attend some rows to some keys; returns the output and the log-sum-exp.

    Full-precision queries are scaled, for they are fewer than the logits. What is narrower would be
    rounded once more, so there the logits are scaled.
    """
    accumulator = _accumulator(query.dtype)
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=accumulator)
    if query.dtype == accumulator:
        logits = dot(query * scale, keys.key.T)
    else:
        logits = dot(query, keys.key.T) * scale
    if keys.bias is not None:
        logits += keys.bias
    # Finite even where all keys are masked, or −inf − −inf would make the row NaN.
    lowest = jnp.finfo(accumulator).min
    row_max = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=lowest))
    weights = jnp.exp(logits - row_max)
    row_sum = jnp.sum(weights, axis=-1, keepdims=True)
    out, lse = _normalised(dot(weights.astype(keys.value.dtype), keys.value), row_max, row_sum)
    return out.astype(query.dtype), lse


def _normalised(out, row_max, row_sum):
    """Finish sums of weights: the output and the log-sum-exp; 0 and -inf of a row without keys."""
    some = row_sum > 0
    row_sum = jnp.where(some, row_sum, 1.0)
    return out / row_sum, jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)[:, 0]


def _blank(real, x):
    """Put 0 into rows that are not real (None: all are): what padding holds is nobody's business.

    A weight of 0 would not do for keys and values: 0 * NaN is NaN.
    """
    return x if real is None else jnp.where(real[:, None], x, jnp.zeros((), x.dtype))


def _accumulator(dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
