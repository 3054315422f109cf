"""What HunyuanVideo is told of its prompts: LLaMA 3's or LLaVA's features, and CLIP's of the whole.

As in diffusers' pipelines (0.42.1): CLIP reads the same prompt as LLaMA, whatever `prompt_2` says
there, and only a part of an image's features is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array

from svg_jax.media.images import CLIPImageProcessor, Image
from svg_jax.models import CLIPTextEncoder, HunyuanVideoConfig, LlamaEncoder, LlavaEncoder
from svg_jax.sampling.components import Component, in_memory, run_encoder
from svg_jax.sampling.latents import check_shape
from svg_jax.sampling.prompt_features import negative_of_each
from svg_jax.sampling.settings import SettingError
from svg_jax.text.prompts import (
    CLIP_LENGTH,
    HUNYUAN_VIDEO_TEMPLATE,
    hunyuan_video_image_tokens,
    hunyuan_video_tokens,
)
from svg_jax.text.tokenizer import PromptTokenizer

_HIDDEN_STATE = -3  # LLaMA's that is taken: without its last two layers and final norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextFeatures:
    """Encoded texts, as the transformer takes them.

    Attributes:
        embeds: Features of tokens, float32 [batch, tokens, features], padding behind each text.
        lengths: Number of tokens that are no padding, int32 [batch].
        pooled: Features of each text as a whole, float32 [batch, features].
    """

    embeds: Any
    lengths: Any
    pooled: Any

    def padded(self, tokens: int) -> "TextFeatures":
        """Pad to so many tokens."""
        room = tokens - self.embeds.shape[1]
        embeds = jnp.pad(self.embeds, ((0, 0), (0, room), (0, 0)))
        return TextFeatures(embeds, self.lengths, self.pooled)


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts to encode, or features that were given in their place.

    Attributes:
        prompts: Texts; None where all of their features were given.
        embeds: Features of tokens [batch, tokens, features], or None.
        mask: Mask that is 1 or True at tokens that are no padding [batch, tokens], or None.
        pooled: Features of each text as a whole [batch, features], or None.
        images: Image of each prompt, for image to video.
        stride: Distance from one kept feature of an image to the next.
        prefix: Prefix of the settings' names in errors: "negative_" or nothing.
    """

    prompts: Sequence[str] | None
    embeds: Array | np.ndarray | None
    mask: Array | np.ndarray | None
    pooled: Array | np.ndarray | None
    images: Sequence[Image] = ()
    stride: int = 1
    prefix: str = ""

    @property
    def count(self) -> int:
        """Number of texts."""
        return len(self.prompts or ()) if self.embeds is None else len(self.embeds)

    def check(self, config: HunyuanVideoConfig) -> None:
        """Raise SettingError if given features are not complete, or do not fit the model."""
        name, pooled_name = f"{self.prefix}prompt_embeds", f"{self.prefix}pooled_prompt_embeds"
        mask_name = f"{self.prefix}prompt_attention_mask"
        if self.embeds is not None:
            if self.mask is None or self.pooled is None:
                raise SettingError(
                    name, f"need their {mask_name} and {pooled_name}: pass all three"
                )
            check_shape(name, self.embeds, (*self.embeds.shape[:2], config.text_embed_dim))
            if self.mask.shape != self.embeds.shape[:2]:
                raise SettingError(
                    mask_name,
                    f"is of shape {self.mask.shape} and must be that of {name}, "
                    f"{self.embeds.shape[:2]}",
                )
            _check_mask(mask_name, self.mask)
        elif self.mask is not None:
            raise SettingError(mask_name, f"is for {name}: pass both")
        if self.pooled is not None:
            if len(self.pooled) != self.count:
                raise SettingError(pooled_name, f"are {len(self.pooled)} for {self.count} prompts")
            check_shape(pooled_name, self.pooled, (self.count, config.pooled_projection_dim))


@dataclass(frozen=True, eq=False, kw_only=True)
class HunyuanVideoEncoders:
    """Encoders of prompts; each may be missing where features are given in its place.

    Attributes:
        text_encoder: LLaMA 3, or LLaVA for image to video.
        tokenizer: Tokenizer of text_encoder.
        text_encoder_2: Text encoder of CLIP.
        tokenizer_2: Tokenizer of text_encoder_2.
        image_processor: Preparation of images for LLaVA.
    """

    text_encoder: Component[LlamaEncoder | LlavaEncoder] | None = None
    tokenizer: PromptTokenizer | None = None
    text_encoder_2: Component[CLIPTextEncoder] | None = None
    tokenizer_2: PromptTokenizer | None = None
    image_processor: CLIPImageProcessor | None = None

    def encode(self, parts: Sequence[Texts], max_length: int) -> list[TextFeatures]:
        """Encode each part, all padded to the same number of tokens.

        Args:
            parts: Prompts, and negative prompts: each encoder is loaded once for all of them.
            max_length: Number of tokens of a text, padding included.

        Raises:
            ValueError: If an encoder is needed that is missing.
        """
        embedded = iter(self._embed([x for x in parts if x.embeds is None], max_length))
        pooled = iter(self._pool([x for x in parts if x.pooled is None]))
        features = []
        for part in parts:
            embeds, mask = (part.embeds, part.mask) if part.embeds is not None else next(embedded)
            whole = next(pooled) if part.pooled is None else part.pooled
            features.append(
                TextFeatures(
                    jnp.asarray(embeds, jnp.float32),
                    jnp.asarray(np.asarray(mask).sum(axis=1), jnp.int32),
                    jnp.asarray(whole, jnp.float32),
                )
            )
        most = max(each.embeds.shape[1] for each in features)
        return [each.padded(most) for each in features]

    def _embed(self, parts: Sequence[Texts], max_length: int) -> list[tuple[Array, np.ndarray]]:
        """Encode each part by LLaMA 3, or by LLaVA behind its images; features and masks."""
        prompts = [prompt for part in parts for prompt in part.prompts or ()]
        if not prompts:
            return []
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no text encoder: pass prompt_embeds with their mask and "
                "pooled_prompt_embeds, and the same for a negative prompt"
            )
        images = [image for part in parts for image in part.images]
        with in_memory(self.text_encoder) as encoder:
            if isinstance(encoder, LlamaEncoder):
                tokens = hunyuan_video_tokens(self.tokenizer, prompts, max_length)
                inputs = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
                features = run_encoder(encoder, *inputs, hidden_state=_HIDDEN_STATE)
                start = HUNYUAN_VIDEO_TEMPLATE.crop_start
                embeds, mask = features[:, start:], tokens.mask[:, start:]
                ends = np.cumsum([len(part.prompts or ()) for part in parts])[:-1]
                return list(zip(jnp.split(embeds, ends), np.split(mask, ends), strict=True))
            if self.image_processor is None:
                raise ValueError("this checkpoint has no image_processor: convert it again")
            tokens = hunyuan_video_image_tokens(
                self.tokenizer,
                prompts,
                max_length,
                image_tokens=encoder.config.vision_config.num_patches,
            )
            pixels = jnp.asarray(np.stack([self.image_processor(image) for image in images]))
            inputs = jnp.asarray(tokens.ids), pixels, jnp.asarray(tokens.mask)
            features = run_encoder(encoder, *inputs, hidden_state=_HIDDEN_STATE)
        out, start = [], 0
        for part in parts:
            rows = slice(start, start + len(part.prompts or ()))
            image = features[rows, tokens.image][:, :: part.stride]
            index = jnp.asarray(tokens.text[rows])[:, :, None]
            text = jnp.take_along_axis(features[rows], index, axis=1)
            mask = np.pad(tokens.text_mask[rows], ((0, 0), (image.shape[1], 0)), constant_values=1)
            out.append((jnp.concatenate([image, text], axis=1), mask))
            start = rows.stop
        return out

    def _pool(self, parts: Sequence[Texts]) -> list[Array]:
        """Encode each part's texts as a whole, by CLIP."""
        prompts = [prompt for part in parts for prompt in part.prompts or ()]
        if not prompts:
            return []
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            raise ValueError(
                "this checkpoint has no second text encoder: pass pooled_prompt_embeds, and "
                "negative_pooled_prompt_embeds for a negative prompt"
            )
        ids = jnp.asarray(self.tokenizer_2(prompts, CLIP_LENGTH))
        with in_memory(self.text_encoder_2) as encoder:
            _, pooled = run_encoder(encoder, ids)
        return jnp.split(pooled, np.cumsum([len(part.prompts or ()) for part in parts])[:-1])


def negative_texts(
    prompt: str | Sequence[str] | None,
    features: tuple[Any, Any, Any],
    black: PIL.Image.Image,
    count: int,
) -> Texts:
    """Take the negative prompts; features that were given have priority.

    They go with a black image, of whose features every second one is kept for every model.
    """
    if features[0] is not None:
        if len(features[0]) != count:
            raise SettingError(
                "negative_prompt_embeds",
                f"must be as many as the prompts: got {len(features[0])} for {count}",
            )
        return Texts(None, *features, prefix="negative_")
    if prompt is None:
        raise SettingError(
            "true_cfg_scale",
            "is over 1, and a true_cfg_scale over 1 needs a negative_prompt (which may be empty) "
            "or negative_prompt_embeds",
        )
    return Texts(
        negative_of_each(prompt, count),
        *features,
        images=[black] * count,
        stride=2,
        prefix="negative_",
    )


def _check_mask(name: str, mask: Array | np.ndarray) -> None:
    mask = np.asarray(mask)
    lengths = (mask != 0).sum(axis=1)
    if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any() or (lengths < 1).any():
        raise SettingError(
            name, "must have 1 at the tokens of a text, at least one, and 0 at those behind it"
        )
