"""What a HunyuanVideo transformer is told: of the prompts, of the guidance scale, of an image."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from svg_jax.models import Attend
from svg_jax.sampling.denoising import guided_velocity
from svg_jax.sampling.hunyuan_video.prompts import TextFeatures
from svg_jax.sampling.settings import SettingError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HunyuanVideoConditions:
    """What the model is told beside latents and timestep.

    Attributes:
        text: Features of the prompts.
        negative_text: Those that guidance leads away from, of the same shapes; None if no step is
            guided.
        guidance: Float32 scalar, for models that take the guidance scale as an input.
        first_frame: Image latents in front of the latents ("token_replace"), [batch, channels, 1,
            height, width]; they are no part of what is denoised.
        image_channels: Image latents and their mask, appended to the latents' channels
            ("latent_concat"), [batch, channels + 1, frames, height, width].
    """

    text: TextFeatures
    negative_text: TextFeatures | None = None
    guidance: Any = None
    first_frame: Any = None
    image_channels: Any = None

    def velocity(
        self,
        model: Any,
        latents: Array,
        timestep: Array,
        scale: Array | None,
        *,
        attend: Attend,
        step_state: Any,
    ) -> tuple[Array, Any]:
        """See `svg_jax.sampling.denoising.Conditions`."""
        hidden, text = latents, self.text
        if self.first_frame is not None:
            hidden = jnp.concatenate([self.first_frame, hidden], axis=2)
        if self.image_channels is not None:
            hidden = jnp.concatenate([hidden, self.image_channels], axis=1)
        if scale is not None:
            hidden = jnp.concatenate([hidden, hidden])
            text = jax.tree.map(lambda *each: jnp.concatenate(each), self.negative_text, text)
        entries = len(hidden)
        velocity, info = model(
            hidden,
            text.embeds,
            jnp.full((entries,), timestep),
            pooled_projections=text.pooled,
            guidance=None if self.guidance is None else jnp.full((entries,), self.guidance),
            text_length=text.lengths,
            attend=attend,
            step_state=step_state,
        )
        if self.first_frame is not None:
            velocity = velocity[:, :, 1:]
        return guided_velocity(velocity, scale), info


def embedded_guidance(
    scale: float | int | None, dtype: DTypeLike, *, takes_one: bool
) -> np.float32 | None:
    """The guidance scale as an input of the model: times 1000, rounded as in its dtype.

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
    """Image latents and a mask of ones in the first frame, zeros in all others."""
    ones = jnp.ones_like(image_latents[:, :1])
    channels = jnp.concatenate([image_latents, ones], axis=1)
    return jnp.pad(channels, ((0, 0), (0, 0), (0, num_frames - 1), (0, 0), (0, 0)))
