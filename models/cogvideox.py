"""CogVideoX, a video diffusion transformer (arXiv 2408.06072), in all its released variants.

2b, 5b, 5b-I2V, 1.5-5b and 1.5-5b-I2V differ by their config alone. Source of the architecture as
released: diffusers `CogVideoXTransformer3DModel` and the rotary grids of its pipelines.
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
from jax.nn.initializers import zeros
from jaxtyping import Array, Bool, Float, Int, Real

from svg_jax.models.attention import Attend, dense_attention
from svg_jax.models.cogvideox_config import CogVideoXConfig
from svg_jax.models.embeddings import TimestepEmbedding, sincos_video_embedding
from svg_jax.models.inputs import check_channels, check_features
from svg_jax.models.layers import (
    FeedForward,
    Kinds,
    add_gated,
    layer_norm,
    scan_layers,
    stack_layers,
)
from svg_jax.models.layout import VideoLayout
from svg_jax.models.patches import patchify, token_grid, unpatchify
from svg_jax.models.rope import Rotation, cropped_grid, rotate, video_rotation


class Attention(nnx.Module):
    """Self-attention over text and video; the attention function itself is passed in."""

    def __init__(self, config: CogVideoXConfig, **kinds: Unpack[Kinds]):
        width = config.width
        norm = partial(layer_norm, config.attention_head_dim, 1e-6, **kinds)
        self.num_heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, **kinds)
        self.key = nnx.Linear(width, width, **kinds)
        self.value = nnx.Linear(width, width, **kinds)
        self.query_norm = norm()
        self.key_norm = norm()
        self.output = nnx.Linear(width, width, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens width"],
        rotation: Rotation | None,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "batch tokens width"], Any]:
        """Return the layer's output and the info of `attend`."""
        by_head = (*hidden.shape[:-1], self.num_heads, -1)
        query, key, value = (
            project(hidden).reshape(by_head) for project in (self.query, self.key, self.value)
        )
        # Back to the narrow dtype before the rotation, or the program would store them in float32.
        query = self.query_norm(query).astype(value.dtype)
        key = self.key_norm(key).astype(value.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        out, info = attend(query, key, value)
        return self.output(out.reshape(hidden.shape)), info


class Block(nnx.Module):
    """One layer. Text and video share all weights except the modulation by time."""

    def __init__(self, config: CogVideoXConfig, **kinds: Unpack[Kinds]):
        width = config.width
        norm = partial(layer_norm, width, config.norm_eps, **kinds)
        modulation = partial(
            nnx.Linear, config.time_embed_dim, 6 * width, kernel_init=zeros, **kinds
        )
        self.attention_modulation = modulation()
        self.attention_norm = norm()
        self.attention = Attention(config, **kinds)
        self.feed_forward_modulation = modulation()
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(width, 4 * width, **kinds)

    def __call__(
        self,
        hidden: Float[Array, "batch tokens width"],
        conditioning: Float[Array, "batch time_embed_dim"],
        is_text: Bool[Array, " tokens"],
        rotation: Rotation | None,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Float[Array, "batch tokens width"], Any]:
        """Return the next hidden state and the info of `attend`."""
        shift, scale, gate = _per_token(self.attention_modulation(conditioning), is_text)
        modulated = self.attention_norm(hidden) * (1 + scale) + shift
        out, info = self.attention(modulated, rotation, attend)
        hidden = add_gated(hidden, gate, out)

        shift, scale, gate = _per_token(self.feed_forward_modulation(conditioning), is_text)
        modulated = self.feed_forward_norm(hidden) * (1 + scale) + shift
        return add_gated(hidden, gate, self.feed_forward(modulated)), info


def _per_token(
    modulation: Float[Array, "batch six_widths"], is_text: Bool[Array, " tokens"]
) -> list[Float[Array, "batch tokens width"]]:
    """Return shift, scale and gate of every token, float32.

    Args:
        modulation: Shift, scale and gate for the video, then those for the text.
        is_text: Whether each token is text.
    """
    video, text = jnp.split(modulation.astype(jnp.float32)[:, None, :], 2, axis=-1)
    return jnp.split(jnp.where(is_text[None, :, None], text, video), 3, axis=-1)


class CogVideoXTransformer(nnx.Module):
    """Predicts velocities of noisy video latents from text features and a time.

    Modulations and the last projection start at zero, so that an untrained model predicts zeros.

    Attributes:
        config: Architecture.
        blocks: All layers in one module; every parameter has a leading [layers] axis.
    """

    def __init__(
        self,
        config: CogVideoXConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        residual_dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        """Make a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of matrix products and attention; norms and modulation are float32.
            param_dtype: Dtype of the parameters.
            residual_dtype: Dtype of the hidden state between layers; None is `dtype`.
            rngs: Source of random weights.
        """
        width, kinds = config.width, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = partial(layer_norm, width, config.norm_eps, **kinds)
        patch = math.prod(config.patch_shape)
        self.config = config
        self.dtype = dtype
        self.residual_dtype = dtype if residual_dtype is None else residual_dtype

        self.time_embedding = TimestepEmbedding(width, config.time_embed_dim, **kinds)
        if config.ofs_embed_dim is not None:
            ofs = config.ofs_embed_dim
            self.ofs_embedding = TimestepEmbedding(ofs, ofs, **kinds)
        self.patch_projection = nnx.Linear(config.in_channels * patch, width, **kinds)
        self.text_projection = nnx.Linear(config.text_embed_dim, width, **kinds)
        if config.use_learned_positional_embeddings:
            text = jnp.zeros((config.max_text_seq_length, width))
            table = jnp.concatenate([text, self._sincos_embedding(*config.sample_grid)])
            self.position_embedding = nnx.Param(table[None].astype(param_dtype))
        self.blocks = stack_layers(partial(Block, config), config.num_layers, **kinds)
        last = partial(nnx.Linear, kernel_init=zeros, **kinds)
        self.final_norm = norm()
        self.output_modulation = last(config.time_embed_dim, 2 * width)
        self.output_norm = norm()
        self.output_projection = last(width, config.out_channels * patch)

    def layout(self, num_frames: int, height: int, width: int, text_tokens: int) -> VideoLayout:
        """Describe the token sequence of a video, text first.

        Args:
            num_frames: Latent frames.
            height: Latent rows.
            width: Latent columns.
            text_tokens: Text tokens, padding included.

        Raises:
            ValueError: On sizes that this model cannot take.
        """
        return self.config.layout(num_frames, height, width, text_tokens)

    def __call__(
        self,
        hidden_states: Float[Array, "batch frames in_channels height width"],
        encoder_hidden_states: Float[Array, "batch text_tokens text_embed_dim"],
        timestep: Real[Array, " batch"],
        *,
        ofs: Real[Array, " batch"] | None = None,
        attend: Attend = dense_attention,
        step_state: Any = None,
        text_length: Int[Array, " batch"] | None = None,
        rotation: Rotation | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch frames out_channels height width"], Any]:
        """Predict the velocity.

        Args:
            hidden_states: Noisy latents; for I2V with an image's latents as further channels.
            encoder_hidden_states: Text features.
            timestep: Time of each batch entry, 0 to 999.
            ofs: Offset of 1.5-5b-I2V, which was trained with 2.0; None for all others.
            attend: Attention of every layer.
            step_state: State that is passed to `attend` unread.
            text_length: Number of real text tokens of each batch entry; None (as released) if
                padding counts as text.
            rotation: Rotary embedding of every token; None takes that of a whole video of this
                size. Training on some of a video's frames needs another.
            remat: Whether to recompute the layers in the backward pass instead of keeping their
                activations.

        Returns:
            The velocity in `dtype`, and the info of `attend` stacked over layers.

        Raises:
            ValueError: On inputs that this model cannot take.
        """
        config, text_tokens = self.config, encoder_hidden_states.shape[1]
        hidden_states = hidden_states.swapaxes(1, 2)
        num_frames, height, width = hidden_states.shape[2:]
        layout = self.layout(num_frames, height, width, text_tokens)
        check_channels("hidden_states", hidden_states, config.in_channels)
        check_features(
            "encoder_hidden_states", encoder_hidden_states, config.text_embed_dim, "text encoder"
        )
        if (ofs is None) != (config.ofs_embed_dim is None):
            raise ValueError(
                "this model takes no ofs."
                if config.ofs_embed_dim is None
                else "this model needs ofs: it was trained with 2.0 for each batch entry."
            )

        conditioning = self.time_embedding(timestep)
        if ofs is not None:
            conditioning = conditioning + self.ofs_embedding(ofs)
        conditioning = jax.nn.silu(conditioning)

        text = self.text_projection(encoder_hidden_states)
        video = self.patch_projection(patchify(hidden_states, config.patch_shape))
        grid = token_grid(num_frames, height, width, config.patch_shape)
        hidden = jnp.concatenate([text, video], axis=1).astype(self.residual_dtype)
        hidden = self._add_positions(hidden, grid, text_tokens)

        is_text = jnp.arange(layout.num_tokens) < text_tokens
        if rotation is None:
            rotation = self.rotation(grid, text_tokens)

        def apply_layer(block: Block, hidden: Array, layer: Array) -> tuple[Array, Any]:
            attend_layer = partial(
                attend, layout=layout, text_length=text_length, layer=layer, step_state=step_state
            )
            return block(hidden, conditioning, is_text, rotation, attend_layer)

        hidden, info = scan_layers(self.blocks, apply_layer, hidden, remat=remat)

        modulation = self.output_modulation(conditioning).astype(jnp.float32)[:, None, :]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        video = self.output_norm(self.final_norm(hidden[:, text_tokens:])) * (1 + scale) + shift
        velocity = unpatchify(self.output_projection(video), grid, config.patch_shape)
        return velocity.swapaxes(1, 2), info

    def _add_positions(self, hidden: Array, grid: tuple[int, int, int], text_tokens: int) -> Array:
        """Add the positions that a model has beside its rotation, if any, to the hidden state."""
        config = self.config
        if config.use_learned_positional_embeddings and grid == config.sample_grid:
            table = self.position_embedding[...].astype(jnp.float32)
        elif (
            config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings
        ):
            # The released 5b-I2V falls back to this, too, if its table does not fit.
            table = jnp.pad(self._sincos_embedding(*grid), ((text_tokens, 0), (0, 0)))[None]
        else:
            return hidden
        return (hidden.astype(jnp.float32) + table).astype(hidden.dtype)

    def _sincos_embedding(self, frames: int, rows: int, columns: int) -> Array:
        return sincos_video_embedding(
            frames,
            rows,
            columns,
            self.config.width,
            spatial_scale=self.config.spatial_interpolation_scale,
            temporal_scale=self.config.temporal_interpolation_scale,
        )

    def rotation(self, grid: tuple[int, int, int], text_tokens: int) -> Rotation | None:
        """Make the rotary embedding of text, which is not turned, and a video.

        Args:
            grid: Frames, rows and columns of tokens.
            text_tokens: Number of text tokens, padding included.
        """
        config, (frames, rows, columns) = self.config, grid
        if not config.use_rotary_positional_embeddings:
            return None
        if config.patch_size_t is None:
            row, column = cropped_grid((rows, columns), config.sample_grid[1:])
        else:  # 1.5 counts from the top left corner
            row, column = np.arange(rows), np.arange(columns)
        eighth = config.attention_head_dim // 8
        return video_rotation(
            (np.arange(frames), row, column),
            (2 * eighth, 3 * eighth, 3 * eighth),
            text_tokens=text_tokens,
        )
