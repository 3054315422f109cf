"""The parts that the VAEs share: an encoder's distribution, and running layers over chunks.

Layers take [batch, frames, height, width, channels]. A layer that takes a video chunk by chunk is
called with (chunk, past) and returns (chunk, past): `past` holds the part of earlier chunks that it
needs, None before the first one.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Frames = Float[Array, "batch _ _ _ _"]  # a layer's input and output differ in all other sizes
Past = Any  # each layer's own: arrays, tuples of them, or None for a layer that needs nothing

_LOG_VARIANCES = (-30.0, 20.0)  # the least and the largest


class Posterior(NamedTuple):
    """A normal distribution over latents, whose mode is its mean.

    Attributes:
        mean: Mean of every latent.
        log_variance: Logarithm of every latent's variance, from -30 to 20.
    """

    mean: Float[Array, "batch latent_channels frames height width"]
    log_variance: Float[Array, "batch latent_channels frames height width"]

    @classmethod
    def from_moments(
        cls, moments: Float[Array, "batch twice_latent_channels frames height width"]
    ) -> "Posterior":
        """Split an encoder's output: means, then logarithms of variances."""
        mean, log_variance = jnp.split(moments, 2, axis=1)
        return cls(mean, jnp.clip(log_variance, *_LOG_VARIANCES))

    def sample(
        self, noise: Float[Array, "batch latent_channels frames height width"]
    ) -> Float[Array, "batch latent_channels frames height width"]:
        """Turn standard normal noise into latents of this distribution."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise.astype(self.mean.dtype)


def compiled(
    function: Callable[[Any, Frames], Frames], module: nnx.Module
) -> Callable[
    [Float[Array, "batch channels frames height width"]],
    Float[Array, "batch out_channels out_frames out_height out_width"],
]:
    """Compile `function(module, video)`, and turn channels to the last axis for it and back.

    Args:
        function: Function to compile; the same object, so that it is not compiled again.
        module: Its first argument.
    """
    return partial(_call, function, *nnx.split(module))


@partial(jax.jit, static_argnums=(0, 1))
def _call(function: Callable[[Any, Frames], Frames], graph: Any, state: Any, x: Array) -> Array:
    return jnp.moveaxis(function(nnx.merge(graph, state), jnp.moveaxis(x, 1, -1)), -1, 1)


def run_layers(
    layers: Iterable[Any], x: Frames, past: Past, *more: Any
) -> tuple[Frames, tuple[Past, ...]]:
    """Apply layers one after the other to a chunk; their past is the tuple of each one's.

    Args:
        layers: Layers, called as (chunk, past, *more).
        x: Chunk.
        past: Past of the layers, or None before the first chunk.
        more: Further arguments of every layer.
    """
    layers, pasts = tuple(layers), []
    for layer, its_past in zip(layers, past or (None,) * len(layers), strict=True):
        x, its_past = layer(x, its_past, *more)
        pasts.append(its_past)
    return x, tuple(pasts)


def in_chunks(
    step: Callable[[Frames, Past], tuple[Frames, Past]], x: Frames, first: int, size: int
) -> Frames:
    """Apply a layer to a video chunk by chunk, in a scan.

    Args:
        step: Layer, called as (chunk, past).
        x: Video.
        first: Number of frames in the first chunk.
        size: Number of frames in every other chunk.
    """
    out, past = step(x[:, :first], None)
    if x.shape[1] <= first:
        return out

    def next_step(past: Past, chunk: Array) -> tuple[Past, Array]:
        out, past = step(chunk, past)
        return past, out

    chunks = x[:, first:].reshape(len(x), -1, size, *x.shape[2:])
    _, outs = jax.lax.scan(next_step, past, jnp.moveaxis(chunks, 1, 0))
    outs = jnp.moveaxis(outs, 0, 1).reshape(len(x), -1, *out.shape[2:])
    return jnp.concatenate([out, outs], axis=1)


def repeat(x: Float[Array, "..."], times: int, axis: int) -> Float[Array, "..."]:
    """Repeat every element along an axis."""
    # Not jnp.repeat: this is a broadcast, which the operation that reads it does on the fly.
    shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    dimensions = [dimension for dimension in range(len(shape)) if dimension != axis + 1]
    spread = jax.lax.broadcast_in_dim(x, shape, dimensions)
    return spread.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
