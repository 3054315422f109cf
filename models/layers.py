"""Layers that several models share, and the scan over a stack of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

Module = TypeVar("Module", bound=nnx.Module)


class FeedForward(nnx.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input = nnx.Linear(features, hidden_features, **kinds)
        self.output = nnx.Linear(hidden_features, features, **kinds)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Applies the layer to every token."""
        return self.output(gelu_tanh(self.input(x)))


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation of GELU, in float32 inside."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def layer_norm(
    features: int, epsilon: float, *, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """A LayerNorm whose statistics, arithmetic and result are float32."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=False,  # E[x²] - E[x]² cancels where the mean is large
        rngs=rngs,
    )


def stack_layers(
    make_layer: Callable[[nnx.Rngs], Module], num_layers: int, rngs: nnx.Rngs
) -> Module:
    """One module that holds `num_layers` of them: every parameter has a leading [layers] axis."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make_layer))(rngs)


def scan_layers(
    layers: Module,
    apply_layer: Callable[[Module, Array, Int[Array, ""]], tuple[Array, Any]],
    hidden: Float[Array, "*shape"],
    *,
    remat: bool = False,
) -> tuple[Float[Array, "*shape"], Any]:
    """Sends `hidden` through stacked layers in a scan: compile time does not grow with depth.

    Args:
        layers: What `stack_layers` made.
        apply_layer: (layer module, hidden, number of the layer) -> (hidden, info).
        hidden: The residual stream.
        remat: Recompute each layer in the backward pass instead of keeping its activations.

    Returns:
        The last hidden state, and every layer's info stacked to a leading [layers] axis.
    """
    graph, state = nnx.split(layers)

    def step(hidden: Array, layer_input: tuple[Any, Array]) -> tuple[Array, Any]:
        layer_state, layer = layer_input
        return apply_layer(nnx.merge(graph, layer_state), hidden, layer)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)  # a scan needs no barrier against CSE
    num_layers = jax.tree.leaves(state)[0].shape[0]
    return jax.lax.scan(step, hidden, (state, jnp.arange(num_layers, dtype=jnp.int32)))
