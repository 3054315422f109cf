"""CLIP's text and vision towers (arXiv 2103.00020), each an encoder of its own.

HunyuanVideo takes its pooled text from the one, Wan 2.1 and LLaVA image features from the other.
Source of the architecture as released: transformers `CLIPTextModel` and `CLIPVisionModel`.
"""

from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from svg_jax.models.attention import softmax_attention
from svg_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from svg_jax.models.layers import (
    FeedForward,
    gelu,
    layer_norm,
    layers_below,
    quick_gelu,
    scan_layers,
    stack_layers,
)
from svg_jax.models.patches import patchify

_ACTIVATIONS = MappingProxyType({"gelu": gelu, "quick_gelu": quick_gelu})
_LARGEST_ID = 2  # an eos_token_id that stands for the largest of a text's ids


class Attention(nnx.Module):
    """Self-attention."""

    def __init__(
        self,
        config: CLIPTextConfig | CLIPVisionConfig,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        width = config.hidden_size
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, **kinds)
        self.key = nnx.Linear(width, width, **kinds)
        self.value = nnx.Linear(width, width, **kinds)
        self.output = nnx.Linear(width, width, **kinds)

    def __call__(
        self, hidden: Float[Array, "batch tokens width"], *, causal: bool
    ) -> Float[Array, "batch tokens width"]:
        """Attends to all tokens, or to those up to each."""
        by_head = (*hidden.shape[:-1], self.num_heads, -1)
        out = softmax_attention(
            self.query(hidden).reshape(by_head),
            self.key(hidden).reshape(by_head),
            self.value(hidden).reshape(by_head),
            scale=(hidden.shape[-1] // self.num_heads) ** -0.5,
            causal=causal,
        )
        return self.output(out.reshape(hidden.shape))


class Block(nnx.Module):
    """One layer, of either tower."""

    def __init__(
        self,
        config: CLIPTextConfig | CLIPVisionConfig,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        width, eps = config.hidden_size, config.layer_norm_eps
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layer_norm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.attention = Attention(config, **kinds)
        self.feed_forward_norm = layer_norm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.feed_forward = FeedForward(
            width, config.intermediate_size, activation=_ACTIVATIONS[config.hidden_act], **kinds
        )

    def __call__(
        self, hidden: Float[Array, "batch tokens width"], *, causal: bool
    ) -> Float[Array, "batch tokens width"]:
        """Returns the next hidden state, float32 as the one before."""
        out = self.attention(self.attention_norm(hidden), causal=causal)
        hidden = hidden + out.astype(hidden.dtype)
        out = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + out.astype(hidden.dtype)


class CLIPTextEncoder(nnx.Module):
    """Token ids to features of each token and of the whole text.

    The hidden state between layers is float32 whatever `dtype` is: it is small.

    Attributes:
        config: The architecture.
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
        """Makes an encoder with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: The architecture.
            dtype: Of matrix products and the result; norms and softmax are float32 inside.
            param_dtype: Of the parameters.
            rngs: Source of random weights.
        """
        width = config.hidden_size
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            width,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            embedding_init=normal(0.02),
            rngs=rngs,
        )
        shape = (config.max_position_embeddings, width)
        self.positions = nnx.Param(normal(0.01)(rngs.params(), shape, param_dtype))
        self.blocks = stack_layers(
            lambda rngs: Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.final_norm = layer_norm(
            width, config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self, input_ids: Int[Array, "batch tokens"]
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch width"]]:
        """Encodes.

        Args:
            input_ids: Token ids, padding (which tokens before it do not see) behind each text.

        Returns:
            The last hidden state after the final norm, and of it what stands at each text's end, in
            `dtype`.

        Raises:
            ValueError: On more tokens than the model has positions for.
        """
        num_tokens, limit = input_ids.shape[1], self.config.max_position_embeddings
        if num_tokens > limit:
            raise ValueError(f"{num_tokens} tokens exceed the {limit} of this text encoder.")

        def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, None]:
            return block(hidden, causal=True), None

        positions = self.positions[...][None, :num_tokens].astype(jnp.float32)
        hidden = self.token_embedding(input_ids) + positions
        hidden, _ = scan_layers(self.blocks, apply_layer, hidden)
        features = self.final_norm(hidden).astype(self.dtype)

        eos = self.config.eos_token_id
        end = jnp.argmax(input_ids if eos == _LARGEST_ID else input_ids == eos, axis=1)
        return features, jnp.take_along_axis(features, end[:, None, None], axis=1)[:, 0]


class CLIPVisionEncoder(nnx.Module):
    """Images to features of each patch, and before them of the whole.

    The hidden state between layers is float32 whatever `dtype` is: it is small.

    Attributes:
        config: The architecture.
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
        """Makes an encoder with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: The architecture.
            dtype: Of matrix products and the result; norms and softmax are float32 inside.
            param_dtype: Of the parameters.
            rngs: Source of random weights.
        """
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.dtype = dtype
        small = normal(width**-0.5)
        self.class_embedding = nnx.Param(small(rngs.params(), (width,), param_dtype))
        self.patch_projection = nnx.Linear(
            config.num_channels * config.patch_size**2,
            width,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        shape = (1 + config.num_patches, width)
        self.positions = nnx.Param(small(rngs.params(), shape, param_dtype))
        self.input_norm = layer_norm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.blocks = stack_layers(
            lambda rngs: Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.output_norm = layer_norm(width, eps, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        *,
        hidden_state: int = -1,
    ) -> Float[Array, "batch tokens features"]:
        """Encodes.

        Args:
            pixel_values: Images of the model's size, normalised as it was trained.
            hidden_state: Which one to return, counted as in `layers_below`; layers above it are not
                computed.

        Returns:
            That hidden state in `dtype`, without any norm behind the last layer: the token of the
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

        def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, None]:
            return block(hidden, causal=False), None

        patch = (1, config.patch_size, config.patch_size)
        patches = self.patch_projection(patchify(pixel_values[:, :, None], patch))
        whole = jnp.broadcast_to(self.class_embedding[...], (len(patches), 1, config.hidden_size))
        tokens = [x.astype(jnp.float32) for x in (whole, patches)]
        positions = self.positions[...][None].astype(jnp.float32)
        hidden = self.input_norm(jnp.concatenate(tokens, axis=1) + positions)
        hidden, _ = scan_layers(self.blocks, apply_layer, hidden, num_layers=num_layers)
        return hidden.astype(self.dtype)

    def pool(self, hidden: Float[Array, "batch tokens features"]) -> Float[Array, "batch features"]:
        """The features of the whole image, of the last hidden state."""
        return self.output_norm(hidden[:, 0]).astype(self.dtype)
