"""Wan 2.1 from a prompt to a video: text to video, image to video, first and last frame to video.

Follows diffusers' WanPipeline and WanImageToVideoPipeline (0.42.1) in names and arithmetic; latents
stay float32, where diffusers rounds the model's input and guidance to its dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from svg_jax.media.images import CLIPImageProcessor
from svg_jax.models import CLIPVisionEncoder, T5Encoder, VideoLayout, WanTransformer, WanVAE
from svg_jax.sampling.components import Component, in_memory, run_encoder
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.latents import RELEASED, Compression, is_480p, latent_grid
from svg_jax.sampling.pipeline import VideoPipeline
from svg_jax.sampling.prepared_run import PreparedRun, plan_run
from svg_jax.sampling.prompt_features import take_prompts
from svg_jax.sampling.settings import RunSettings, SettingError
from svg_jax.sampling.wan.image_conditions import encode_first_frames
from svg_jax.sampling.wan.settings import WanSettings
from svg_jax.stages import stage
from svg_jax.text.prompts import wan_tokens
from svg_jax.text.tokenizer import PromptTokenizer

_TEXT_TOKENS = 512
_FRAMES = 81
_SMALL, _LARGE = (480, 832), (720, 1280)
_WIDTH_OF_14B = 5120
_SHIFT_OF_SMALL = 3.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WanPipeline(VideoPipeline[WanSettings]):
    """A Wan 2.1 checkpoint that can be called.

    Attributes:
        transformer: See `VideoPipeline`.
        vae: See `VideoPipeline`.
        text_encoder: UMT5, or None: prompts are then given as embeddings.
        tokenizer: Tokenizer of UMT5, or None.
        image_encoder: Image encoder of CLIP for image to video, or None: image_embeds are then
            given.
        image_processor: Preparation of images for it, or None.
    """

    frame_rate: ClassVar[float] = 16.0
    settings_class: ClassVar[type[RunSettings]] = WanSettings

    transformer: Component[WanTransformer]
    vae: Component[WanVAE] | None = None
    text_encoder: Component[T5Encoder] | None = None
    tokenizer: PromptTokenizer | None = None
    image_encoder: Component[CLIPVisionEncoder] | None = None
    image_processor: CLIPImageProcessor | None = None

    @property
    def authors_settings(self) -> dict[str, Any]:
        """See `VideoPipeline.authors_settings`; an image to video takes 40 steps."""
        config = self.transformer.config
        from_one_image = config.image_dim is not None and config.pos_embed_seq_len is None
        height, width = self._default_size()
        return {
            "negative_prompt": "",
            "num_frames": _FRAMES,
            "height": height,
            "width": width,
            "num_inference_steps": 40 if from_one_image else 50,
            "guidance_scale": 5.0,
            "max_sequence_length": _TEXT_TOKENS,
        }

    @stage("encoding")
    def prepare(self, settings: WanSettings) -> PreparedRun:
        """See `VideoPipeline.prepare`."""
        settings = self.completed(settings)
        plan = plan_run(self, settings, guidance_scale=settings.guidance_scale)
        config = self.transformer.config
        if config.image_dim is not None and plan.text_tokens != _TEXT_TOKENS:
            raise SettingError(
                "max_sequence_length" if settings.prompt_embeds is None else "prompt_embeds",
                f"must be {_TEXT_TOKENS} tokens for image to video, as it was trained: got "
                f"{plan.text_tokens}",
            )
        images = encode_first_frames(
            config,
            settings,
            self.compression,
            vae=self.vae,
            image_encoder=self.image_encoder,
            image_processor=self.image_processor,
        )
        text, negative_text = take_prompts(
            None if self.text_encoder is None else self.encode_prompts,
            settings,
            guided=plan.is_guided,
            text_tokens=plan.text_tokens,
            width=config.text_dim,
        )
        channels, features = images or (None, None)
        return plan.run(
            Conditions(
                call=_call_model,
                text=text,
                negative_text=negative_text,
                channels=channels,
                image_features=features,
            )
        )

    def latent_shape(
        self, num_frames: int, height: int, width: int
    ) -> tuple[tuple[int, int, int, int], int]:
        """See `VideoPipeline.latent_shape`: channels, frames, height and width."""
        config, compression = self.transformer.config, self.compression
        patch_size = config.patch_size[1]
        grid = latent_grid(
            num_frames, height, width, compression=compression, patch_size=patch_size
        )
        return (config.out_channels, *grid), 0

    def layout(self, latents: tuple[int, ...], text_tokens: int) -> VideoLayout:
        """See `VideoPipeline.layout`; there is no text in the sequence."""
        del text_tokens
        _, frames, rows, columns = latents
        return self.transformer.config.layout(frames, rows, columns)

    def paper_preset(self, height: int | None = None, width: int | None = None) -> str:
        """See `VideoPipeline.paper_preset`; text to video has one for all sizes."""
        if self.transformer.config.image_dim is None:
            return "wan-t2v-720p"
        default = self._default_size()
        small = is_480p(height or default[0], width or default[1])
        return "wan-i2v-480p" if small else "wan-i2v-720p"

    @property
    def compression(self) -> Compression:
        """See `VideoPipeline.compression`."""
        if self.vae is None:
            return RELEASED
        config = self.vae.config
        return Compression(config.scale_factor_temporal, config.scale_factor_spatial)

    def encode_prompts(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> Float[Array, "batch text_tokens features"]:
        """Encode prompts by UMT5: float32, zero behind each prompt as Wan was trained.

        Raises:
            ValueError: If the checkpoint was converted without text encoder or tokenizer.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this checkpoint has no text encoder: pass prompt_embeds")
        tokens = wan_tokens(self.tokenizer, prompts, max_sequence_length or _TEXT_TOKENS)
        ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
        with in_memory(self.text_encoder) as encoder:
            return jnp.where(mask[..., None] == 1, run_encoder(encoder, ids, mask), 0)

    def _default_size(self) -> tuple[int, int]:
        """Choose the height and width that the checkpoint was released for."""
        config = self.transformer.config
        if config.width < _WIDTH_OF_14B:
            return _SMALL
        of_480p = config.image_dim is not None and self.scheduler.shift <= _SHIFT_OF_SMALL
        return _SMALL if of_480p else _LARGE


def _call_model(
    model: Any,
    hidden: Array,
    timestep: Array,
    *,
    text: Any,
    number: Any,
    image_features: Any,
    **to: Any,
) -> tuple[Array, Any]:
    """See `Conditions.call`."""
    del number  # it takes none
    return model(hidden, text, timestep, encoder_hidden_states_image=image_features, **to)
