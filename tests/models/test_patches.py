"""Latents to tokens and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.models.patches import patchify, unpatchify


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 5)])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 3, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_unpatchify_undoes_patchify(channels, grid, patch):
    sizes = [n * p for n, p in zip(grid, patch, strict=True)]
    shape = (2, channels, *sizes)
    latents = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, np.prod(grid), channels * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(tokens, grid, patch), latents)

    by_channel = tokens.reshape(*tokens.shape[:2], channels, -1)
    last = by_channel.swapaxes(2, 3).reshape(tokens.shape)
    np.testing.assert_array_equal(unpatchify(last, grid, patch, channels_last=True), latents)


def test_a_token_holds_one_patch_channel_by_channel():
    latents = jnp.arange(2 * 2 * 4 * 4, dtype=jnp.float32).reshape(1, 2, 2, 4, 4)
    second_row = patchify(latents, (1, 2, 2))[0, 2]
    np.testing.assert_array_equal(second_row, [8, 9, 12, 13, 40, 41, 44, 45])
