"""Text features of prompts: given, or from the text encoder."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from svg_jax.sampling.components import check_finite
from svg_jax.sampling.latents import check_shape
from svg_jax.sampling.settings import RunSettings, SettingError


def take_prompts(
    encode: Callable[[list[str], int | None], Array] | None,
    settings: RunSettings,
    *,
    guided: bool,
    text_tokens: int,
    width: int,
) -> tuple[Array, Array | None]:
    """Encode the prompts and, if a step is guided, the negative ones; or take given features.

    Args:
        encode: Function from prompts and number of tokens to features, which is called once; None
            if there is no text encoder.
        settings: Settings of the run.
        guided: Whether any step is guided.
        text_tokens: Number of tokens of each prompt.
        width: Number of features of a token.

    Returns:
        Features of both, float32 [videos, tokens, features]; those of the negative prompts are None
        if no step is guided.

    Raises:
        ValueError: On features that do not fit, or prompts that only an encoder could read.
    """
    positive, negative = settings.prompt_embeds, settings.negative_prompt_embeds
    shape = (settings.num_prompts, text_tokens, width)
    check_shape("prompt_embeds", positive, shape)
    if negative is not None and negative.shape != shape:
        raise SettingError(
            "negative_prompt_embeds",
            f"must be as many and as long as the prompts: got features of {negative.shape} for "
            f"{shape}",
        )
    positives = [] if settings.prompt is None else list_of_prompts(settings.prompt)
    if encode is None and positives:
        raise SettingError(
            "prompt", "cannot be read: this checkpoint has no text encoder: pass prompt_embeds"
        )
    if encode is None and guided and negative is None:
        raise SettingError(
            "negative_prompt",
            "cannot be read: this checkpoint has no text encoder: pass negative_prompt_embeds too, "
            "or a guidance_scale of 1",
        )
    negatives = []
    if guided and negative is None:
        negatives = negative_of_each(settings.negative_prompt, shape[0])
    # In one call: the encoder may have to be loaded for it.
    texts = [*negatives, *positives]
    if encode is not None and texts:
        encoded = encode(texts, text_tokens)
        check_finite("the text encoder's output", encoded)
        negative = encoded[: len(negatives)] if negatives else negative
        positive = encoded[len(negatives) :] if positives else positive
    return repeat_each(
        (
            jnp.asarray(positive, jnp.float32),
            jnp.asarray(negative, jnp.float32) if guided else None,
        ),
        settings.num_videos_per_prompt,
    )


def repeat_each(arrays: Any, times: int) -> Any:
    """Repeat every batch entry of a pytree of arrays, for several videos of a prompt."""
    return jax.tree.map(lambda array: jnp.repeat(array, times, axis=0), arrays)


def list_of_prompts(prompt: str | Sequence[str]) -> list[str]:
    """Make a list of one prompt or several."""
    return [prompt] if isinstance(prompt, str) else list(prompt)


def negative_of_each(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """Give each prompt its negative prompt: one for all, or one for each."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    return list(negative_prompt)
