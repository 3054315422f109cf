"""Batch and heads spread over several devices: no head needs another, so nothing is gathered.

jax has three kinds of mesh axes. Under `shard_map` (Manual) a function sees its own device's share.
On Explicit axes, types tell how arrays are spread, and `on_each_device` makes that a `shard_map`.
On Auto axes the compiler decides, after the fact: there nothing may loop over batch and heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped


def on_each_device(
    function: Callable, in_axes: Sequence[str], out_axes: Sequence[str] | str
) -> Callable:
    """Run a function on each device's batch entries and heads, if arrays lie on Explicit axes.

    Args:
        function: A function of arrays, and None, whose batch entries and heads are independent.
        in_axes: One word for each argument, one letter for each of its axes: "b" is the batch, "h"
            the heads, anything else is whole on every device. The first one has both, and its
            sharding is that of all: what lies otherwise, such as a split sequence, is gathered.
        out_axes: Such words for the results.
    """

    def run(*arguments: Array | None) -> Any:
        sharding: Any = jax.typeof(arguments[0]).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return function(*arguments)
        axis_of = dict(zip(in_axes[0], sharding.spec, strict=True))

        def spec(axes: str) -> PartitionSpec:
            return PartitionSpec(*(axis_of[axis] if axis in "bh" else None for axis in axes))

        placed = [
            None if x is None else jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec(axes)))
            for x, axes in zip(arguments, in_axes, strict=True)
        ]
        return jax.shard_map(
            function,
            mesh=sharding.mesh,
            in_specs=tuple(map(spec, in_axes)),
            out_specs=spec(out_axes) if isinstance(out_axes, str) else tuple(map(spec, out_axes)),
        )(*placed)

    return run


def compiler_may_split(x: Array) -> bool:
    """Whether an array may turn out to be spread over devices, on mesh axes of type Auto.

    A loop over batch or heads would then take from one device what all others wait for.
    """
    mesh = jax.typeof(x).sharding.mesh
    return jax.device_count() > 1 and (mesh.empty or AxisType.Auto in mesh.axis_types)


def over_heads(body: Callable, arguments: Any, heads_at_once: int) -> Any:
    """Map a function of one head over a tree of arrays [batch, heads, ...].

    Args:
        body: A function of the tree, without batch and heads.
        arguments: The tree; all of its arrays have the same batch and heads.
        heads_at_once: Most heads to do together, where the compiler does not split them.
    """
    first = jax.tree.leaves(arguments)[0]
    if compiler_may_split(first):
        return jax.vmap(jax.vmap(body))(arguments)
    batch, heads = first.shape[:2]
    # A divisor, since a remainder would be compiled as a second program.
    at_once = max(n for n in range(1, heads_at_once + 1) if batch * heads % n == 0)
    merged = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), arguments)
    out = jax.lax.map(body, merged, batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), out)


def vary_like(x: Shaped[Array, "..."], like: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Type an array as differing between devices where another does, inside `shard_map`.

    A loop's carry that starts from a constant needs it, and what Pallas returns.
    """
    of_x, of_like = (jax.typeof(array).manual_axis_type.varying for array in (x, like))
    axes = of_like - of_x
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
