"""Layers that several models share, and the scan over a stack of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

Module = TypeVar("Module", bound=nnx.Module)


class Kinds(TypedDict):
    """Keyword arguments with which every layer is made, beside its sizes.

    Attributes:
        dtype: Dtype of matrix products, convolutions and their results.
        param_dtype: Dtype of the parameters.
        rngs: Source of random weights.
    """

    dtype: Dtype
    param_dtype: Dtype
    rngs: nnx.Rngs


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply SiLU (x times its sigmoid), computed in float32."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply GELU by the error function, computed in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply the tanh approximation of GELU, computed in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply CLIP's approximation of GELU (x times the sigmoid of 1.702 x), computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(1.702 * x32)).astype(x.dtype)


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Callable[[Array], Array] = gelu_tanh,
        **kinds: Unpack[Kinds],
    ):
        """Make the layer; out_features=None gives as many features as it takes."""
        self.activation = activation
        self.input = nnx.Linear(features, hidden_features, **kinds)
        self.output = nnx.Linear(hidden_features, out_features or features, **kinds)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out_features"]:
        """Apply the layer to every token."""
        return self.output(self.activation(self.input(x)))


class GatedFeedForward(nnx.Module):
    """Linear times the activation of another linear, then linear; without biases."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Callable[[Array], Array],
        output_param_dtype: Dtype | None = None,
        **kinds: Unpack[Kinds],
    ):
        """Make the layer; the last linear's parameters have output_param_dtype if one is given."""
        linear = partial(nnx.Linear, use_bias=False)
        self.activation = activation
        self.gate = linear(features, hidden_features, **kinds)
        self.input = linear(features, hidden_features, **kinds)
        if output_param_dtype is not None:
            kinds["param_dtype"] = output_param_dtype
        self.output = linear(hidden_features, features, **kinds)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Apply the layer to every token."""
        return self.output(self.activation(self.gate(x)) * self.input(x))


# Statistics, arithmetic and results of all norms are float32, whatever the dtype of other layers.
# Variances are not E[x²] - E[x]², which cancels where the mean is large.


def layer_norm(
    features: int, epsilon: float, *, affine: bool = True, **kinds: Unpack[Kinds]
) -> nnx.LayerNorm:
    """Make a LayerNorm in float32."""
    kinds["dtype"] = jnp.float32
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        **kinds,
    )


def rms_norm(features: int, epsilon: float, **kinds: Unpack[Kinds]) -> nnx.RMSNorm:
    """Make an RMSNorm in float32."""
    kinds["dtype"] = jnp.float32
    return nnx.RMSNorm(features, epsilon=epsilon, **kinds)


def group_norm(
    features: int, groups: int, epsilon: float = 1e-6, **kinds: Unpack[Kinds]
) -> nnx.GroupNorm:
    """Make a GroupNorm over all frames, rows and columns of [batch, ..., features], in float32."""
    kinds["dtype"] = jnp.float32
    return nnx.GroupNorm(features, groups, epsilon=epsilon, use_fast_variance=False, **kinds)


def add_gated(
    hidden: Float[Array, "*shape"], gate: Float[Array, "*gate_shape"], out: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Add `gate * out` to the residual stream, computed in float32."""
    return (hidden.astype(jnp.float32) + gate * out.astype(jnp.float32)).astype(hidden.dtype)


def stack_layers(
    make_layer: Callable[..., Module], num_layers: int, **kinds: Unpack[Kinds]
) -> Module:
    """Make one module of many layers: every parameter has a leading [layers] axis.

    Args:
        make_layer: Function of the kinds that makes a layer.
        num_layers: Number of layers.
        **kinds: See `Kinds`.
    """

    def make(rngs: nnx.Rngs) -> Module:
        return make_layer(dtype=kinds["dtype"], param_dtype=kinds["param_dtype"], rngs=rngs)

    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make))(kinds["rngs"])


def scan_layers(
    layers: Module,
    apply_layer: Callable[[Module, Array, Int[Array, ""]], tuple[Array, Any]],
    hidden: Float[Array, "*shape"],
    *,
    first_layer: int = 0,
    num_layers: int | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "*shape"], Any]:
    """Apply stacked layers in a scan: compile time does not grow with depth.

    Args:
        layers: Module that `stack_layers` made.
        apply_layer: Function (layer, hidden, layer's number) -> (hidden, info).
        hidden: Residual stream.
        first_layer: Number of the first of these layers, if another stack comes before them.
        num_layers: Number of layers to apply, from the first one on; None applies all.
        remat: Whether to recompute each layer in the backward pass instead of keeping its
            activations.

    Returns:
        The last hidden state, and every layer's info stacked along a leading [layers] axis.
    """
    graph, state = nnx.split(layers)

    def step(hidden: Array, layer_input: tuple[Any, Array]) -> tuple[Array, Any]:
        layer_state, layer = layer_input
        return apply_layer(nnx.merge(graph, layer_state), hidden, layer)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)  # a scan needs no barrier against CSE
    depth = jax.tree.leaves(state)[0].shape[0]
    numbers = jnp.arange(first_layer, first_layer + depth, dtype=jnp.int32)
    if num_layers in (None, depth):
        return jax.lax.scan(step, hidden, (state, numbers))

    # A scan over the first layers' slice of the state would copy it, and with it most of the model.
    def step_by_number(hidden: Array, layer: Array) -> tuple[Array, Any]:
        return step(hidden, (jax.tree.map(lambda x: x[layer - first_layer], state), layer))

    return jax.lax.scan(step_by_number, hidden, numbers[:num_layers])


def layers_below(hidden_state: int, num_layers: int) -> int:
    """Count the layers that a hidden state of a stack needs.

    Args:
        hidden_state: Number of the hidden state as transformers counts: 0 is the first layer's
            input, num_layers the last one's output; negative numbers count from the end.
        num_layers: Number of layers in the stack.

    Raises:
        ValueError: If the stack has no such hidden state.
    """
    count = hidden_state + (num_layers + 1 if hidden_state < 0 else 0)
    if not 0 <= count <= num_layers:
        raise ValueError(
            f"hidden_state={hidden_state} must be from {-num_layers - 1} to {num_layers}: there "
            f"are {num_layers} layers."
        )
    return count
