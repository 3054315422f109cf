"""Moving the tokens of chosen heads: each device's way, against numpy's own transposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.kernels import permute, transpose_tokens

WAYS = {
    "by selection": permute._by_selection,
    "gathered": permute._gathered,
    "default": lambda arrays, of_head, matrix: transpose_tokens(
        arrays,
        of_head,
        **dict(zip(("start", "rows", "columns", "num_tokens"), matrix, strict=True)),
    ),
}
# start, rows, columns and tokens of the results; the arrays have 23 tokens
MATRICES = [(0, 3, 7, 23), (3, 4, 5, 24), (5, 6, 3, 20), (2, 1, 21, 31)]
OF_HEAD = np.array([[True, False, True], [False, False, True]])


def numbers(dtype, head_dim, tokens=23):
    shape = (2, tokens, 3, head_dim)
    return jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)


def moved(x, of_head, matrix):
    start, rows, columns, num_tokens = matrix
    out = np.zeros((2, max(num_tokens, x.shape[1]), *x.shape[2:]), x.dtype)
    out[:, : x.shape[1]] = x
    stop = start + rows * columns
    for entry, head in zip(*np.nonzero(of_head), strict=True):
        stretch = np.asarray(x)[entry, start:stop, head].reshape(rows, columns, -1)
        out[entry, start:stop, head] = stretch.swapaxes(0, 1).reshape(rows * columns, -1)
    return out[:, :num_tokens]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(jnp.bfloat16, 8), (jnp.float16, 3), (jnp.float32, 3)],
)
def test_tokens_of_marked_heads_are_transposed_and_nothing_else_moves(way, matrix, dtype, head_dim):
    x, y = numbers(dtype, head_dim), -numbers(jnp.float32, head_dim).astype(dtype)
    move = jax.jit(lambda *arrays: WAYS[way](arrays, jnp.asarray(OF_HEAD), matrix))
    outs = move(x, y)
    for before, after in zip((x, y), outs, strict=True):
        assert after.dtype == dtype
        np.testing.assert_array_equal(after, moved(before, OF_HEAD, matrix))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_vmap(way):
    matrix = (3, 4, 5, 24)
    x, weight = numbers(jnp.float32, 2), jnp.sin(numbers(jnp.float32, 2, tokens=24))
    labels = jnp.stack([jnp.asarray(OF_HEAD), ~jnp.asarray(OF_HEAD)])

    def loss(x, of_head):
        return (WAYS[way]((x,), of_head, matrix)[0] * weight).sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(x, labels)
    for of_head, gradient in zip(np.asarray(labels), gradients, strict=True):
        np.testing.assert_array_equal(gradient, moved(weight[:, :23], of_head, (3, 5, 4, 23)))


def test_an_accelerator_gathers_once_forward_and_once_back():
    def loss(x, of_head):
        (out,) = transpose_tokens((x,), of_head, start=3, rows=4, columns=5, num_tokens=24)
        return (out.astype(jnp.float32) ** 2).sum()

    x = jax.ShapeDtypeStruct((2, 23, 3, 8), jnp.bfloat16)
    of_head = jax.ShapeDtypeStruct((2, 3), bool)
    gradient = jax.jit(jax.grad(loss)).trace(x, of_head).lower(lowering_platforms=("cuda",))
    text = gradient.as_text()
    assert text.count('"stablehlo.gather"') == 2
    assert "scatter" not in text
    assert "custom_call" not in text
