"""Wan 2.1 from a prompt to a video: text to video, image to video, first and last frame to video.

Follows diffusers' WanPipeline and WanImageToVideoPipeline (0.42.1) in names and arithmetic; latents
stay float32, where diffusers rounds the model's input and guidance to its dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from svg_jax.media.images import CLIPImageProcessor
from svg_jax.models import CLIPVisionEncoder, T5Encoder, WanTransformer, WanVAE
from svg_jax.sampling.components import Lazy, in_memory, repeat_each, run_encoder
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.latents import (
    RELEASED,
    Compression,
    is_480p,
    latent_grid,
    starting_latents,
)
from svg_jax.sampling.memory import check_memory
from svg_jax.sampling.pipeline import VideoPipeline
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.prompt_features import take_prompts
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.noise import seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import make_schedule
from svg_jax.sampling.settings import RunSettings, SettingError
from svg_jax.sampling.wan.image_conditions import encode_first_frames
from svg_jax.sampling.wan.settings import WanSettings
from svg_jax.text.prompts import wan_tokens
from svg_jax.text.tokenizer import PromptTokenizer

_TEXT_TOKENS = 512
_FRAMES = 81
_SMALL, _LARGE = (480, 832), (720, 1280)
_WIDTH_OF_14B = 5120
_SHIFT_OF_SMALL = 3.0

# Ranks alone: sizes are checked against each other with errors that say what to do.


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WanPipeline(VideoPipeline[WanSettings]):
    """A Wan 2.1 checkpoint that can be called.

    Attributes:
        transformer: The denoiser.
        vae: See `VideoPipeline`.
        scheduler: From scheduler_config.json.
        text_encoder: UMT5, or None: prompts then come as embeddings.
        tokenizer: UMT5's, or None.
        image_encoder: CLIP's, for image to video; None: image_embeds then take its place.
        image_processor: The image encoder's, or None.
    """

    frame_rate: ClassVar[float] = 16.0
    settings_class: ClassVar[type[RunSettings]] = WanSettings

    transformer: WanTransformer | Lazy[WanTransformer]
    scheduler: SchedulerConfig
    vae: WanVAE | Lazy[WanVAE] | None = None
    text_encoder: T5Encoder | Lazy[T5Encoder] | None = None
    tokenizer: PromptTokenizer | None = None
    image_encoder: CLIPVisionEncoder | Lazy[CLIPVisionEncoder] | None = None
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

    def prepare(self, settings: WanSettings) -> PreparedRun:
        """See `VideoPipeline.prepare`."""
        settings = self.completed(settings)
        config, sampling, seed = self.transformer.config, self.scheduler, settings.seed
        tokens = settings.max_sequence_length
        if settings.flow_shift is not None:
            sampling = replace(sampling, shift=float(settings.flow_shift))
        assert settings.num_inference_steps is not None
        assert seed is not None
        assert tokens is not None
        schedule = make_schedule(sampling, settings.num_inference_steps, settings.scheduler)
        scales = self.guidance_scales(settings, schedule, settings.guidance_scale)
        size = self.video_size(settings.num_frames, settings.height, settings.width)
        guided, compression = bool((scales != 1).any()), self.compression
        grid = latent_grid(*size, compression=compression, patch_size=config.patch_size[1])
        layout = config.layout(*grid)
        prompts = settings.num_prompts
        shape = (settings.num_videos, config.out_channels, *grid)
        video = size if self.makes_frames else None
        check_memory(self.transformer, layout, shape, guided=guided, video=video)
        if settings.prompt_embeds is not None:
            tokens = settings.prompt_embeds.shape[1]
        self._check_text_tokens(tokens, of_embeds=settings.prompt_embeds is not None)
        noise = starting_latents(settings.latents, shape, seed)
        images = encode_first_frames(
            config,
            size,
            compression,
            (settings.image, settings.last_image),
            prompts=prompts,
            vae=self.vae,
            image_encoder=self.image_encoder,
            image_processor=self.image_processor,
            image_embeds=settings.image_embeds,
            image_latents=settings.image_latents,
        )
        positive, negative = take_prompts(
            None if self.text_encoder is None else self.encode_prompts,
            settings.prompt,
            settings.negative_prompt,
            settings.prompt_embeds,
            settings.negative_prompt_embeds,
            guided=guided,
            shape=(prompts, tokens, config.text_dim),
        )
        videos = settings.num_videos_per_prompt
        if images is not None:
            images = images.for_each(shape[0], videos)
        return PreparedRun(
            schedule=schedule,
            state=initial_state(schedule.sampler, noise),
            conditions=Conditions(
                call=_call_model,
                text=jnp.repeat(positive, videos, axis=0),
                negative_text=repeat_each(negative, videos),
                channels=None if images is None else images.channels,
                image_features=None if images is None else images.features,
            ),
            scales=tuple(scales.tolist()),
            key=seed_key(seed),
            layout=layout,
        )

    def paper_preset(self, height: int | None = None, width: int | None = None) -> str:
        """See `VideoPipeline.paper_preset`; text to video has one for all sizes."""
        if self.transformer.config.image_dim is None:
            return "wan-t2v-720p"
        default = self._default_size()
        small = is_480p(height or default[0], width or default[1])
        return "wan-i2v-480p" if small else "wan-i2v-720p"

    @property
    def compression(self) -> Compression:
        """What the VAE makes of a video; that of released ones if it was left out."""
        if self.vae is None:
            return RELEASED
        config = self.vae.config
        return Compression(config.scale_factor_temporal, config.scale_factor_spatial)

    def encode_prompts(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> Float[Array, "batch text_tokens features"]:
        """UMT5's features of prompts, float32, zero behind each prompt as Wan was trained.

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
        """Height and width; see `prepare`."""
        config = self.transformer.config
        if config.width < _WIDTH_OF_14B:
            return _SMALL
        of_480p = config.image_dim is not None and self.scheduler.shift <= _SHIFT_OF_SMALL
        return _SMALL if of_480p else _LARGE

    def _check_text_tokens(self, length: int, *, of_embeds: bool) -> None:
        if self.transformer.config.image_dim is not None and length != _TEXT_TOKENS:
            raise SettingError(
                "prompt_embeds" if of_embeds else "max_sequence_length",
                f"must be {_TEXT_TOKENS} tokens for image to video, as it was trained: got "
                f"{length}",
            )


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
