"""LLaMA (arXiv 2302.13971; 3: arXiv 2407.21783) as an encoder that returns any hidden state.

HunyuanVideo takes its text features from LLaMA 3 8B. Source of the architecture as released:
transformers `LlamaModel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.encoder_layers import Attention, Block, apply_blocks, embedding
from svg_jax.models.layers import (
    GatedFeedForward,
    Kinds,
    layers_below,
    rms_norm,
    silu,
    stack_layers,
)
from svg_jax.models.rope import text_rotation


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """The encoder's part of a released config.json; transformers' names and defaults.

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
    """Move `rope_theta` to the top, where transformers had it before 5.0."""
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


class LlamaBlock(Block):
    """One layer."""

    def __init__(self, config: LlamaConfig, **kinds: Unpack[Kinds]):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = rms_norm(width, eps, **kinds)
        self.attention = Attention(
            width,
            config.num_attention_heads,
            config.head_features,
            key_value_heads=config.key_value_heads,
            use_bias=False,
            **kinds,
        )
        self.feed_forward_norm = rms_norm(width, eps, **kinds)
        self.feed_forward = GatedFeedForward(
            width, config.intermediate_size, activation=silu, **kinds
        )


class LlamaEncoder(nnx.Module):
    """Token ids to features.

    Attributes:
        config: Architecture.
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
        """Make an encoder with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of matrix products and the result; norms and softmax are always float32.
            param_dtype: Dtype of the parameters.
            rngs: Source of random weights.
        """
        width, kinds = config.hidden_size, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.token_embedding = embedding(config.vocab_size, width, **kinds)
        self.blocks = stack_layers(partial(LlamaBlock, config), config.num_hidden_layers, **kinds)
        self.final_norm = rms_norm(width, config.rms_norm_eps, **kinds)

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Bool[Array, "batch tokens"] | Int[Array, "batch tokens"] | None = None,
        *,
        hidden_state: int = -1,
    ) -> Float[Array, "batch tokens width"]:
        """Encode.

        Args:
            input_ids: Token ids, padding behind each text: every token has a position.
            attention_mask: True or 1 at the tokens that can be attended to; None for all.
            hidden_state: Number of the hidden state to return, counted as in `layers_below`; layers
                above it are not computed.

        Returns:
            That hidden state in `dtype`; the last one after the final norm, all others without.

        Raises:
            ValueError: On more tokens than the model was made for, or on a hidden state that it
                does not have.
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
        """Encode tokens that are embedded already; see `__call__`."""
        config, num_tokens = self.config, embedded.shape[1]
        if num_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{num_tokens} tokens exceed the {config.max_position_embeddings} of this text "
                "encoder."
            )
        num_layers = layers_below(hidden_state, config.num_hidden_layers)
        rotation = text_rotation(num_tokens, config.head_features, theta=config.rope_theta)
        keep = None if attention_mask is None else attention_mask.astype(bool)
        hidden = apply_blocks(
            self.blocks,
            embedded.astype(jnp.float32),
            num_layers,
            rotation=rotation,
            keep=keep,
            causal=True,
        )
        if num_layers == config.num_hidden_layers:
            hidden = self.final_norm(hidden)
        return hidden.astype(self.dtype)
