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
from typing import Any, ClassVar, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Int

from svg_jax.models.config import ModelConfig, implemented
from svg_jax.models.encoder_layers import Attention, Block, embedding
from svg_jax.models.layers import (
    GatedFeedForward,
    Kinds,
    gelu_tanh,
    rms_norm,
    scan_layers,
    stack_layers,
)


@dataclass(frozen=True)
class T5Config(ModelConfig):
    """The encoder's part of a released config.json; transformers' names, XXL's sizes.

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


class T5Block(Block):
    """One layer; its scores are not scaled."""

    def __init__(self, config: T5Config, **kinds: Unpack[Kinds]):
        width, eps = config.d_model, config.layer_norm_epsilon
        self.attention_norm = rms_norm(width, eps, **kinds)
        # Queries start small by 1 / sqrt(d_kv) because their scores are not scaled by it.
        self.attention = Attention(
            width,
            config.num_heads,
            config.d_kv,
            use_bias=False,
            query_init=normal((width * config.d_kv) ** -0.5),
            **kinds,
        )
        if config.model_type == "umt5":
            self.relative_bias = _bias_table(config, **kinds)
        self.feed_forward_norm = rms_norm(width, eps, **kinds)
        # The released model has its last weight in float32 where the others are float16.
        in_float16 = jnp.dtype(kinds["param_dtype"]) == jnp.float16
        self.feed_forward = GatedFeedForward(
            width,
            config.d_ff,
            activation=gelu_tanh,
            output_param_dtype=jnp.float32 if in_float16 else None,
            **kinds,
        )


class T5Encoder(nnx.Module):
    """Token ids to features.

    The hidden state between layers is float32 whatever `dtype` is: its values grow large.

    Attributes:
        config: Architecture.
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
        """Make an encoder with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of matrix products and the result; norms and softmax are always float32.
            param_dtype: Dtype of the parameters.
            rngs: Source of random weights.

        Raises:
            ValueError: If dtype is float16, in which the released encoder overflows.
        """
        if jnp.dtype(dtype) == jnp.float16:
            raise ValueError("T5 overflows in float16: choose bfloat16 or float32 as dtype.")
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.token_embedding = embedding(config.vocab_size, config.d_model, 1.0, **kinds)
        if config.model_type == "t5":
            self.relative_bias = _bias_table(config, **kinds)
        self.blocks = stack_layers(partial(T5Block, config), config.num_layers, **kinds)
        self.final_norm = rms_norm(config.d_model, config.layer_norm_epsilon, **kinds)

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        attention_mask: Bool[Array, "batch tokens"] | Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens d_model"]:
        """Encode.

        Args:
            input_ids: Token ids.
            attention_mask: True or 1 at the tokens that can be attended to (as Wan was trained);
                None for all, padding included (as CogVideoX was).

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

        def apply_layer(block: T5Block, hidden: Array, layer: Array) -> tuple[Array, None]:
            bias = bias_of(block.relative_bias) if shared is None else shared
            return block(hidden, scale=1.0, bias=bias, keep=keep), None

        hidden = self.token_embedding(input_ids)
        hidden, _ = scan_layers(self.blocks, apply_layer, hidden)
        return self.final_norm(hidden).astype(self.dtype)


def _bias_table(config: T5Config, **kinds: Unpack[Kinds]) -> nnx.Embed:
    """Make a table with a bias for each head and bucket of distances."""
    buckets = config.relative_attention_num_buckets
    return embedding(buckets, config.num_heads, config.d_model**-0.5, **kinds)


def distance_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Compute the bucket of the distance from each query to each key, int32 [tokens, tokens].

    Half of the buckets are for keys behind the query. In each half, half of the buckets hold one
    distance each and the others grow geometrically up to `max_distance`.
    """
    position = np.arange(num_tokens)
    distance = position[None, :] - position[:, None]
    side = num_buckets // 2
    single = side // 2
    # In float32 like the reference, because rounding decides at the edges of the buckets.
    ratio = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(single)
    steps = np.log(ratio) / np.float32(math.log(max_distance / single)) * np.float32(side - single)
    wide = np.minimum(single + steps.astype(np.int32), side - 1)
    bucket = np.where(np.abs(distance) < single, np.abs(distance), wide)
    return (bucket + side * (distance > 0)).astype(np.int32)
