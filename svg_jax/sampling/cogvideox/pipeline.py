"""CogVideoX from a prompt to a video: 2b, 5b and 1.5, text to video and image to video.

Follows diffusers' CogVideoXPipeline and CogVideoXImageToVideoPipeline (0.42.1) in names and
arithmetic; latents stay float32, where diffusers rounds them to the model's dtype in every step.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.models import CogVideoXTransformer, CogVideoXVAE, T5Encoder, VideoLayout
from svg_jax.sampling.cogvideox.image_conditions import check_image, encode_first_frame
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.components import Component, in_memory, run_encoder
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.latents import (
    NO_VAE,
    RELEASED,
    Compression,
    check_shape,
    decoded_frames,
    latent_shape,
    trained_size,
)
from svg_jax.sampling.pipeline import VideoPipeline
from svg_jax.sampling.prepared_run import PreparedRun, plan_run
from svg_jax.sampling.prompt_features import take_prompts
from svg_jax.sampling.schedules.tables import Schedule
from svg_jax.sampling.settings import RunSettings, SettingError
from svg_jax.stages import stage
from svg_jax.text.tokenizer import PromptTokenizer

_LOGGER = logging.getLogger(__name__)
_OFS = 2.0  # the only value that CogVideoX-1.5 image to video was trained with

# Ranks alone: sizes are checked against each other with errors that say what to do.
Noise = Float[Array | np.ndarray, "_steps _batch _frames _channels _height _width"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CogVideoXPipeline(VideoPipeline[CogVideoXSettings]):
    """A CogVideoX checkpoint that can be called.

    Attributes:
        transformer: See `VideoPipeline`.
        vae: See `VideoPipeline`.
        text_encoder: T5, or None: prompts are then given as embeddings.
        tokenizer: Tokenizer of T5, or None.
        has_vae: Whether latents are a VAE's; without one they are pixels in −1…1.
    """

    settings_class: ClassVar[type[RunSettings]] = CogVideoXSettings

    transformer: Component[CogVideoXTransformer]
    vae: Component[CogVideoXVAE] | None = None
    text_encoder: Component[T5Encoder] | None = None
    tokenizer: PromptTokenizer | None = None
    has_vae: bool = True

    @property
    def authors_settings(self) -> dict[str, Any]:
        """See `VideoPipeline.authors_settings`."""
        config = self.transformer.config
        frames, height, width = trained_size(config, self.compression)
        return {
            "negative_prompt": "",
            "num_frames": frames,
            "height": height,
            "width": width,
            "num_inference_steps": 50,
            "guidance_scale": 6.0,
            "max_sequence_length": config.max_text_seq_length,
        }

    @stage("encoding")
    def prepare(self, settings: CogVideoXSettings) -> PreparedRun:
        """See `VideoPipeline.prepare`."""
        settings = self.completed(settings)
        scale, is_dynamic = settings.guidance_scale, settings.use_dynamic_cfg
        plan = plan_run(self, settings, guidance_scale=scale, use_dynamic_cfg=is_dynamic)
        config, shape = self.transformer.config, plan.shape
        made = self.video_size(settings.num_frames)[0]
        if self.has_vae and made != settings.num_frames:
            _LOGGER.warning(
                "of num_frames=%d this model makes %d frames", settings.num_frames, made
            )
        sampler_noise = _checked_noise(settings.sampler_noise, plan.schedule, shape)
        check_image(config, settings, shape, has_encoder=self.vae is not None)
        text, negative_text = take_prompts(
            None if self.text_encoder is None else self.encode_prompts,
            settings,
            guided=plan.is_guided,
            text_tokens=plan.text_tokens,
            width=config.text_embed_dim,
        )
        conditions = Conditions(
            call=_call_model,
            channel_axis=2,
            text=text,
            negative_text=negative_text,
            channels=encode_first_frame(settings, shape, vae=self.vae, seed=plan.seed),
            number=None if config.ofs_embed_dim is None else np.float32(_OFS),
        )
        return plan.run(conditions, sampler_noise=sampler_noise)

    def latent_shape(
        self, num_frames: int, height: int, width: int
    ) -> tuple[tuple[int, int, int, int], int]:
        """See `VideoPipeline.latent_shape`: frames, channels, height and width."""
        return latent_shape(self.transformer.config, num_frames, height, width, self.compression)

    def layout(self, latents: tuple[int, ...], text_tokens: int) -> VideoLayout:
        """See `VideoPipeline.layout`."""
        frames, _, rows, columns = latents
        return self.transformer.config.layout(frames, rows, columns, text_tokens)

    @property
    def compression(self) -> Compression:
        """See `VideoPipeline.compression`; latents that are no VAE's are pixels."""
        if not self.has_vae:
            return NO_VAE
        if self.vae is None:
            return RELEASED._replace(frames=self.transformer.config.temporal_compression_ratio)
        return super().compression

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `VideoPipeline.video_size`; frames are those that the VAE makes."""
        frames, rows, columns = super().video_size(num_frames, height, width)
        shape, padding_frames = self.latent_shape(frames, rows, columns)
        return decoded_frames(shape[0] - padding_frames, self.compression), rows, columns

    def paper_preset(self, height: int | None = None, width: int | None = None) -> str | None:
        """See `VideoPipeline.paper_preset`; one for all sizes, none for models of pixels."""
        return "cogvideox1.5-i2v" if self.has_vae else None

    def finished_latents(self, run: PreparedRun) -> Array:
        """See `VideoPipeline.finished_latents`."""
        return run.state.latents[:, run.padding_frames :]

    @property
    def makes_frames(self) -> bool:
        """Whether there is what decodes latents, or nothing to decode."""
        return self.vae is not None or not self.has_vae

    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Videos [batch, 3, frames, height, width] of latents, about from −1 to 1."""
        latents = latents.swapaxes(1, 2)
        if self.vae is None:
            return latents
        with in_memory(self.vae) as vae:
            tiling = vae.config.tiling if vae_tiling else None
            return vae.decode(vae.denormalize(latents), tiling=tiling)

    def encode_prompts(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> Float[Array, "batch text_tokens features"]:
        """T5's features of prompts, float32, padding included as CogVideoX was trained.

        Raises:
            ValueError: If the checkpoint was converted without text encoder or tokenizer, or at
                words that it does not know.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this checkpoint has no text encoder: pass prompt_embeds")
        length = max_sequence_length or self.transformer.config.max_text_seq_length
        input_ids = jnp.asarray(self.tokenizer(prompts, length))
        with in_memory(self.text_encoder) as encoder:
            return run_encoder(encoder, input_ids)


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
    """See `Conditions.call`; the number is 1.5's ofs."""
    del image_features  # an image is in the channels
    return model(hidden, text, timestep, ofs=number, **to)


def _checked_noise(
    noise: Noise | None, schedule: Schedule, shape: tuple[int, ...]
) -> Float[np.ndarray, "steps batch frames channels height width"] | None:
    if noise is None:
        return None
    if not schedule.draws_noise:
        raise SettingError("sampler_noise", "has no use: the scheduler adds no noise")
    check_shape("sampler_noise", noise, (schedule.num_steps, *shape))
    return np.asarray(noise)
