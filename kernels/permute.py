"""Moving the tokens of chosen heads, at the speed of a copy.

A stretch of tokens is seen as a matrix, rows × columns, and transposed for the heads that are
marked; everything else stays.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped


def transpose_tokens(
    arrays: Sequence[Shaped[Array, "batch _ heads head_dim"]],
    of_head: Bool[Array, "batch heads"],
    *,
    start: int,
    rows: int,
    columns: int,
    num_tokens: int | None = None,
) -> tuple[Shaped[Array, "batch _ heads head_dim"], ...]:
    """Transpose the tokens [start, start + rows · columns) of some heads.

    Token start + r · columns + c moves to start + c · rows + r. The labels are data: others do not
    compile anew.

    Args:
        arrays: Arrays of one shape.
        of_head: For which heads.
        start: First token of the matrix.
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        num_tokens: Tokens of the results: fewer cut the end off, more are zeros. None: as many.
    """
    num_tokens = arrays[0].shape[1] if num_tokens is None else num_tokens
    matrix = (start, rows, columns, num_tokens)
    # A CPU selects between whole slices faster than it gathers; a GPU would read both orders.
    return lax.platform_dependent(
        tuple(arrays),
        of_head,
        cpu=partial(_by_selection, matrix=matrix),
        default=partial(_gathered, matrix=matrix),
    )


def _by_selection(arrays, of_head, matrix: tuple[int, int, int, int]):
    """Choose between both orders of an array, which are both read."""
    start, rows, columns, num_tokens = matrix
    stop = start + rows * columns

    def one_array(x):
        batch, _, heads, head_dim = x.shape
        by_row = x[:, start:stop].reshape(batch, rows, columns, heads, head_dim)
        moved = by_row.swapaxes(1, 2).reshape(batch, rows * columns, heads, head_dim)
        chosen = jnp.where(of_head[:, None, :, None], moved, x[:, start:stop])
        out = jnp.concatenate([x[:, :start], chosen, x[:, stop:]], axis=1)[:, :num_tokens]
        missing = num_tokens - out.shape[1]
        return jnp.pad(out, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else out

    return tuple(map(one_array, arrays))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gathered(arrays, of_head, matrix: tuple[int, int, int, int]):
    """Gather each token's features from where they stood: XLA fuses all arrays into one pass.

    The numbers of tokens are computed in that pass. Its gradient moves the tokens back; left to
    JAX, it would be a scatter.
    """
    num_tokens, tokens = matrix[-1], arrays[0].shape[1]
    source = _sources(of_head, matrix, tokens)[..., None]
    is_there = (jnp.arange(num_tokens, dtype=jnp.int32) < tokens)[None, :, None, None]

    def one_array(x):
        words = _words(x)
        out = jnp.take_along_axis(words, source, axis=1, mode="promise_in_bounds")
        if num_tokens > tokens:
            out = jnp.where(is_there, out, jnp.zeros((), out.dtype))
        return lax.bitcast_convert_type(out, x.dtype).reshape(*out.shape[:3], x.shape[-1])

    return tuple(map(one_array, arrays))


def _words(
    x: Shaped[Array, "batch tokens heads head_dim"],
) -> Shaped[Array, "batch tokens heads _"]:
    """View the memory in words of 32 bits, of which a thread reads four: 16 bytes at once."""
    if x.dtype.itemsize != 2 or x.shape[-1] % 2:
        return x
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)


def _sources(
    of_head, matrix: tuple[int, int, int, int], tokens: int
) -> Int[Array, "batch results heads"]:
    """Give the number of the token that each token of the results is."""
    start, rows, columns, num_tokens = matrix
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    place = token - start
    moved = start + lax.rem(place, jnp.int32(rows)) * columns + lax.div(place, jnp.int32(rows))
    moved = jnp.where((place >= 0) & (place < rows * columns), moved, token)
    moved, token = (jnp.minimum(x, tokens - 1)[None, :, None] for x in (moved, token))
    return jnp.where(of_head[:, None], moved, token)


def _forward(arrays, of_head, matrix):
    return _gathered(arrays, of_head, matrix), (of_head, arrays[0].shape[1])


def _backward(matrix, residuals, cotangents):
    start, rows, columns, _ = matrix
    of_head, num_tokens = residuals
    return _gathered(tuple(cotangents), of_head, (start, columns, rows, num_tokens)), None


_gathered.defvjp(_forward, _backward)
