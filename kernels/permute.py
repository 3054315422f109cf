"""Moving the tokens of chosen heads, at the speed of a copy.

A stretch of tokens is seen as a matrix, rows × columns, and transposed for the heads that are
marked; everything else stays. On an NVIDIA GPU a Triton kernel reads and writes each array once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Shaped

from svg_jax.kernels.batching import vmap_as_batch

TOKENS_OF_A_BLOCK = 64
Implementation = Literal["triton", "xla"]


def transpose_tokens(
    arrays: Sequence[Shaped[Array, "batch _ heads head_dim"]],
    of_head: Bool[Array, "batch heads"],
    *,
    start: int,
    rows: int,
    columns: int,
    num_tokens: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "batch _ heads head_dim"], ...]:
    """Transpose the tokens [start, start + rows · columns) of some heads.

    Token start + r · columns + c moves to start + c · rows + r.

    Args:
        arrays: Arrays of one shape.
        of_head: For which heads.
        start: First token of the matrix.
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        num_tokens: Tokens of the results: fewer cut the end off, more are zeros. None: as many.
        implementation: "triton" (NVIDIA GPU), "xla", or None: triton where it can run.
    """
    num_tokens = arrays[0].shape[1] if num_tokens is None else num_tokens
    if implementation is None:
        implementation = "triton" if _can_run_triton(arrays[0]) else "xla"
    if implementation == "triton":
        return _differentiable(tuple(arrays), of_head, (start, rows, columns, num_tokens))
    return tuple(_by_xla(x, of_head, start, rows, columns, num_tokens) for x in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _differentiable(arrays, of_head, matrix: tuple[int, int, int, int]):
    start, rows, columns, num_tokens = matrix

    def run(of_head, *arrays):
        return _by_triton(
            arrays, of_head, start=start, rows=rows, columns=columns, num_tokens=num_tokens
        )

    return vmap_as_batch(run)(of_head, *arrays)


def _forward(arrays, of_head, matrix):
    return _differentiable(arrays, of_head, matrix), (of_head, arrays[0].shape[1])


def _backward(matrix, residuals, cotangents):
    start, rows, columns, _ = matrix
    of_head, num_tokens = residuals
    return _differentiable(tuple(cotangents), of_head, (start, columns, rows, num_tokens)), None


_differentiable.defvjp(_forward, _backward)


def _can_run_triton(x: Array) -> bool:
    head_dim = x.shape[-1]
    return jax.default_backend() == "gpu" and head_dim & (head_dim - 1) == 0


def _by_xla(x, of_head, start: int, rows: int, columns: int, num_tokens: int):
    batch, _, heads, head_dim = x.shape
    stop = start + rows * columns
    matrix = x[:, start:stop].reshape(batch, rows, columns, heads, head_dim)
    moved = matrix.swapaxes(1, 2).reshape(batch, rows * columns, heads, head_dim)
    chosen = jnp.where(of_head[:, None, :, None], moved, x[:, start:stop])
    out = jnp.concatenate([x[:, :start], chosen, x[:, stop:]], axis=1)[:, :num_tokens]
    missing = num_tokens - out.shape[1]
    return jnp.pad(out, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else out


@partial(jax.jit, static_argnames=("start", "rows", "columns", "num_tokens", "interpret"))
def _by_triton(
    arrays,
    of_head,
    *,
    start: int,
    rows: int,
    columns: int,
    num_tokens: int,
    interpret: bool = False,
):
    batch, tokens, heads, head_dim = arrays[0].shape

    def body(of_head_ref, *refs):
        block, head, entry = (pl.program_id(axis) for axis in range(3))
        token = block * TOKENS_OF_A_BLOCK + jnp.arange(TOKENS_OF_A_BLOCK, dtype=jnp.int32)
        place = token - start
        row, column = lax.rem(place, jnp.int32(rows)), lax.div(place, jnp.int32(rows))
        moves = (place >= 0) & (place < rows * columns) & of_head_ref[entry, head]
        source = jnp.where(moves, start + row * columns + column, token)[:, None]
        there = jnp.broadcast_to((token < tokens)[:, None], (TOKENS_OF_A_BLOCK, head_dim))
        wanted = jnp.broadcast_to((token < num_tokens)[:, None], (TOKENS_OF_A_BLOCK, head_dim))
        feature = jnp.arange(head_dim, dtype=jnp.int32)[None]
        for x_ref, out_ref in zip(refs[: len(arrays)], refs[len(arrays) :], strict=True):
            x = triton.load(x_ref.at[entry, source, head, feature], mask=there, other=0)
            triton.store(out_ref.at[entry, token[:, None], head, feature], x, mask=wanted)

    return tuple(
        pl.pallas_call(
            body,
            out_shape=[
                jax.ShapeDtypeStruct(
                    (batch, num_tokens, heads, head_dim),
                    x.dtype,
                    manual_axis_type=jax.typeof(x).manual_axis_type,
                )
                for x in arrays
            ],
            grid=(pl.cdiv(num_tokens, TOKENS_OF_A_BLOCK), heads, batch),
            compiler_params=triton.CompilerParams(num_warps=4),
            interpret=interpret,
        )(of_head, *arrays)
    )
