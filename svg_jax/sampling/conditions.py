"""The inputs of a model beside latents and timestep, and its prediction, guided or not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from svg_jax.models import Attend

_FRAME_AXIS = 2  # of the models that an image's frame is put in front of


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Arrays that stay the same from step to step; a pytree.

    Attributes:
        call: Function that calls a family's model on hidden states and timesteps, and by keyword
            on `text`, `image_features`, `number`, `attend` and `step_state`; static.
        text: Features of the prompts: a pytree of arrays [batch, ...].
        negative_text: Features of the negative prompts, of the same shapes; None if no step is
            guided.
        number: Float32 scalar that the model takes for each entry, or None.
        first_frame: Latents of an image in front of those that are denoised, [batch, channels, 1,
            height, width]; or None.
        channels: Channels that are appended to those of the latents, or None.
        image_features: Features of an image for both prompts, a pytree of arrays [batch, ...]; or
            None.
        channel_axis: Axis of the latents' channels, static.
    """

    call: Callable[..., tuple[Array, Any]] = field(metadata={"static": True})
    text: Any
    negative_text: Any = None
    number: Any = None
    first_frame: Any = None
    channels: Any = None
    image_features: Any = None
    channel_axis: int = field(default=1, metadata={"static": True})


def predict(
    model: Any,
    latents: Float[Array, "*shape"],
    timestep: Array,
    conditions: Conditions,
    scale: Float[Array, ""] | None,
    *,
    attend: Attend,
    step_state: Any,
) -> tuple[Float[Array, "*shape"], Any]:
    """Predict the velocity of latents, by classifier-free guidance under a scale.

    Args:
        model: Transformer.
        latents: Latents before the step, float32.
        timestep: Timestep of all videos, a scalar.
        conditions: Other inputs of the model.
        scale: Guidance scale, under which the model sees entries [negative, positive]; None runs it
            on the prompts alone.
        attend: Attention of every layer.
        step_state: State for `attend`.

    Returns:
        The velocity in float32, and the info of `attend` stacked over layers.
    """
    c = conditions
    hidden, text, features = latents, c.text, c.image_features
    if c.first_frame is not None:
        hidden = jnp.concatenate([c.first_frame, hidden], axis=_FRAME_AXIS)
    if c.channels is not None:
        hidden = jnp.concatenate([hidden, c.channels], axis=c.channel_axis)
    if scale is not None:
        text = jax.tree.map(lambda *each: jnp.concatenate(each), c.negative_text, text)
        hidden, features = jax.tree.map(lambda x: jnp.concatenate([x, x]), (hidden, features))
    entries = (len(hidden),)
    velocity, info = c.call(
        model,
        hidden,
        jnp.full(entries, timestep),
        text=text,
        image_features=features,
        number=None if c.number is None else jnp.full(entries, c.number),
        attend=attend,
        step_state=step_state,
    )
    if c.first_frame is not None:
        velocity = velocity[:, :, 1:]
    velocity = velocity.astype(jnp.float32)
    if scale is None:
        return velocity, info
    negative, positive = jnp.split(velocity, 2)
    return negative + scale * (positive - negative), info
