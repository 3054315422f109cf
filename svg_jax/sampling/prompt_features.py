"""Text features of prompts: given, or of the text encoder."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from svg_jax.sampling.components import check_finite
from svg_jax.sampling.latents import check_shape
from svg_jax.sampling.settings import SettingError


def take_prompts(
    encode: Callable[[list[str], int | None], Array] | None,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: Array | np.ndarray | None,
    negative_prompt_embeds: Array | np.ndarray | None,
    *,
    guided: bool,
    shape: tuple[int, int, int],
) -> tuple[Array, Array | None]:
    """Text features of the prompts, and of the negative ones if a step is guided; float32.

    Args:
        encode: (prompts, tokens of each) -> features; called once. None if there is no text
            encoder.
        prompt: See `VideoPipeline`.
        negative_prompt: One for all prompts, or one for each.
        prompt_embeds: Features in place of prompts.
        negative_prompt_embeds: Features in place of negative prompts.
        guided: Whether there is a step with guidance.
        shape: Prompts, tokens of each, and features of a token.

    Raises:
        ValueError: On features that do not fit, or prompts that only an encoder could read.
    """
    check_shape("prompt_embeds", prompt_embeds, shape)
    if negative_prompt_embeds is not None and negative_prompt_embeds.shape != shape:
        raise SettingError(
            "negative_prompt_embeds",
            "must be as many and as long as the prompts: got features of "
            f"{negative_prompt_embeds.shape} for {shape}",
        )
    positives = [] if prompt is None else list_of_prompts(prompt)
    if encode is None and positives:
        raise SettingError(
            "prompt", "cannot be read: this checkpoint has no text encoder: pass prompt_embeds"
        )
    if encode is None and guided and negative_prompt_embeds is None:
        raise SettingError(
            "negative_prompt",
            "cannot be read: this checkpoint has no text encoder: pass negative_prompt_embeds too, "
            "or a guidance_scale of 1",
        )
    negatives = []
    if guided and negative_prompt_embeds is None:
        negatives = negative_of_each(negative_prompt, shape[0])
    # In one call: the encoder may have to be loaded for it.
    texts = [*negatives, *positives]
    encoded = encode(texts, shape[1]) if encode is not None and texts else None
    negative, positive = negative_prompt_embeds, prompt_embeds
    if encoded is not None:
        check_finite("the text encoder's output", encoded)
        negative = encoded[: len(negatives)] if negatives else negative
        positive = encoded[len(negatives) :] if positives else positive
    positive = jnp.asarray(positive, jnp.float32)
    return positive, jnp.asarray(negative, jnp.float32) if guided else None


def list_of_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list."""
    return [prompt] if isinstance(prompt, str) else list(prompt)


def negative_of_each(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """The negative prompt of each prompt: one for all, or one for each."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    return list(negative_prompt)
