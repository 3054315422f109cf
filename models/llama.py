"""LLaMA (arXiv 2302.13971; 3: arXiv 2407.21783) as an encoder: a hidden state of any layer.

HunyuanVideo takes its text features from LLaMA 3 8B. Source of the architecture as released:
transformers `LlamaModel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Int

from svg_jax.models.attention import softmax_attention
from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.layers import (
    GatedFeedForward,
    layers_below,
    rms_norm,
    scan_layers,
    silu,
    stack_layers,
)
from svg_jax.models.rope import Rotation, rotate_halves, text_rotation


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """What the encoder needs of a released config.json; transformers' names and defaults.

    Attributes:
        vocab_size: Rows of the token embedding.
        hidden_size: Features of a token.
        intermediate_size: Features inside the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of the queries.
        num_key_value_heads: Heads of keys and values, each for as many of the queries; None is
            num_attention_heads.
        head_dim: Features of a head; None is hidden_size over num_attention_heads.
        max_position_embeddings: Most tokens of a text.
        rms_norm_eps: Epsilon of the norms.
        rope_theta: Base of the rotary frequencies.
        hidden_act: "silu".
        attention_bias: False.
        mlp_bias: False.
    """

    other_keys: ClassVar = ("eos_token_id", "pretraining_tp")
    fixed_keys: ClassVar = MappingProxyType({"model_type": "llama"})

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    hidden_act: str = implemented("silu")
    attention_bias: bool = implemented(False)
    mlp_bias: bool = implemented(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"LlamaConfig: hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.head_features % 2:
            raise ValueError(f"LlamaConfig: head_dim must be even, not {self.head_features}.")
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"LlamaConfig: num_attention_heads={self.num_attention_heads} must be a multiple "
                f"of num_key_value_heads={self.key_value_heads}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read a parsed config.json; ValueError on anything unknown or not implemented."""
        return super().from_dict(_plain_rope(values))

    @property
    def head_features(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads


def _plain_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with `rope_theta` at the top, where transformers had it before 5.0."""
    plain = dict(values)
    for name in ("rope_scaling", "rope_parameters"):
        nested = plain.pop(name, None)
        if nested is None:
            continue
        rope = dict(nested) if isinstance(nested, Mapping) else {name: nested}
        theta = rope.pop("rope_theta", None)
        if rope not in ({}, {"rope_type": "default"}):
            raise ValueError(
                f"LlamaConfig: {name}={nested!r} is not implemented, only rope_type 'default'."
            )
        if theta is not None and plain.setdefault("rope_theta", theta) != theta:
            raise ValueError(
                f"LlamaConfig: rope_theta is {plain['rope_theta']!r} and in {name} {theta!r}."
            )
    return plain


class Attention(nnx.Module):
    """Causal self-attention with rotary embedding; some queries share keys and values."""

    def __init__(self, config: LlamaConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        width, self.head_features = config.hidden_size, config.head_features
        inner = config.num_attention_heads * self.head_features
        shared = config.key_value_heads * self.head_features
        self.query = linear(width, inner)
        self.key = linear(width, shared)
        self.value = linear(width, shared)
        self.output = linear(inner, width)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens width"],
        rotation: Rotation,
        keep: Bool[Array, "batch tokens"] | None,
    ) -> Float[Array, "batch tokens width"]:
        """Attends to the tokens to keep up to each; None keeps all."""
        by_head = (*hidden.shape[:-1], -1, self.head_features)
        query = rotate_halves(self.query(hidden).reshape(by_head), rotation)
        key = rotate_halves(self.key(hidden).reshape(by_head), rotation)
        value = self.value(hidden).reshape(by_head)
        sharing = query.shape[2] // key.shape[2]
        out = softmax_attention(
            query,
            jnp.repeat(key, sharing, axis=2),
            jnp.repeat(value, sharing, axis=2),
            scale=self.head_features**-0.5,
            keep=keep,
            causal=True,
        )
        return self.output(out.reshape(*hidden.shape[:-1], -1))


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: LlamaConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = partial(rms_norm, config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.attention_norm = norm(rngs=rngs)
        self.attention = Attention(config, **kinds)
        self.feed_forward_norm = norm(rngs=rngs)
        self.feed_forward = GatedFeedForward(
            config.hidden_size, config.intermediate_size, activation=silu, **kinds
        )

    def __call__(
        self,
        hidden: Float[Array, "batch tokens width"],
        rotation: Rotation,
        keep: Bool[Array, "batch tokens"] | None,
    ) -> Float[Array, "batch tokens width"]:
        """Returns the next hidden state, float32 as the one before."""
        out = self.attention(self.attention_norm(hidden), rotation, keep)
        hidden = hidden + out.astype(hidden.dtype)
        out = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + out.astype(hidden.dtype)


class LlamaEncoder(nnx.Module):
    """Token ids to features.

    The hidden state between layers is float32 whatever `dtype` is: it is small.

    Attributes:
        config: The architecture.
        blocks: All layers in one module; every parameter has a leading [layers] axis.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes an encoder with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: The architecture.
            dtype: Of matrix products and the result; norms and softmax are float32 inside.
            param_dtype: Of the parameters.
            rngs: Source of random weights.
        """
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            embedding_init=normal(0.02),
            rngs=rngs,
        )
        self.blocks = stack_layers(
            lambda rngs: Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.final_norm = rms_norm(
            config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Bool[Array, "batch tokens"] | Int[Array, "batch tokens"] | None = None,
        *,
        hidden_state: int = -1,
    ) -> Float[Array, "batch tokens width"]:
        """Encodes.

        Args:
            input_ids: Token ids, padding behind each text: all tokens count as positions.
            attention_mask: True or 1 at the tokens that count as keys; None if all do.
            hidden_state: Which one to return, counted as in `layers_below`; layers above it are not
                computed.

        Returns:
            That hidden state in `dtype`; the last one after the final norm, all others without.

        Raises:
            ValueError: On more tokens than the model was made for, or if there is no such hidden
                state.
        """
        embedded = self.token_embedding(input_ids)
        return self.encode(embedded, attention_mask, hidden_state=hidden_state)

    def encode(
        self,
        embedded: Float[Array, "batch tokens width"],
        attention_mask: Bool[Array, "batch tokens"] | Int[Array, "batch tokens"] | None = None,
        *,
        hidden_state: int = -1,
    ) -> Float[Array, "batch tokens width"]:
        """Encodes tokens that are embedded already; all else is as in `__call__`."""
        config, num_tokens = self.config, embedded.shape[1]
        if num_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{num_tokens} tokens exceed the {config.max_position_embeddings} of this text "
                "encoder."
            )
        num_layers = layers_below(hidden_state, config.num_hidden_layers)
        rotation = text_rotation(num_tokens, config.head_features, theta=config.rope_theta)
        keep = None if attention_mask is None else attention_mask.astype(bool)

        def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, None]:
            return block(hidden, rotation, keep), None

        hidden = embedded.astype(jnp.float32)
        hidden, _ = scan_layers(self.blocks, apply_layer, hidden, num_layers=num_layers)
        if num_layers == config.num_hidden_layers:
            hidden = self.final_norm(hidden)
        return hidden.astype(self.dtype)
