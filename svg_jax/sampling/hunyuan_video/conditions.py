"""What a HunyuanVideo transformer is told: of the prompts, of the guidance scale, of an image."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from svg_jax.sampling.hunyuan_video.prompts import TextFeatures
from svg_jax.sampling.settings import SettingError


def call_model(
    model: Any,
    hidden: Array,
    timestep: Array,
    *,
    text: TextFeatures,
    number: Any,
    image_features: Any,
    **to: Any,
) -> tuple[Array, Any]:
    """See `Conditions.call`; the number is the guidance that the model takes as an input."""
    del image_features  # what it sees of an image is among its text, its frames or its channels
    return model(
        hidden,
        text.embeds,
        timestep,
        pooled_projections=text.pooled,
        guidance=number,
        text_length=text.lengths,
        **to,
    )


def embedded_guidance(
    scale: float | int | None, dtype: DTypeLike, *, takes_one: bool
) -> np.float32 | None:
    """Scale guidance as the model takes it as an input: times 1000, rounded as in its dtype.

    Args:
        scale: Guidance scale; None is 6.
        dtype: Dtype of the model.
        takes_one: Whether the model has the input.

    Raises:
        ValueError: If the model takes none.
    """
    if not takes_one:
        if scale is not None and scale != 1:
            raise SettingError(
                "guidance_scale",
                "has no use: this checkpoint takes no guidance_scale: use true_cfg_scale and a "
                "negative_prompt",
            )
        return None
    # 6 in bfloat16 becomes 6016: what released checkpoints are run with.
    scaled = jnp.asarray(6.0 if scale is None else scale, dtype) * jnp.asarray(1000, dtype)
    return np.float32(scaled)


def image_channels(
    image_latents: Float[Array, "batch channels 1 height width"], num_frames: int
) -> Float[Array, "batch channels_and_mask {num_frames} height width"]:
    """Join image latents and a mask of ones in the first frame, with zeros in all others."""
    ones = jnp.ones_like(image_latents[:, :1])
    channels = jnp.concatenate([image_latents, ones], axis=1)
    return jnp.pad(channels, ((0, 0), (0, 0), (0, num_frames - 1), (0, 0), (0, 0)))
