"""The layers of HunyuanVideo: text refiner, double-stream and single-stream blocks.

Blocks of both kinds take one sequence, the video and then its text, and a conditioning with one row
per batch entry or two: of two, the first row is for the tokens of the first frame.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import zeros
from jaxtyping import Array, Float, Int, Real

from svg_jax.models.attention import cross_attention
from svg_jax.models.embeddings import TimestepEmbedding
from svg_jax.models.hunyuan_video_config import HunyuanVideoConfig
from svg_jax.models.layers import (
    FeedForward,
    Kinds,
    add_gated,
    gelu_tanh,
    layer_norm,
    rms_norm,
    scan_layers,
    silu,
    stack_layers,
)
from svg_jax.models.layout import VideoLayout
from svg_jax.models.rope import Rotation, rotate

_EPSILON = 1e-6
_SINUSOIDS = 256


class Conditioning(nnx.Module):
    """One vector for a time, a text as a whole and perhaps a guidance scale; always in float32."""

    def __init__(self, text_features: int, width: int, *, guided: bool, **kinds: Unpack[Kinds]):
        kinds["dtype"] = jnp.float32
        self.time_embedding = TimestepEmbedding(_SINUSOIDS, width, **kinds)
        self.text_embedding = FeedForward(text_features, width, width, activation=silu, **kinds)
        if guided:
            self.guidance_embedding = TimestepEmbedding(_SINUSOIDS, width, **kinds)

    def __call__(
        self,
        times: Real[Array, " batch"],
        text: Float[Array, "batch text_features"],
        guidance: Real[Array, " batch"] | None = None,
    ) -> Float[Array, "batch width"]:
        """Sum the embeddings; without a guidance scale, there is none of it."""
        embedding = self.time_embedding(times) + self.text_embedding(text)
        return embedding if guidance is None else embedding + self.guidance_embedding(guidance)


class HeadProjections(nnx.Module):
    """Queries, keys and values of every head."""

    def __init__(self, config: HunyuanVideoConfig, *, qk_norm: bool = True, **kinds: Unpack[Kinds]):
        width = config.width
        norm = partial(rms_norm, config.attention_head_dim, _EPSILON, **kinds)
        self.num_heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, **kinds)
        self.key = nnx.Linear(width, width, **kinds)
        self.value = nnx.Linear(width, width, **kinds)
        if qk_norm:
            self.query_norm = norm()
            self.key_norm = norm()

    def __call__(
        self, hidden: Float[Array, "batch tokens width"], rotation: Rotation | None = None
    ) -> tuple[Array, Array, Array]:
        """Return query, key and value [batch, tokens, heads, head_dim] for attention."""
        by_head = (*hidden.shape[:-1], self.num_heads, -1)
        query = self.query(hidden).reshape(by_head)
        key = self.key(hidden).reshape(by_head)
        value = self.value(hidden).reshape(by_head)
        if hasattr(self, "query_norm"):
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query.astype(value.dtype), key.astype(value.dtype), value


class RefinerBlock(nnx.Module):
    """One layer of the text's refiner: self-attention and feed-forward, gated by conditioning."""

    def __init__(self, config: HunyuanVideoConfig, **kinds: Unpack[Kinds]):
        width = config.width
        norm = partial(layer_norm, width, _EPSILON, **kinds)
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=zeros, **kinds)
        self.attention_norm = norm()
        self.heads = HeadProjections(config, qk_norm=False, **kinds)
        self.output = nnx.Linear(width, width, **kinds)
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(width, 4 * width, activation=silu, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch text_tokens width"],
        conditioning: Float[Array, "batch 1 width"],
        text_length: Int[Array, " batch"] | None,
    ) -> Float[Array, "batch text_tokens width"]:
        """Return the next hidden state."""
        modulation = self.modulation(conditioning).astype(jnp.float32)
        gate, ffn_gate = jnp.split(modulation, 2, axis=-1)
        out = cross_attention(*self.heads(self.attention_norm(hidden)), key_length=text_length)
        hidden = add_gated(hidden, gate, self.output(out.reshape(hidden.shape)))
        return add_gated(hidden, ffn_gate, self.feed_forward(self.feed_forward_norm(hidden)))


class TokenRefiner(nnx.Module):
    """A transformer of its own that turns the text encoder's features into tokens of the model."""

    def __init__(self, config: HunyuanVideoConfig, **kinds: Unpack[Kinds]):
        width, features = config.width, config.text_embed_dim
        self.conditioning = Conditioning(features, width, guided=False, **kinds)
        self.projection = nnx.Linear(features, width, **kinds)
        self.blocks = stack_layers(
            partial(RefinerBlock, config), config.num_refiner_layers, **kinds
        )

    def __call__(
        self,
        text: Float[Array, "batch text_tokens text_embed_dim"],
        times: Real[Array, " batch"],
        text_length: Int[Array, " batch"] | None,
    ) -> Float[Array, "batch text_tokens width"]:
        """Refine the text at a time; rows behind `text_length` mean nothing."""
        is_real = None
        if text_length is not None:
            is_real = jnp.arange(text.shape[1])[None, :, None] < text_length[:, None, None]
        pooled = jnp.mean(text.astype(jnp.float32), axis=1, where=is_real)
        conditioning = silu(self.conditioning(times, pooled))[:, None]

        def apply_layer(block: RefinerBlock, hidden: Array, layer: Array) -> tuple[Array, None]:
            del layer
            return block(hidden, conditioning, text_length), None

        hidden, _ = scan_layers(self.blocks, apply_layer, self.projection(text))
        return hidden


class Stream(nnx.Module):
    """The weights that video or text has of its own in a double-stream layer."""

    def __init__(self, config: HunyuanVideoConfig, **kinds: Unpack[Kinds]):
        width = config.width
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=zeros, **kinds)
        self.heads = HeadProjections(config, **kinds)
        self.output = nnx.Linear(width, width, **kinds)
        self.feed_forward = FeedForward(width, config.mlp_width, **kinds)


class DoubleBlock(nnx.Module):
    """One double-stream layer: video and text meet only in the attention."""

    def __init__(self, config: HunyuanVideoConfig, **kinds: Unpack[Kinds]):
        self.dtype = kinds["dtype"]
        self.norm = plain_norm(config, **kinds)
        self.video = Stream(config, **kinds)
        self.text = Stream(config, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens width"],
        conditioning: Float[Array, "batch spans width"],
        rotation: Rotation,
        layout: VideoLayout,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "batch tokens width"], Any]:
        """Return the next hidden state and the info of `attend`."""
        video, text = self.video, self.text
        rows = [video.modulation(conditioning), text.modulation(conditioning[:, -1:])]
        spans = [*_video_spans(conditioning, layout), layout.text_tokens]
        parts = _per_token(jnp.concatenate(rows, axis=1), spans, 6)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts

        x = modulate(self.norm, hidden, shift, scale, self.dtype)
        of_video, of_text = video.heads(x, rotation), text.heads(x[:, layout.text_start :])
        out, info = attend(*map(_with_text, of_video, of_text))
        out = out.reshape(hidden.shape)
        of_text = text.output(out[:, layout.text_start :])
        hidden = add_gated(hidden, gate, _with_text(video.output(out), of_text))

        x = modulate(self.norm, hidden, ffn_shift, ffn_scale, self.dtype)
        of_text = text.feed_forward(x[:, layout.text_start :])
        return add_gated(hidden, ffn_gate, _with_text(video.feed_forward(x), of_text)), info


class SingleBlock(nnx.Module):
    """One single-stream layer: attention and feed-forward side by side, one output for both."""

    def __init__(self, config: HunyuanVideoConfig, **kinds: Unpack[Kinds]):
        width = config.width
        self.dtype = kinds["dtype"]
        self.norm = plain_norm(config, **kinds)
        self.modulation = nnx.Linear(width, 3 * width, kernel_init=zeros, **kinds)
        self.heads = HeadProjections(config, **kinds)
        self.feed_forward = nnx.Linear(width, config.mlp_width, **kinds)
        self.output = nnx.Linear(width + config.mlp_width, width, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens width"],
        conditioning: Float[Array, "batch spans width"],
        rotation: Rotation,
        layout: VideoLayout,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "batch tokens width"], Any]:
        """Return the next hidden state and the info of `attend`."""
        *spans, last = _video_spans(conditioning, layout)
        spans.append(last + layout.text_tokens)
        shift, scale, gate = _per_token(self.modulation(conditioning), spans, 3)
        x = modulate(self.norm, hidden, shift, scale, self.dtype)
        out, info = attend(*self.heads(x, rotation))
        feed_forward = gelu_tanh(self.feed_forward(x))
        out = _linear_of_parts(self.output, out.reshape(hidden.shape).astype(x.dtype), feed_forward)
        return add_gated(hidden, gate, out), info


def plain_norm(config: HunyuanVideoConfig, **kinds: Unpack[Kinds]) -> nnx.LayerNorm:
    """Make a layer norm without parameters."""
    return layer_norm(config.width, _EPSILON, affine=False, **kinds)


def modulate(
    norm: nnx.LayerNorm,
    hidden: Float[Array, "batch tokens width"],
    shift: Float[Array, "batch tokens_or_1 width"],
    scale: Float[Array, "batch tokens_or_1 width"],
    dtype: Dtype,
) -> Float[Array, "batch tokens width"]:
    """Normalise, scale and shift a hidden state in float32, and convert it to `dtype`."""
    return (norm(hidden) * (1 + scale) + shift).astype(dtype)


def _video_spans(conditioning: Array, layout: VideoLayout) -> list[int]:
    """Count the video's tokens that each row of the conditioning is for."""
    if conditioning.shape[1] == 1:
        return [layout.video_tokens]
    return [layout.tokens_per_frame, layout.video_tokens - layout.tokens_per_frame]


def _per_token(
    modulation: Float[Array, "batch spans features"], spans: Sequence[int], parts: int
) -> list[Float[Array, "batch tokens_or_1 width"]]:
    """Split a modulation into its parts for every token, float32.

    Args:
        modulation: Modulation, with a row for each span of tokens, in order.
        spans: Number of tokens in each span.
        parts: Number of parts.
    """
    token = jnp.arange(sum(spans))[None, :, None]
    ends = np.cumsum(spans[:-1])
    spread = []
    for part in jnp.split(modulation.astype(jnp.float32), parts, axis=-1):
        *rows, rest = jnp.split(part, len(spans), axis=1)
        for row, end in reversed(list(zip(rows, ends, strict=True))):
            rest = jnp.where(token < end, row, rest)
        spread.append(rest)
    return spread


def _linear_of_parts(
    linear: nnx.Linear, *parts: Float[Array, "batch tokens _"]
) -> Float[Array, "batch tokens out_features"]:
    """Apply a layer to the concatenation of the parts' features, with a float32 result."""
    # The parts are not joined: that array would be five times as large as a hidden state.
    kernels = jnp.split(linear.kernel[...], np.cumsum([x.shape[-1] for x in parts[:-1]]))
    products = (x @ kernel.astype(x.dtype) for x, kernel in zip(parts, kernels, strict=True))
    total = sum(product.astype(jnp.float32) for product in products)
    bias: Any = linear.bias
    return total + bias[...].astype(jnp.float32)[None, None, :]


def _with_text(of_all: Array, of_text: Array) -> Array:
    """Replace the last rows of one array, the text's, by those of the other."""
    # The video's weights are applied to all rows, and the few of the text are overwritten: taking
    # the video's rows out of the sequence and putting them back would copy them each time.
    start = of_all.shape[1] - of_text.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(of_all, of_text, start, axis=1)
