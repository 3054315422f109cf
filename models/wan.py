"""Wan 2.1 and 2.2, video diffusion transformers (arXiv 2503.20314), in all released variants.

T2V, I2V, FLF2V, the experts of A14B and TI2V-5B differ by their config alone. Text enters by
cross-attention, and so do the images of 2.1. Source of the architecture as released: diffusers
`WanTransformer3DModel`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Float, Int, Real

from svg_jax.models.attention import Attend, cross_attention, dense_attention
from svg_jax.models.embeddings import TimestepEmbedding
from svg_jax.models.inputs import check_channels, check_features, check_shapes
from svg_jax.models.layers import (
    FeedForward,
    Kinds,
    add_gated,
    gelu,
    layer_norm,
    rms_norm,
    scan_layers,
    stack_layers,
)
from svg_jax.models.layout import VideoLayout
from svg_jax.models.patches import patchify, token_grid, unpatchify
from svg_jax.models.rope import Rotation, rotate, video_rotation
from svg_jax.models.wan_config import WanConfig


class Attention(nnx.Module):
    """Self- or cross-attention; the attention function itself is passed in."""

    def __init__(self, config: WanConfig, **kinds: Unpack[Kinds]):
        width = config.width
        norm = partial(rms_norm, width, config.eps, **kinds)
        self.num_heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, **kinds)
        self.key = nnx.Linear(width, width, **kinds)
        self.value = nnx.Linear(width, width, **kinds)
        self.query_norm = norm()
        self.key_norm = norm()
        self.output = nnx.Linear(width, width, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch *tokens width"],
        context: Float[Array, "batch *keys width"],
        rotation: Rotation | None,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "batch *tokens width"], Any]:
        """Return the output for every token of `hidden` and the info of `attend`."""
        query = _by_head(self.query_norm(self.query(hidden)), self.num_heads)
        key = _by_head(self.key_norm(self.key(context)), self.num_heads)
        value = _by_head(self.value(context), self.num_heads)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        out, info = attend(query.astype(value.dtype), key.astype(value.dtype), value)
        return self.output(out.reshape(hidden.shape)), info


class ImageKeys(nnx.Module):
    """Keys and values of image tokens, to which the queries of a cross-attention attend, too."""

    def __init__(self, config: WanConfig, **kinds: Unpack[Kinds]):
        width = config.width
        self.num_heads = config.num_attention_heads
        self.key = nnx.Linear(width, width, **kinds)
        self.value = nnx.Linear(width, width, **kinds)
        self.key_norm = rms_norm(width, config.eps, **kinds)

    def __call__(self, image: Float[Array, "batch keys width"]) -> tuple[Array, Array]:
        """Return key and value by head."""
        value = _by_head(self.value(image), self.num_heads)
        key = _by_head(self.key_norm(self.key(image)), self.num_heads)
        return key.astype(value.dtype), value


class Block(nnx.Module):
    """One layer: self-attention, cross-attention, feed-forward.

    The hidden state has an axis of times, each with the tokens that share it: one time for all
    tokens, one per frame, or one per token.
    """

    def __init__(self, config: WanConfig, **kinds: Unpack[Kinds]):
        width = config.width
        norm = partial(layer_norm, width, config.eps, **kinds | {"param_dtype": jnp.float32})
        self.modulation = _modulation_table(6, width, kinds["rngs"])
        self.self_attention_norm = norm(affine=False)
        self.self_attention = Attention(config, **kinds)
        self.cross_attention_norm = norm()
        self.cross_attention = Attention(config, **kinds)
        if config.image_dim is not None:
            self.image_keys = ImageKeys(config, **kinds)
        self.feed_forward_norm = norm(affine=False)
        self.feed_forward = FeedForward(width, config.ffn_dim, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch times tokens width"],
        conditioning: Float[Array, "batch times 6 width"],
        text: Float[Array, "batch text_tokens width"],
        text_length: Int[Array, " batch"] | None,
        image: Float[Array, "batch image_tokens width"] | None,
        rotation: Rotation,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "batch times tokens width"], Any]:
        """Return the next hidden state and the info of `attend`."""
        modulation = _modulate(self.modulation, conditioning)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        modulated = self.self_attention_norm(hidden) * (1 + scale) + shift
        out, info = self.self_attention(modulated, modulated, rotation, attend)
        hidden = add_gated(hidden, gate, out)

        def attend_context(query: Array, key: Array, value: Array) -> tuple[Array, None]:
            out = cross_attention(query, key, value, key_length=text_length)
            if image is not None:
                out = out + cross_attention(query, *self.image_keys(image))
            return out, None

        normed = self.cross_attention_norm(hidden)
        out, _ = self.cross_attention(normed, text, None, attend_context)
        hidden = hidden + out.astype(hidden.dtype)

        modulated = self.feed_forward_norm(hidden) * (1 + ffn_scale) + ffn_shift
        return add_gated(hidden, ffn_gate, self.feed_forward(modulated)), info


class ImageEmbedding(nnx.Module):
    """Layers that turn an image encoder's features into tokens of the model's width."""

    def __init__(self, image_dim: int, config: WanConfig, **kinds: Unpack[Kinds]):
        norm = partial(layer_norm, epsilon=1e-5, **kinds | {"param_dtype": jnp.float32})
        if config.pos_embed_seq_len is not None:
            shape = (1, config.pos_embed_seq_len, image_dim)
            self.positions = nnx.Param(jnp.zeros(shape, kinds["param_dtype"]))
        self.input_norm = norm(image_dim)
        self.feed_forward = FeedForward(
            image_dim, image_dim, config.width, activation=gelu, **kinds
        )
        self.output_norm = norm(config.width)
        self.dtype = kinds["dtype"]

    def __call__(
        self, image: Float[Array, "batch image_tokens image_dim"]
    ) -> Float[Array, "batch image_tokens width"]:
        """Embed all images of each batch entry."""
        if hasattr(self, "positions"):
            image = image.astype(jnp.float32) + self.positions[...].astype(jnp.float32)
        return self.output_norm(self.feed_forward(self.input_norm(image))).astype(self.dtype)


class WanTransformer(nnx.Module):
    """Predicts the velocity of noisy video latents from text features, images and times.

    The last projection starts at zero, so that an untrained model predicts zeros. As in the
    released model, the time embedding, the modulation tables and the layer norms have float32
    parameters whatever `param_dtype` is.

    Attributes:
        config: Architecture.
        blocks: All layers in one module; every parameter has a leading [layers] axis.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        residual_dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        """Make a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of matrix products and attention; norms, modulation and the time embedding
                are float32.
            param_dtype: Dtype of the parameters, except those that are always float32.
            residual_dtype: Dtype of the hidden state between layers; None is `dtype`.
            rngs: Source of random weights.
        """
        width, kinds = config.width, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        patch = math.prod(config.patch_size)
        self.config = config
        self.dtype = dtype
        self.residual_dtype = dtype if residual_dtype is None else residual_dtype

        in_float32 = Kinds(dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.time_embedding = TimestepEmbedding(config.freq_dim, width, **in_float32)
        self.time_projection = nnx.Linear(width, 6 * width, **kinds)
        self.text_embedding = FeedForward(config.text_dim, width, width, **kinds)
        if config.image_dim is not None:
            self.image_embedding = ImageEmbedding(config.image_dim, config, **kinds)
        self.patch_projection = nnx.Linear(config.in_channels * patch, width, **kinds)
        self.blocks = stack_layers(partial(Block, config), config.num_layers, **kinds)
        self.output_norm = layer_norm(width, config.eps, affine=False, **kinds)
        self.output_modulation = _modulation_table(2, width, rngs)
        self.output_projection = nnx.Linear(
            width, config.out_channels * patch, kernel_init=zeros, **kinds
        )

    def layout(self, num_frames: int, height: int, width: int, text_tokens: int = 0) -> VideoLayout:
        """Describe the token sequence of a video, which has no text in it.

        Args:
            num_frames: Latent frames.
            height: Latent rows.
            width: Latent columns.
            text_tokens: Any number of text tokens: they are not in the sequence.

        Raises:
            ValueError: On sizes that this model cannot take.
        """
        del text_tokens
        return self.config.layout(num_frames, height, width)

    def __call__(
        self,
        hidden_states: Float[Array, "batch in_channels frames height width"],
        encoder_hidden_states: Float[Array, "batch text_tokens text_dim"],
        timestep: Real[Array, "..."],
        *,
        encoder_hidden_states_image: Float[Array, "batch image_tokens image_dim"] | None = None,
        attend: Attend = dense_attention,
        step_state: Any = None,
        text_length: Int[Array, "..."] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch out_channels frames height width"], Any]:
        """Predict the velocity.

        Args:
            hidden_states: Noisy latents; for I2V and FLF2V with an image's mask and latents as
                further channels.
            encoder_hidden_states: Text features, zero where the prompt is padded.
            timestep: Times from 0 to 1000, [batch]; for TI2V also [batch, frames of tokens] or
                [batch, tokens], whose modulation is six times as large as the hidden state.
            encoder_hidden_states_image: Image features (for 2.1 I2V; for FLF2V those of the first
                image, then those of the last); None for all others.
            attend: Self-attention of every layer.
            step_state: State that is passed to `attend` unread.
            text_length: Number of real text tokens of each batch entry [batch], at least one; None
                (as released) if padding counts as text.
            remat: Whether to recompute the layers in the backward pass instead of keeping their
                activations.

        Returns:
            The velocity in `dtype`, and the info of `attend` stacked over layers.

        Raises:
            ValueError: On inputs that this model cannot take.
        """
        config, (batch, _, *size) = self.config, hidden_states.shape
        num_frames, height, width = size
        layout = self.layout(num_frames, height, width)
        image = encoder_hidden_states_image
        _check_inputs(
            config, layout, hidden_states, encoder_hidden_states, timestep, image, text_length
        )

        embedding, conditioning = self._embed_times(timestep, layout)
        text = self.text_embedding(encoder_hidden_states)
        if image is not None:
            image = self.image_embedding(image)
        grid = token_grid(num_frames, height, width, config.patch_size)
        rotation = video_rotation([np.arange(axis) for axis in grid], config.rotary_features)
        video = self.patch_projection(patchify(hidden_states, config.patch_size))
        hidden = video.reshape(*embedding.shape[:2], -1, config.width).astype(self.residual_dtype)

        def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, Any]:
            attend_layer = partial(
                attend, layout=layout, text_length=None, layer=layer, step_state=step_state
            )
            return block(hidden, conditioning, text, text_length, image, rotation, attend_layer)

        hidden, info = scan_layers(self.blocks, apply_layer, hidden, remat=remat)

        shift, scale = _modulate(self.output_modulation, embedding[:, :, None])
        video = self.output_projection(self.output_norm(hidden) * (1 + scale) + shift)
        tokens = video.reshape(batch, layout.num_tokens, -1)
        return unpatchify(tokens, grid, config.patch_size, channels_last=True), info

    def _embed_times(
        self, timestep: Real[Array, "..."], layout: VideoLayout
    ) -> tuple[Float[Array, "batch times width"], Float[Array, "batch times 6 width"]]:
        """Embed each time, for the output and, projected, for every layer's modulation."""
        times = timestep.reshape(len(timestep), -1)

        def embed(times: Array) -> tuple[Array, Array]:
            embedding = self.time_embedding(times)
            conditioning = self.time_projection(jax.nn.silu(embedding))
            return embedding.astype(self.dtype), conditioning

        # A frame at a time if every token has a time: all their embeddings, in float32, would be
        # twice as large as the hidden state.
        of_tokens = times.shape[1] == layout.num_tokens
        rows = times.reshape(-1, layout.tokens_per_frame) if of_tokens else times
        embedding, conditioning = jax.lax.map(embed, rows)
        return embedding.reshape(*times.shape, -1), conditioning.reshape(*times.shape, 6, -1)


def _by_head(x: Array, num_heads: int) -> Array:
    return x.reshape(len(x), -1, num_heads, x.shape[-1] // num_heads)


def _modulation_table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(normal(width**-0.5)(rngs.params(), (1, rows, width), jnp.float32))


def _modulate(
    table: Float[Array, "1 rows width"] | nnx.Param,
    conditioning: Float[Array, "batch times one_or_rows width"],
) -> list[Float[Array, "batch times 1 width"]]:
    """Add the conditioning, or its row, to each row of the table, in float32."""
    rows = jnp.split(table[...].astype(jnp.float32), table.shape[1], axis=1)
    parts = jnp.split(conditioning, conditioning.shape[2], axis=2)
    # Split before the sum: what is left in the program is one sum in each place that needs one.
    parts = parts * (len(rows) // len(parts))
    return [row[None] + part.astype(jnp.float32) for row, part in zip(rows, parts, strict=True)]


def _check_inputs(
    config: WanConfig,
    layout: VideoLayout,
    hidden_states: Array,
    encoder_hidden_states: Array,
    timestep: Array,
    image: Array | None,
    text_length: Array | None,
) -> None:
    batch = len(hidden_states)
    check_channels("hidden_states", hidden_states, config.in_channels)
    check_features("encoder_hidden_states", encoder_hidden_states, config.text_dim, "text encoder")
    check_shapes({"text_length": (text_length, (batch,))})
    allowed = [(batch,), (batch, layout.num_frames), (batch, layout.num_tokens)]
    if timestep.shape not in allowed:
        raise ValueError(
            f"timestep is {list(timestep.shape)} and must be {list(allowed[0])} or, by frame or "
            f"by token, {list(allowed[1])} or {list(allowed[2])}."
        )
    if (image is None) != (config.image_dim is None):
        raise ValueError(
            "this model takes no encoder_hidden_states_image."
            if config.image_dim is None
            else "this model needs encoder_hidden_states_image: it was trained with images."
        )
    if image is None or config.image_dim is None:
        return
    check_features("encoder_hidden_states_image", image, config.image_dim, "image encoder")
    if config.pos_embed_seq_len not in (None, image.shape[1]):
        raise ValueError(
            f"encoder_hidden_states_image has {image.shape[1]} tokens and the model takes "
            f"{config.pos_embed_seq_len}, those of the first and the last frame together."
        )
