"""The encoders of T5 v1.1 (arXiv 1910.10683; v1.1: arXiv 2002.05202) and UMT5 (arXiv 2304.09151).

They are the text encoders of CogVideoX and of Wan. UMT5 differs by a distance bias in every layer,
where T5's layers share one. Source of the architectures as released: transformers `T5EncoderModel`
and `UMT5EncoderModel`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Int

from svg_jax.models.attention import softmax_attention
from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.layers import (
    GatedFeedForward,
    gelu_tanh,
    rms_norm,
    scan_layers,
    stack_layers,
)


@dataclass(frozen=True)
class T5Config(ModelConfig):
    """What the encoder needs of a released config.json; transformers' names, XXL's sizes.

    Attributes:
        vocab_size: Rows of the token embedding.
        d_model: Features of a token.
        d_kv: Features of a head.
        d_ff: Features inside the feed-forward layer.
        num_layers: Layers.
        num_heads: Heads; times d_kv this need not be d_model.
        relative_attention_num_buckets: Buckets of the distance from query to key.
        relative_attention_max_distance: From this distance on, all fall into one bucket.
        layer_norm_epsilon: Epsilon of the norms.
        feed_forward_proj: "gated-gelu" (which transformers takes in its tanh approximation).
        model_type: "t5", or "umt5" for a distance bias in every layer.
    """

    # Training, the decoder, generation, how the file was made.
    other_keys: ClassVar = (
        *("dropout_rate", "eos_token_id", "is_decoder", "is_encoder_decoder", "is_gated_act"),
        *("n_positions", "num_decoder_layers", "output_past", "scalable_attention"),
        "scale_decoder_outputs",
    )
    fixed_keys: ClassVar = MappingProxyType({"dense_act_fn": "gelu_new"})

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = implemented("gated-gelu")
    model_type: str = implemented("t5", "umt5")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                "relative_attention_num_buckets must be a multiple of 4, not "
                f"{self.relative_attention_num_buckets}."
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance={self.relative_attention_max_distance} must be "
                f"more than a quarter of the {self.relative_attention_num_buckets} buckets."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, model_type: str | None = None) -> "T5Config":
        """Read a parsed config.json.

        Args:
            values: Parsed file.
            model_type: Type that the model is known to have, whether or not the file names it; None
                takes the file's.

        Raises:
            ValueError: On anything unknown or not implemented, or another type.
        """
        if model_type is not None:
            named = values.get("model_type", model_type)
            if named != model_type:
                raise ValueError(f"T5Config: model_type={named!r} and must be {model_type!r}.")
            values = {**values, "model_type": model_type}
        return super().from_dict(values)


class Attention(nnx.Module):
    """Self-attention with a bias for each distance; scores are not scaled."""

    def __init__(self, config: T5Config, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        model, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        # Queries start small by 1 / sqrt(d_kv) because their scores are not scaled by it.
        small = normal((model * config.d_kv) ** -0.5)
        self.query = linear(model, inner, kernel_init=small)
        self.key = linear(model, inner)
        self.value = linear(model, inner)
        self.output = linear(inner, model)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens d_model"],
        bias: Float[Array, "1 heads tokens tokens"],
        keep: Bool[Array, "batch tokens"] | None,
    ) -> Float[Array, "batch tokens d_model"]:
        """Attends to the tokens to keep; None keeps all."""
        by_head = (*hidden.shape[:-1], self.num_heads, -1)
        out = softmax_attention(
            self.query(hidden).reshape(by_head),
            self.key(hidden).reshape(by_head),
            self.value(hidden).reshape(by_head),
            scale=1.0,
            bias=bias,
            keep=keep,
        )
        return self.output(out.reshape(*hidden.shape[:-1], -1))


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: T5Config, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = partial(rms_norm, config.d_model, config.layer_norm_epsilon, param_dtype=param_dtype)
        self.attention_norm = norm(rngs=rngs)
        self.attention = Attention(config, **kinds)
        if config.model_type == "umt5":
            self.relative_bias = _bias_table(config, param_dtype, rngs)
        self.feed_forward_norm = norm(rngs=rngs)
        # The released model has its last weight in float32 where the others are float16.
        in_float16 = jnp.dtype(param_dtype) == jnp.float16
        self.feed_forward = GatedFeedForward(
            config.d_model,
            config.d_ff,
            activation=gelu_tanh,
            output_param_dtype=jnp.float32 if in_float16 else None,
            **kinds,
        )

    def __call__(
        self,
        hidden: Float[Array, "batch tokens d_model"],
        bias: Float[Array, "1 heads tokens tokens"],
        keep: Bool[Array, "batch tokens"] | None,
    ) -> Float[Array, "batch tokens d_model"]:
        """Returns the next hidden state, float32 as the one before."""
        out = self.attention(self.attention_norm(hidden), bias, keep)
        hidden = hidden + out.astype(hidden.dtype)
        out = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + out.astype(hidden.dtype)


class T5Encoder(nnx.Module):
    """Token ids to features.

    The hidden state between layers is float32 whatever `dtype` is: it is small, and grows large.

    Attributes:
        config: The architecture.
        blocks: All layers in one module; every parameter has a leading [layers] axis.
    """

    def __init__(
        self,
        config: T5Config,
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

        Raises:
            ValueError: If dtype is float16, in which the released encoder overflows.
        """
        if jnp.dtype(dtype) == jnp.float16:
            raise ValueError("T5 overflows in float16: choose bfloat16 or float32 as dtype.")
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.d_model,
            dtype=jnp.float32,
            embedding_init=normal(1.0),
            **kinds,
        )
        if config.model_type == "t5":
            self.relative_bias = _bias_table(config, param_dtype, rngs)
        self.blocks = stack_layers(
            lambda rngs: Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_layers,
            rngs,
        )
        self.final_norm = rms_norm(config.d_model, config.layer_norm_epsilon, **kinds)

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Bool[Array, "batch tokens"] | Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens d_model"]:
        """Encodes.

        Args:
            input_ids: Token ids.
            attention_mask: True or 1 at the tokens that count as keys (as Wan was trained); None if
                all do, padding too (as CogVideoX was).

        Returns:
            The last hidden state after the final norm, in `dtype`.
        """
        buckets = distance_buckets(
            input_ids.shape[1],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        keep = None if attention_mask is None else attention_mask.astype(bool)

        def bias_of(table: nnx.Embed) -> Array:
            return table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]

        shared = bias_of(self.relative_bias) if self.config.model_type == "t5" else None

        def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, None]:
            bias = bias_of(block.relative_bias) if shared is None else shared
            return block(hidden, bias, keep), None

        hidden = self.token_embedding(input_ids)
        hidden, _ = scan_layers(self.blocks, apply_layer, hidden)
        return self.final_norm(hidden).astype(self.dtype)


def _bias_table(config: T5Config, param_dtype: Dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """A bias for each head and bucket of distances."""
    return nnx.Embed(
        config.relative_attention_num_buckets,
        config.num_heads,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        embedding_init=normal(config.d_model**-0.5),
        rngs=rngs,
    )


def distance_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of the distance from each query to each key, int32 [tokens, tokens].

    Half of the buckets are for keys behind the query. Of each half, half are for single distances
    and the others grow geometrically up to `max_distance`.
    """
    position = np.arange(num_tokens)
    distance = position[None, :] - position[:, None]
    side = num_buckets // 2
    single = side // 2
    # In float32 as the reference, whose rounding decides at the edges of the buckets.
    ratio = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(single)
    steps = np.log(ratio) / np.float32(math.log(max_distance / single)) * np.float32(side - single)
    wide = np.minimum(single + steps.astype(np.int32), side - 1)
    bucket = np.where(np.abs(distance) < single, np.abs(distance), wide)
    return (bucket + side * (distance > 0)).astype(np.int32)
