"""HunyuanVideo, a video diffusion transformer (arXiv 2412.03603), in all released variants.

Text to video and both image to video models differ by their config alone. The sequence is the
video, then its text. Source of the architecture as released: diffusers
`HunyuanVideoTransformer3DModel`.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.nn.initializers import zeros
from jaxtyping import Array, Float, Int, Real

from svg_jax.models.attention import Attend, dense_attention
from svg_jax.models.hunyuan_video_blocks import (
    Conditioning,
    DoubleBlock,
    SingleBlock,
    TokenRefiner,
    modulate,
    plain_norm,
)
from svg_jax.models.hunyuan_video_config import HunyuanVideoConfig
from svg_jax.models.inputs import check_channels, check_features, check_shapes
from svg_jax.models.layers import Kinds, scan_layers, silu, stack_layers
from svg_jax.models.layout import VideoLayout
from svg_jax.models.patches import patchify, token_grid, unpatchify
from svg_jax.models.rope import Rotation, video_rotation


class HunyuanVideoTransformer(nnx.Module):
    """Predicts the velocity of noisy video latents from text features, a time and a guidance scale.

    Modulations and the last projection start at zero, so that an untrained model predicts zeros.

    Attributes:
        config: Architecture.
        double_blocks: First layers in one module; every parameter has a leading [layers] axis.
        single_blocks: Layers after them, stacked in the same way.
    """

    def __init__(
        self,
        config: HunyuanVideoConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        residual_dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        """Make a model with random weights (under `nnx.eval_shape`: without any).

        Args:
            config: Architecture.
            dtype: Dtype of matrix products and attention; norms, modulation and the embeddings of
                time, guidance and pooled text are float32.
            param_dtype: Dtype of the parameters.
            residual_dtype: Dtype of the hidden state between layers; None is `dtype`.
            rngs: Source of random weights.
        """
        width, kinds = config.width, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        patch = math.prod(config.patch_shape)
        self.config = config
        self.dtype = dtype
        self.residual_dtype = dtype if residual_dtype is None else residual_dtype

        pooled, guided = config.pooled_projection_dim, config.guidance_embeds
        self.conditioning = Conditioning(pooled, width, guided=guided, **kinds)
        self.token_refiner = TokenRefiner(config, **kinds)
        self.patch_projection = nnx.Linear(config.in_channels * patch, width, **kinds)
        self.double_blocks = stack_layers(partial(DoubleBlock, config), config.num_layers, **kinds)
        self.single_blocks = stack_layers(
            partial(SingleBlock, config), config.num_single_layers, **kinds
        )
        last = partial(nnx.Linear, kernel_init=zeros, **kinds)
        self.output_norm = plain_norm(config, **kinds)
        self.output_modulation = last(width, 2 * width)
        self.output_projection = last(width, config.out_channels * patch)

    def layout(self, num_frames: int, height: int, width: int, text_tokens: int) -> VideoLayout:
        """Describe the token sequence of a video and its text.

        Args:
            num_frames: Latent frames.
            height: Latent rows.
            width: Latent columns.
            text_tokens: Text tokens, including padding and an image's tokens among them.

        Raises:
            ValueError: On sizes that this model cannot take.
        """
        return self.config.layout(num_frames, height, width, text_tokens)

    def __call__(
        self,
        hidden_states: Float[Array, "batch in_channels frames height width"],
        encoder_hidden_states: Float[Array, "batch text_tokens text_embed_dim"],
        timestep: Real[Array, "..."],
        *,
        pooled_projections: Float[Array, "..."],
        guidance: Real[Array, "..."] | None = None,
        attend: Attend = dense_attention,
        step_state: Any = None,
        text_length: Int[Array, "..."] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch out_channels frames height width"], Any]:
        """Predict the velocity.

        Args:
            hidden_states: Noisy latents. With "latent_concat", an image's latents and mask are
                further channels; with "token_replace", its latents are the first frame.
            encoder_hidden_states: Text features, padding behind the text.
            timestep: Time of each batch entry, 0 to 1000 [batch].
            pooled_projections: Features of the text as a whole [batch, pooled_projection_dim].
            guidance: Guidance scale times 1000 [batch] for a model that takes one, else None.
            attend: Self-attention of every layer; layers are numbered through both stacks.
            step_state: State that is passed to `attend` unread.
            text_length: Number of real text tokens of each batch entry [batch], at least one; None
                if all are real.
            remat: Whether to recompute the layers in the backward pass instead of keeping their
                activations.

        Returns:
            The velocity in `dtype`, and the info of `attend` stacked over the layers of both
            stacks.

        Raises:
            ValueError: On inputs that this model cannot take.
        """
        config, (num_frames, height, width) = self.config, hidden_states.shape[2:]
        layout = self.layout(num_frames, height, width, encoder_hidden_states.shape[1])
        why = f": its image_condition_type is {config.image_condition_type}"
        check_channels("hidden_states", hidden_states, config.in_channels, why)
        check_features(
            "encoder_hidden_states", encoder_hidden_states, config.text_embed_dim, "text encoder"
        )
        if (guidance is None) == config.guidance_embeds:
            raise ValueError(
                "this model needs guidance: the guidance scale times 1000 for each batch entry."
                if config.guidance_embeds
                else "this model takes no guidance."
            )
        batch = (len(hidden_states),)
        check_shapes(
            {
                "timestep": (timestep, batch),
                "pooled_projections": (pooled_projections, (*batch, config.pooled_projection_dim)),
                "guidance": (guidance, batch),
                "text_length": (text_length, batch),
            }
        )

        embeddings = [self.conditioning(timestep, pooled_projections, guidance)]
        if config.image_condition_type == "token_replace":  # the first frame has no noise
            embeddings.insert(0, self.conditioning(jnp.zeros_like(timestep), pooled_projections))
        conditioning = silu(jnp.stack(embeddings, axis=1))

        grid = token_grid(num_frames, height, width, config.patch_shape)
        rotation = self.rotation(grid, layout.text_tokens)
        video = self.patch_projection(patchify(hidden_states, config.patch_shape))
        text = self.token_refiner(encoder_hidden_states, timestep, text_length)
        hidden = jnp.concatenate([video, text], axis=1).astype(self.residual_dtype)

        def apply_layer(
            block: DoubleBlock | SingleBlock, hidden: Array, layer: Array
        ) -> tuple[Array, Any]:
            attend_layer = partial(
                attend, layout=layout, text_length=text_length, layer=layer, step_state=step_state
            )
            return block(hidden, conditioning, rotation, layout, attend_layer)

        scan = partial(scan_layers, apply_layer=apply_layer, remat=remat)
        hidden, first = scan(self.double_blocks, hidden=hidden)
        hidden, last = scan(self.single_blocks, hidden=hidden, first_layer=config.num_layers)
        info = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, last)

        modulation = self.output_modulation(conditioning[:, -1:]).astype(jnp.float32)
        scale, shift = jnp.split(modulation, 2, axis=-1)
        video = hidden[:, : layout.video_tokens]
        out = self.output_projection(modulate(self.output_norm, video, shift, scale, self.dtype))
        return unpatchify(out, grid, config.patch_shape), info

    def rotation(self, grid: tuple[int, int, int], text_tokens: int) -> Rotation:
        """Make the rotary embedding of a video and of text, which is not turned.

        Args:
            grid: Frames, rows and columns of tokens.
            text_tokens: Number of text tokens, padding included.
        """
        return video_rotation(
            [np.arange(axis) for axis in grid],
            self.config.rope_axes_dim,
            theta=self.config.rope_theta,
            text_tokens=text_tokens,
            text_position="last",
        )
