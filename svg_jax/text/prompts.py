"""The preparation of prompts by each family, as in diffusers 0.42.1.

CogVideoX has none: its T5 reads `tokenizer(prompts, 226)`, padding included, without a mask. Wan's
UMT5 reads cleaned prompts. HunyuanVideo's LLaMA 3 reads prompts inside an instruction, whose tokens
are dropped from the output, and its CLIP reads the bare prompts.
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
        text: Text of the instruction, with {} in the prompt's place.
        crop_start: Number of tokens before the prompt, whose features are dropped.
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
    """Clean a prompt for Wan: repair mojibake, replace HTML entities, collapse spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def wan_tokens(tokenizer: PromptTokenizer, prompts: Sequence[str], max_length: int = 512) -> Tokens:
    """Tokenize cleaned prompts for Wan's UMT5, which attends with their mask."""
    return tokenizer.encode([clean_prompt(prompt) for prompt in prompts], max_length)


def hunyuan_video_tokens(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    max_length: int = 256,
    template: PromptTemplate = HUNYUAN_VIDEO_TEMPLATE,
) -> Tokens:
    """Tokenize prompts in the template for HunyuanVideo's LLaMA 3.

    Args:
        tokenizer: Tokenizer of LLaMA 3.
        prompts: Prompts of the videos.
        max_length: Number of tokens of a prompt and of the template's end after it.
        template: Instruction around each prompt.

    Returns:
        Tokens [batch, crop_start + max_length]; the DiT takes features and mask from `crop_start`
        on.
    """
    texts = [template.text.format(prompt) for prompt in prompts]
    return tokenizer.encode(texts, template.crop_start + max_length)


@dataclass(frozen=True, eq=False)
class ImagePromptTokens:
    """The input of HunyuanVideo's LLaVA, and the features of its output that the DiT takes.

    Attributes:
        ids: Token ids; the image's token is repeated for each of its features.
        mask: Mask of the tokens: 1 for a token, 0 for padding.
        positions: Rotary position of each token; 1 for padding.
        image: Range of the image's features.
        text: Indices of the prompts' features, without the template and the assistant's header.
        text_mask: Mask of the prompts' features.
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
    """Tokenize prompts in the template for HunyuanVideo's LLaVA, for image to video.

    Prompts that are too long lose the template's end. Unlike in diffusers, such prompts may also be
    in a batch.

    Args:
        tokenizer: Tokenizer of LLaVA.
        prompts: Prompts of the videos.
        max_length: Number of tokens of a prompt and of the template's end after it.
        image_tokens: Number of features of an image.
        template: Instruction around each prompt.

    Raises:
        ValueError: If a prompt contains `<image>`, the tokenizer is another model's, or max_length
            leaves no room.
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
        # Only a line feed follows the assistant's header, or it was cut off with the prompt's end.
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
