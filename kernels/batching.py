"""vmap of functions that have a batch axis of their own: one call with a larger batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def vmap_as_batch(function: Callable) -> Callable:
    """Fold axes that vmap adds into the leading batch axis.

    Args:
        function: Takes arrays or None, and returns a tree of arrays; all lead with one batch axis.
    """
    folded = custom_vmap(function)

    @folded.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = vmap_as_batch(function)(*jax.tree.map(fold, list(args), list(in_batched)))
        unfolded = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return unfolded, jax.tree.map(lambda _: True, out)

    return folded
