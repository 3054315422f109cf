"""Block-sparse and dense attention in plain XLA: portable, differentiable, really sparse on a CPU.

One head at a time, one block of query rows at a time: its keys are one contiguous window of the band,
of which only the two boundaries are tested, and beside it the text and the sink, which every row
keeps. All of these parts share one softmax. Nothing is ever larger than rows × keys of one block.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from svg_jax.kernels.block_mask import BandMask
from svg_jax.kernels.windows import Window, band_windows, even_windows

BLOCK_ROWS = 256
DENSE_BLOCK_ROWS = 128
# On an accelerator one head does not fill the machine; on a CPU several heads spill the caches.
ACCELERATOR_HEADS = 8
# Finite, so that a row whose keys are all masked gives numbers (replaced later) and no NaN gradients.
MASKED = -1e30


class _Keys(NamedTuple):
    """Some keys of one head: those where `keep` (None: all) holds for a row take part."""

    key: Float[Array, "keys head_dim"]
    value: Float[Array, "keys head_dim"]
    keep: Bool[Array, "#rows keys"] | None = None


def block_sparse_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    masks: tuple[BandMask, ...],
    mask_of_head: Int[Array, "batch heads"] | None,
    text_length: Int[Array, " batch"] | None,
    scale: float,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]:
    """Attend under closed-form masks; see `svg_jax.kernels.attention` for the contract.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        masks: The masks.
        mask_of_head: Which mask each head runs; None means the first.
        text_length: Real text tokens; None means all.
        scale: Factor of the logits, positive.
        block_rows: Query rows in a block.
    """
    batch, _, heads, _ = query.shape
    of_masks = [
        partial(_sparse_head, mask=mask, scale=scale, block_rows=block_rows) for mask in masks
    ]

    def one_head(query, key, value, index, length):
        if index is None:
            return of_masks[0](query, key, value, length)
        return lax.switch(index, of_masks, query, key, value, length)

    index = None if mask_of_head is None or len(masks) == 1 else mask_of_head.reshape(-1)
    length = None if text_length is None else jnp.repeat(text_length, heads)
    return _over_heads(one_head, query, key, value, index, length)


def dense_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    query_seq_lengths: Int[Array, " batch"] | None,
    key_value_seq_lengths: Int[Array, " batch"] | None,
    scale: float,
    block_rows: int = DENSE_BLOCK_ROWS,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """Attend to all keys, block of rows by block of rows; see `svg_jax.kernels.attention`."""
    heads = query.shape[2]

    def one_head(query, key, value, num_queries, num_keys):
        keep = None
        if num_keys is not None:
            keep = (jnp.arange(key.shape[0]) < num_keys)[None]
            # 0 * NaN must not reach the sum: what padding holds is nobody's business.
            key, value = (jnp.where(keep.T, x, jnp.zeros((), x.dtype)) for x in (key, value))
        windows = even_windows(query.shape[0], 0, 0, block_rows)
        out, lse = _attend_rows(query, windows, [_Keys(key, value, keep)], None, scale)
        real = None
        if num_keys is not None:
            real = jnp.broadcast_to(num_keys > 0, lse.shape)
        if num_queries is not None:
            below = jnp.arange(lse.size) < num_queries
            real = below if real is None else real & below
        return _blank(out, lse, real)

    lengths = [
        None if x is None else jnp.repeat(x, heads)
        for x in (query_seq_lengths, key_value_seq_lengths)
    ]
    return _over_heads(one_head, query, key, value, *lengths)


def _over_heads(one_head: Callable, query, key, value, *of_heads):
    """Map a function of one head's [tokens, head_dim] arrays over batch and heads."""
    batch, tokens, heads, head_dim = query.shape
    arrays = [
        x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], head_dim) for x in (query, key, value)
    ]

    def on_cpu(*args):
        # A CPU multiplies float32 faster than any narrower type, and one head's copy is small.
        def widened(args):
            query, key, value, *rest = args
            dtype = jnp.promote_types(query.dtype, jnp.float32)
            return one_head(*(x.astype(dtype) for x in (query, key, value)), *rest)

        return lax.map(widened, args)

    def on_accelerator(*args):
        return lax.map(lambda args: one_head(*args), args, batch_size=ACCELERATOR_HEADS)

    out, lse = lax.platform_dependent(*arrays, *of_heads, cpu=on_cpu, default=on_accelerator)
    out = out.reshape(batch, heads, tokens, head_dim).swapaxes(1, 2)
    return out.astype(query.dtype), lse.reshape(batch, heads, tokens)


def _sparse_head(query, key, value, text_length, *, mask: BandMask, scale: float, block_rows: int):
    """One head: the video rows by windows of the band, the text rows over everything."""
    text = slice(mask.text_start, mask.text_stop)
    video = slice(mask.video_start, mask.video_start + mask.video_tokens)
    sink = mask.video_sink_tokens
    text_arrays = [x[text] for x in (query, key, value)]
    keep = real = None
    if mask.text_tokens and text_length is not None:
        real = jnp.arange(mask.text_tokens) < text_length
        keep = real[None]
        # 0 * NaN must not reach the sum: what padding holds is nobody's business.
        text_arrays = [jnp.where(real[:, None], x, jnp.zeros((), x.dtype)) for x in text_arrays]
    text_query, *text_key_value = text_arrays
    query, key, value = (x[video] for x in (query, key, value))

    everywhere = [_Keys(*text_key_value, keep)] if mask.text_tokens else []
    of_text = [*everywhere, _Keys(key, value)] if mask.video_tokens else everywhere
    of_video = [*everywhere, _Keys(key[:sink], value[:sink])] if sink else everywhere
    rows = []
    if mask.video_tokens:
        windows = band_windows(mask.video_tokens, mask.band_width, sink, block_rows)
        band = _Band(key, value, mask.band_width)
        rows.append(_attend_rows(query, windows, of_video, band, scale))
    if mask.text_tokens:
        windows = even_windows(mask.text_tokens, 0, 0, block_rows)
        out, lse = _attend_rows(text_query, windows, of_text, None, scale)
        rows.append(_blank(out, lse, real))
    if mask.text_start == 0:
        rows.reverse()
    outs, lses = zip(*rows, strict=True)
    return jnp.concatenate(outs), jnp.concatenate(lses)


class _Band(NamedTuple):
    """The keys of one head that rows see through windows, and the width that boundaries test."""

    key: Float[Array, "keys head_dim"]
    value: Float[Array, "keys head_dim"]
    width: int


def _attend_rows(query, windows: tuple[Window, ...], everywhere, band: _Band | None, scale: float):
    """Attend all rows of one head: to the keys that every row sees, and to its window of the band."""
    outs, lses = [], []
    for window in windows:
        # Recomputing a block in the backward pass keeps its memory linear in the sequence.
        block = jax.checkpoint(
            partial(_attend_block, window=window, width=band.width if band else 0, scale=scale),
            prevent_cse=False,
        )
        rows = query[window.first_row : window.stop_row]
        rows = rows.reshape(window.num_blocks, window.block_rows, -1)
        arrays = None if band is None else (band.key, band.value)

        def one_block(xs, block=block, arrays=arrays):
            return block(*xs, everywhere, arrays)

        out, lse = lax.map(one_block, (jnp.arange(window.num_blocks), rows))
        outs.append(out.reshape(-1, out.shape[-1]))
        lses.append(lse.reshape(-1))
    return jnp.concatenate(outs), jnp.concatenate(lses)


def _attend_block(index, rows, everywhere, band, *, window: Window, width: int, scale: float):
    """Attend one block of rows to the keys that every row sees and to its window."""
    parts = list(everywhere)
    if band is not None:
        first_row = window.first_row + index * window.block_rows
        first_key = window.first_key + index * window.key_step
        for size, tested in ((window.left, True), (window.full, False), (window.right, True)):
            if size:
                keep = None
                if tested:
                    row = first_row + jnp.arange(window.block_rows)
                    keep = jnp.abs(row[:, None] - (first_key + jnp.arange(size))[None]) < width
                key, value = (lax.dynamic_slice_in_dim(x, first_key, size) for x in band)
                parts.append(_Keys(key, value, keep))
            first_key = first_key + size
    return _softmax_over(rows, parts, scale)


def _softmax_over(query, parts: list[_Keys], scale: float):
    """One softmax over several sets of keys, never joined into one array.

    The scale is applied to differences from the maximum, within the exponential: it costs nothing
    there, and low-precision queries are not rounded once more.
    """
    dot = partial(
        jnp.matmul,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
    )
    logits = []
    for part in parts:
        each = dot(query, part.key.T)
        logits.append(each if part.keep is None else jnp.where(part.keep, each, MASKED))
    tops = [jnp.max(each, axis=-1, keepdims=True) for each in logits]
    top = lax.stop_gradient(jnp.max(jnp.concatenate(tops, axis=-1), axis=-1, keepdims=True))
    weights = [jnp.exp((each - top) * scale) for each in logits]
    total = sum(jnp.sum(each, axis=-1, keepdims=True) for each in weights)
    out = sum(
        dot(each.astype(part.value.dtype), part.value)
        for each, part in zip(weights, parts, strict=True)
    )
    lse = (top * scale + jnp.log(total))[:, 0]
    return (out / total).astype(query.dtype), lse


def _blank(out, lse, real):
    """Give rows that are not real (None: all are) the result of having no key."""
    if real is None:
        return out, lse
    return jnp.where(real[:, None], out, jnp.zeros((), out.dtype)), jnp.where(real, lse, -jnp.inf)
