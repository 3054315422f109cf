"""What each family does to a prompt before and after its tokens are looked up.

CogVideoX does nothing: its T5 reads `tokenizer(prompts, 226)`, padding included, without a mask.
Wan's UMT5 reads cleaned prompts. HunyuanVideo's LLaMA 3 reads them inside an instruction, whose
tokens are dropped from its output, and its CLIP reads the bare prompt. As diffusers 0.42.1 has it.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import ftfy
import numpy as np
from jaxtyping import Int32

from svg_jax.text.tokenizer import PromptTokenizer, Tokens

CLIP_LENGTH = 77
_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, "
    "physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)


@dataclass(frozen=True)
class PromptTemplate:
    """An instruction around a prompt.

    Attributes:
        text: With {} where the prompt goes.
        crop_start: Tokens before the prompt: their features are dropped.
        image_start: Index of the image's token, if there is one.
    """

    text: str
    crop_start: int
    image_start: int | None = None


HUNYUAN_VIDEO_TEMPLATE = PromptTemplate(
    "<|start_header_id|>system<|end_header_id|>\n\n"
    f"Describe the video by detailing the following aspects: {_ASPECTS}"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    crop_start=95,
)
HUNYUAN_VIDEO_IMAGE_TEMPLATE = PromptTemplate(
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the "
    f"following aspects according to the reference image: {_ASPECTS}\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    crop_start=103,
    image_start=5,
)
_ASSISTANT_HEADER = 4  # <|eot_id|><|start_header_id|>assistant<|end_header_id|>


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan's tokenizer gets it: mojibake and HTML entities undone, spaces collapsed."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def wan_tokens(tokenizer: PromptTokenizer, prompts: Sequence[str], max_length: int = 512) -> Tokens:
    """What Wan's UMT5 reads: cleaned prompts, and the mask that it attends with."""
    return tokenizer.encode([clean_prompt(prompt) for prompt in prompts], max_length)


def hunyuan_video_tokens(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    max_length: int = 256,
    template: PromptTemplate = HUNYUAN_VIDEO_TEMPLATE,
) -> Tokens:
    """What HunyuanVideo's LLaMA 3 reads: prompts in the template.

    Args:
        tokenizer: LLaMA 3's.
        prompts: The prompts.
        max_length: Tokens of a prompt, what the template has after it included.
        template: The instruction around each.

    Returns:
        [batch, crop_start + max_length]; from `crop_start` on, features and mask are the DiT's.
    """
    texts = [template.text.format(prompt) for prompt in prompts]
    return tokenizer.encode(texts, template.crop_start + max_length)


@dataclass(frozen=True, eq=False)
class ImagePromptTokens:
    """What HunyuanVideo's LLaVA reads, and what the DiT takes of its features.

    Attributes:
        ids: Token ids; the image's token stands once for each of its features.
        mask: 1 where a token is, 0 where it is padding.
        positions: Rotary position of each token; padding's is 1.
        image: Where the image's features are.
        text: Indices of the prompts' features: without template, without the assistant's header.
        text_mask: Their mask.
    """

    ids: Int32[np.ndarray, "batch length"]
    mask: Int32[np.ndarray, "batch length"]
    positions: Int32[np.ndarray, "batch length"]
    image: slice
    text: Int32[np.ndarray, "batch text_tokens"]
    text_mask: Int32[np.ndarray, "batch text_tokens"]


def hunyuan_video_image_tokens(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    max_length: int = 256,
    *,
    image_tokens: int = 576,
    template: PromptTemplate = HUNYUAN_VIDEO_IMAGE_TEMPLATE,
) -> ImagePromptTokens:
    """What HunyuanVideo's LLaVA reads for image to video.

    Over-long prompts, which lose the template's end, may come in batches; diffusers can cut one
    prompt alone.

    Args:
        tokenizer: LLaVA's.
        prompts: The prompts.
        max_length: Tokens of a prompt, what the template has after it included.
        image_tokens: Features of an image.
        template: The instruction around each prompt.

    Raises:
        ValueError: If a prompt holds `<image>` itself, the tokenizer is another model's, or
            max_length leaves no room.
    """
    if max_length <= _ASSISTANT_HEADER:
        raise ValueError(f"max_sequence_length must be over {_ASSISTANT_HEADER}: got {max_length}")
    image, header_end = (tokenizer.token_id(token) for token in ("<image>", "<|end_header_id|>"))
    tokens = hunyuan_video_tokens(tokenizer, prompts, max_length, template)
    start = template.image_start
    images = np.argwhere(tokens.ids == image)
    if start is None or len(images) != len(prompts) or (images[:, 1] != start).any():
        raise ValueError(
            f"a prompt must not hold <image>: the template alone does, as its token {start}"
        )
    ids = np.insert(tokens.ids, [start] * (image_tokens - 1), image, axis=1)
    mask = (ids != tokenizer.pad_id).astype(np.int32)

    length = tokens.ids.shape[1]
    index = np.arange(length, dtype=np.int32)
    kept = []
    for row, filled in zip(tokens.ids, tokens.mask.sum(1), strict=True):
        end = np.flatnonzero(row == header_end)[-1]
        # The assistant's header is last but for a line feed, or was cut off with the prompt's end.
        after_header = end + 1 if end >= filled - 2 else length
        header = (index >= after_header - _ASSISTANT_HEADER) & (index < after_header)
        kept.append(index[(index >= template.crop_start) & ~header])
    text = np.stack(kept)
    return ImagePromptTokens(
        ids=ids,
        mask=mask,
        positions=np.where(mask == 1, mask.cumsum(1, dtype=np.int32) - 1, 1).astype(np.int32),
        image=slice(start, start + image_tokens),
        text=text + np.int32(image_tokens - 1),
        text_mask=np.take_along_axis(tokens.mask, text, axis=1),
    )
