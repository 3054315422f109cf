"""Layers that the encoders of texts and images share.

The hidden state between their layers is float32, whatever the dtype of matrix products: it is
small.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax.nn.initializers import lecun_normal, normal
from jaxtyping import Array, Bool, Float

from svg_jax.models.attention import softmax_attention
from svg_jax.models.layers import Kinds, scan_layers
from svg_jax.models.rope import Rotation, rotate_halves


def embedding(
    rows: int, features: int, deviation: float = 0.02, **kinds: Unpack[Kinds]
) -> nnx.Embed:
    """Make a table of embeddings with a float32 result; its weights have this deviation."""
    kinds["dtype"] = jnp.float32
    return nnx.Embed(rows, features, embedding_init=normal(deviation), **kinds)


class Attention(nnx.Module):
    """Self-attention; groups of query heads can share one head of keys and values."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_features: int,
        *,
        key_value_heads: int | None = None,
        use_bias: bool,
        query_init: Initializer | None = None,
        **kinds: Unpack[Kinds],
    ):
        linear = partial(nnx.Linear, use_bias=use_bias, **kinds)
        shared = (key_value_heads or num_heads) * head_features
        self.head_features = head_features
        self.query = linear(
            features, num_heads * head_features, kernel_init=query_init or lecun_normal()
        )
        self.key = linear(features, shared)
        self.value = linear(features, shared)
        self.output = linear(num_heads * head_features, features)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens features"],
        *,
        scale: float | None = None,
        rotation: Rotation | None = None,
        bias: Float[Array, "1 heads tokens tokens"] | None = None,
        keep: Bool[Array, "batch tokens"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "batch tokens features"]:
        """Attend to tokens.

        Args:
            hidden: Features of each token.
            scale: Factor of the scores; None is 1 / sqrt(head_features).
            rotation: Rotary embedding of queries and keys, or None.
            bias: Bias of the scores, or None.
            keep: Tokens that can be attended to; None keeps all.
            causal: Whether a token only attends to those up to itself.
        """
        by_head = (*hidden.shape[:-1], -1, self.head_features)
        query, key, value = (
            project(hidden).reshape(by_head) for project in (self.query, self.key, self.value)
        )
        if rotation is not None:
            query, key = rotate_halves(query, rotation), rotate_halves(key, rotation)
        if (sharing := query.shape[2] // key.shape[2]) > 1:
            key, value = (jnp.repeat(x, sharing, axis=2) for x in (key, value))
        out = softmax_attention(
            query,
            key,
            value,
            scale=self.head_features**-0.5 if scale is None else scale,
            bias=bias,
            keep=keep,
            causal=causal,
        )
        return self.output(out.reshape(*hidden.shape[:-1], -1))


class Block(nnx.Module):
    """One layer, whose norms, attention and feed-forward layer each encoder makes itself."""

    attention_norm: Callable[..., Array]
    attention: Attention
    feed_forward_norm: Callable[..., Array]
    feed_forward: Callable[..., Array]

    def __call__(
        self, hidden: Float[Array, "batch tokens features"], **attention: Any
    ) -> Float[Array, "batch tokens features"]:
        """Return the next hidden state, with its dtype unchanged.

        Args:
            hidden: Hidden state.
            **attention: Keyword arguments of `Attention`.
        """
        out = self.attention(self.attention_norm(hidden), **attention)
        hidden = hidden + out.astype(hidden.dtype)
        out = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + out.astype(hidden.dtype)


def apply_blocks(
    blocks: Block,
    hidden: Float[Array, "batch tokens features"],
    num_layers: int | None = None,
    **attention: Any,
) -> Float[Array, "batch tokens features"]:
    """Apply stacked blocks.

    Args:
        blocks: Blocks that `stack_layers` made.
        hidden: First hidden state.
        num_layers: Number of blocks to apply, from the first one on; None applies all.
        **attention: Keyword arguments of `Attention`.

    Returns:
        The last hidden state.
    """

    def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, None]:
        return block(hidden, **attention), None

    return scan_layers(blocks, apply_layer, hidden, num_layers=num_layers)[0]
