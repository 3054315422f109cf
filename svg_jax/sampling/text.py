"""Text features of prompts: given, or of the text encoder."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from svg_jax.sampling.pipeline import check_finite


def take_prompts(
    encode: Callable[[list[str], int | None], Array] | None,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str],
    prompt_embeds: Array | np.ndarray | None,
    negative_prompt_embeds: Array | np.ndarray | None,
    *,
    guided: bool,
    max_sequence_length: int | None,
) -> tuple[Array, Array | None]:
    """Text features of the prompts, and of the negative ones if a step is guided; float32.

    Args:
        encode: (prompts, tokens of each) -> features; called once. None if there is no text
            encoder.
        prompt: See `VideoPipeline`.
        negative_prompt: One for all prompts, or one for each.
        prompt_embeds: In place of prompts.
        negative_prompt_embeds: In place of negative prompts.
        guided: Whether there is a step with guidance.
        max_sequence_length: Tokens of a prompt; None is the model's own.

    Raises:
        ValueError: On arguments that do not fit each other, or that only an encoder could read.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("pass either a prompt or prompt_embeds")
    if negative_prompt and negative_prompt_embeds is not None:
        raise ValueError("pass either a negative_prompt or negative_prompt_embeds")
    given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    for name, embeds in given.items():
        if embeds is not None:
            check_finite(name, embeds)
    positives = [] if prompt is None else list_of_prompts(prompt)
    if encode is None and positives:
        raise ValueError(
            "this checkpoint has no text encoder: pass prompt_embeds (--prompt-embeds)"
        )
    if encode is None and guided and negative_prompt_embeds is None:
        raise ValueError(
            "this checkpoint has no text encoder: pass negative_prompt_embeds too, "
            "or a guidance_scale of 1"
        )
    negatives = []
    if prompt_embeds is not None:
        max_sequence_length = prompt_embeds.shape[1]
    if guided and negative_prompt_embeds is None:
        count = len(positives) if prompt_embeds is None else len(prompt_embeds)
        negatives = negative_of_each(negative_prompt, count)
    # In one call: the encoder may have to be loaded for it.
    texts = [*negatives, *positives]
    encoded = encode(texts, max_sequence_length) if encode is not None and texts else None
    negative, positive = negative_prompt_embeds, prompt_embeds
    if encoded is not None:
        check_finite("the text encoder's output", encoded)
        negative = encoded[: len(negatives)] if negatives else negative
        positive = encoded[len(negatives) :] if positives else positive
    positive = jnp.asarray(positive, jnp.float32)
    if not guided:
        return positive, None
    negative = jnp.asarray(negative, jnp.float32)
    if negative.shape != positive.shape:
        raise ValueError(
            "the negative prompts must be as many and as long as the prompts: "
            f"got features of {negative.shape} for {positive.shape}"
        )
    return positive, negative


def list_of_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list; ValueError if there is none."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("pass at least one prompt")
    return prompts


def negative_of_each(negative_prompt: str | Sequence[str], count: int) -> list[str]:
    """The negative prompt of each prompt: one for all, or one for each."""
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise ValueError(
            "the negative prompts must be as many as the prompts: "
            f"got {len(negative_prompt)} for {count}"
        )
    return list(negative_prompt)
