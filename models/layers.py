"""Layers that several models share, and the scan over a stack of them."""

from collections.abc import Callable
from functools import partial
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


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU as CLIP approximates it, x times the sigmoid of 1.702 x; in float32 inside."""
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


class GatedFeedForward(nnx.Module):
    """Linear times the activation of another linear, then linear; without biases."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Callable[[Array], Array],
        output_param_dtype: Dtype | None = None,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        """Makes the layer; `output_param_dtype` None keeps the last linear's in `param_dtype`."""
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.activation = activation
        self.gate = linear(features, hidden_features, param_dtype=param_dtype)
        self.input = linear(features, hidden_features, param_dtype=param_dtype)
        kept = param_dtype if output_param_dtype is None else output_param_dtype
        self.output = linear(hidden_features, features, param_dtype=kept)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Applies the layer to every token."""
        return self.output(self.activation(self.gate(x)) * self.input(x))


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
    num_layers: int | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "*shape"], Any]:
    """Sends `hidden` through stacked layers in a scan: compile time does not grow with depth.

    Args:
        layers: What `stack_layers` made.
        apply_layer: (layer module, hidden, number of the layer) -> (hidden, info).
        hidden: The residual stream.
        first_layer: Number of the first of these layers: those of an earlier stack count.
        num_layers: How many of them to apply, from the first on; None applies all.
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
    depth = jax.tree.leaves(state)[0].shape[0]
    numbers = jnp.arange(first_layer, first_layer + depth, dtype=jnp.int32)
    if num_layers in (None, depth):
        return jax.lax.scan(step, hidden, (state, numbers))

    # A scan over the first layers' slice of the state would copy it, and with it most of the model.
    def step_by_number(hidden: Array, layer: Array) -> tuple[Array, Any]:
        return step(hidden, (jax.tree.map(lambda x: x[layer - first_layer], state), layer))

    return jax.lax.scan(step_by_number, hidden, numbers[:num_layers])


def layers_below(hidden_state: int, num_layers: int) -> int:
    """How many layers make a hidden state of a stack; it is counted as transformers does.

    Args:
        hidden_state: 0 is what the first layer takes, and `num_layers` what the last one gives;
            negative numbers count from the end, -1 being the last.
        num_layers: Layers of the stack.

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
