"""CLIP's text and vision towers (arXiv 2103.00020), each an encoder of its own.

HunyuanVideo takes its pooled text from the one, Wan 2.1 and LLaVA image features from the other.
Source of the architecture as released: transformers `CLIPTextModel` and `CLIPVisionModel`.
"""

from functools import partial
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from svg_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from svg_jax.models.encoder_layers import Attention, Block, apply_blocks, embedding
from svg_jax.models.layers import (
    FeedForward,
    Kinds,
    gelu,
    layer_norm,
    layers_below,
    quick_gelu,
    stack_layers,
)
from svg_jax.models.patches import patchify

_LARGEST_ID = 2  # as eos_token_id it means the largest of a text's ids


class CLIPBlock(Block):
    """One layer of either tower."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, **kinds: Unpack[Kinds]):
        width, eps, heads = config.hidden_size, config.layer_norm_eps, config.num_attention_heads
        activation = {"gelu": gelu, "quick_gelu": quick_gelu}[config.hidden_act]
        self.attention_norm = layer_norm(width, eps, **kinds)
        self.attention = Attention(width, heads, width // heads, use_bias=True, **kinds)
        self.feed_forward_norm = layer_norm(width, eps, **kinds)
        self.feed_forward = FeedForward(
            width, config.intermediate_size, activation=activation, **kinds
        )


class CLIPTextEncoder(nnx.Module):
    """Token ids to features of each token and of the whole text.

    Attributes:
        config: Architecture.
        blocks: All layers in one module; every parameter has a leading [layers] axis.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
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
        shape = (config.max_position_embeddings, width)
        self.positions = nnx.Param(normal(0.01)(rngs.params(), shape, param_dtype))
        self.blocks = stack_layers(partial(CLIPBlock, config), config.num_hidden_layers, **kinds)
        self.final_norm = layer_norm(width, config.layer_norm_eps, **kinds)

    def __call__(
        self, input_ids: Int[Array, "batch tokens"]
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch width"]]:
        """Encode.

        Args:
            input_ids: Token ids, padding behind each text; a text's tokens do not attend to it.

        Returns:
            The last hidden state after the final norm, and its features at the end of each text,
            both in `dtype`.

        Raises:
            ValueError: On more tokens than the model has positions for.
        """
        num_tokens, limit = input_ids.shape[1], self.config.max_position_embeddings
        if num_tokens > limit:
            raise ValueError(f"{num_tokens} tokens exceed the {limit} of this text encoder.")
        positions = self.positions[...][None, :num_tokens].astype(jnp.float32)
        hidden = self.token_embedding(input_ids) + positions
        hidden = apply_blocks(self.blocks, hidden, causal=True)
        features = self.final_norm(hidden).astype(self.dtype)
        eos = self.config.eos_token_id
        end = jnp.argmax(input_ids if eos == _LARGEST_ID else input_ids == eos, axis=1)
        return features, jnp.take_along_axis(features, end[:, None, None], axis=1)[:, 0]


class CLIPVisionEncoder(nnx.Module):
    """Images to features of the whole image and of each patch.

    Attributes:
        config: Architecture.
        blocks: All layers in one module; every parameter has a leading [layers] axis.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
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
        width, eps = config.hidden_size, config.layer_norm_eps
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        small = normal(width**-0.5)
        self.class_embedding = nnx.Param(small(rngs.params(), (width,), param_dtype))
        patch = config.num_channels * config.patch_size**2
        self.patch_projection = nnx.Linear(patch, width, use_bias=False, **kinds)
        shape = (1 + config.num_patches, width)
        self.positions = nnx.Param(small(rngs.params(), shape, param_dtype))
        self.input_norm = layer_norm(width, eps, **kinds)
        self.blocks = stack_layers(partial(CLIPBlock, config), config.num_hidden_layers, **kinds)
        self.output_norm = layer_norm(width, eps, **kinds)

    def __call__(
        self, pixel_values: Float[Array, "batch channels height width"], *, hidden_state: int = -1
    ) -> Float[Array, "batch tokens features"]:
        """Encode.

        Args:
            pixel_values: Images of the model's size, normalised as it was trained.
            hidden_state: Number of the hidden state to return, counted as in `layers_below`; layers
                above it are not computed.

        Returns:
            That hidden state in `dtype`, without a norm after the last layer: the token of the
            whole image, then its patches row by row.

        Raises:
            ValueError: On images of another size, or if there is no such hidden state.
        """
        config = self.config
        size = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.shape[1:] != size:
            raise ValueError(
                f"pixel_values are {list(pixel_values.shape[1:])} and this image encoder takes "
                f"{list(size)} (channels, rows, columns)."
            )
        num_layers = layers_below(hidden_state, config.num_hidden_layers)
        patch = (1, config.patch_size, config.patch_size)
        patches = self.patch_projection(patchify(pixel_values[:, :, None], patch))
        whole = jnp.broadcast_to(self.class_embedding[...], (len(patches), 1, config.hidden_size))
        tokens = [x.astype(jnp.float32) for x in (whole, patches)]
        positions = self.positions[...][None].astype(jnp.float32)
        hidden = self.input_norm(jnp.concatenate(tokens, axis=1) + positions)
        return apply_blocks(self.blocks, hidden, num_layers).astype(self.dtype)

    def pool(self, hidden: Float[Array, "batch tokens features"]) -> Float[Array, "batch features"]:
        """Take the features of the whole image from the last hidden state."""
        return self.output_norm(hidden[:, 0]).astype(self.dtype)
