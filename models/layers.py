"""Layers that several models share, and the scan over a stack of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

Module = TypeVar("Module", bound=nnx.Module)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """SiLU (x times its sigmoid), in float32 inside."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU by the error function, in float32 inside."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation of GELU, in float32 inside."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Callable[[Array], Array] = gelu_tanh,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        """Makes the layer; `out_features` None gives as many as it takes."""
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.input = nnx.Linear(features, hidden_features, **kinds)
        self.output = nnx.Linear(hidden_features, out_features or features, **kinds)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out_features"]:
        """Applies the layer to every token."""
        return self.output(self.activation(self.input(x)))


def layer_norm(
    features: int, epsilon: float, *, affine: bool = True, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """A LayerNorm whose statistics, arithmetic and result are float32."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,  # E[x²] - E[x]² cancels where the mean is large
        rngs=rngs,
    )


def rms_norm(features: int, epsilon: float, *, param_dtype: Dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMSNorm whose statistics, arithmetic and result are float32."""
    return nnx.RMSNorm(
        features, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )


def group_norm(
    features: int, groups: int, epsilon: float, *, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """A GroupNorm over all frames, rows and columns of [batch, ..., features]; float32 as above."""
    return nnx.GroupNorm(
        features,
        groups,
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def add_gated(
    hidden: Float[Array, "*shape"],
    gate: Float[Array, "*gate_shape"],
    out: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """The residual stream plus `gate * out`, in float32 inside."""
    return (hidden.astype(jnp.float32) + gate * out.astype(jnp.float32)).astype(hidden.dtype)


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
    first_layer: int = 0,
    remat: bool = False,
) -> tuple[Float[Array, "*shape"], Any]:
    """Sends `hidden` through stacked layers in a scan: compile time does not grow with depth.

    Args:
        layers: What `stack_layers` made.
        apply_layer: (layer module, hidden, number of the layer) -> (hidden, info).
        hidden: The residual stream.
        first_layer: Number of the first of these layers: those of an earlier stack count.
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
    numbers = jnp.arange(first_layer, first_layer + num_layers, dtype=jnp.int32)
    return jax.lax.scan(step, hidden, (state, numbers))
