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

from svg_jax.models import CogVideoXTransformer, CogVideoXVAE, T5Encoder
from svg_jax.sampling.cogvideox.image_conditions import check_image, encode_first_frame
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.components import (
    Lazy,
    in_memory,
    repeat_each,
    run_encoder,
)
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.latents import (
    NO_VAE,
    RELEASED,
    Compression,
    check_shape,
    decoded_frames,
    latent_shape,
    starting_latents,
    video_size,
)
from svg_jax.sampling.memory import check_memory
from svg_jax.sampling.pipeline import VideoPipeline
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.prompt_features import take_prompts
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.noise import seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import Schedule, make_schedule
from svg_jax.sampling.settings import RunSettings, SettingError
from svg_jax.text.tokenizer import PromptTokenizer

_LOGGER = logging.getLogger(__name__)
_OFS = 2.0  # the only value that CogVideoX-1.5 image to video was trained with

# Ranks alone: sizes are checked against each other with errors that say what to do.
Noise = Float[Array | np.ndarray, "_steps _batch _frames _channels _height _width"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CogVideoXPipeline(VideoPipeline[CogVideoXSettings]):
    """A CogVideoX checkpoint that can be called.

    Attributes:
        transformer: The denoiser.
        vae: See `VideoPipeline`.
        scheduler: From scheduler_config.json.
        text_encoder: T5, or None: prompts then come as embeddings.
        tokenizer: T5's, or None.
        has_vae: Whether latents are a VAE's. Without one they are pixels in −1…1.
    """

    settings_class: ClassVar[type[RunSettings]] = CogVideoXSettings

    transformer: CogVideoXTransformer | Lazy[CogVideoXTransformer]
    vae: CogVideoXVAE | Lazy[CogVideoXVAE] | None = None
    scheduler: SchedulerConfig
    text_encoder: T5Encoder | Lazy[T5Encoder] | None = None
    tokenizer: PromptTokenizer | None = None
    has_vae: bool = True

    @property
    def authors_settings(self) -> dict[str, Any]:
        """See `VideoPipeline.authors_settings`."""
        config = self.transformer.config
        frames, height, width = video_size(config, self.compression, None, None, None)
        return {
            "negative_prompt": "",
            "num_frames": frames,
            "height": height,
            "width": width,
            "num_inference_steps": 50,
            "guidance_scale": 6.0,
            "max_sequence_length": config.max_text_seq_length,
        }

    def prepare(self, settings: CogVideoXSettings) -> PreparedRun:
        """See `VideoPipeline.prepare`."""
        settings = self.completed(settings)
        seed, tokens = settings.seed, settings.max_sequence_length
        assert settings.num_inference_steps is not None
        assert seed is not None
        assert tokens is not None
        schedule = make_schedule(self.scheduler, settings.num_inference_steps, settings.scheduler)
        scale, is_dynamic = settings.guidance_scale, settings.use_dynamic_cfg
        scales = self.guidance_scales(settings, schedule, scale, use_dynamic_cfg=is_dynamic)
        guided = bool((scales != 1).any())
        config, compression = self.transformer.config, self.compression
        size = settings.num_frames, settings.height, settings.width
        frame_shape, padding_frames = latent_shape(
            config, compression=compression, num_frames=size[0], height=size[1], width=size[2]
        )
        prompts = settings.num_prompts
        shape = (settings.num_videos, *frame_shape)
        if settings.prompt_embeds is not None:
            tokens = settings.prompt_embeds.shape[1]
        layout = config.layout(shape[1], shape[3], shape[4], tokens)
        made = self.video_size(*size)
        check_memory(
            self.transformer,
            layout,
            shape,
            guided=guided,
            video=made if self.makes_frames else None,
        )
        if self.has_vae and made[0] != size[0]:
            _LOGGER.warning("of num_frames=%d this model makes %d frames", size[0], made[0])
        noise = starting_latents(settings.latents, shape, seed)
        sampler_noise = _checked_noise(settings.sampler_noise, schedule, shape)
        given: dict[str, Any] = {
            name: getattr(settings, name) for name in ("image", "image_latents", "image_noise")
        }
        check_image(config, has_encoder=self.vae is not None, **given)
        image_shape = (prompts, 1, *shape[2:])
        for name in ("image_latents", "image_noise"):
            check_shape(name, given[name], image_shape, (1, *image_shape[1:]))
        positive, negative = take_prompts(
            None if self.text_encoder is None else self.encode_prompts,
            settings.prompt,
            settings.negative_prompt,
            settings.prompt_embeds,
            settings.negative_prompt_embeds,
            guided=guided,
            shape=(prompts, tokens, config.text_embed_dim),
        )
        images = encode_first_frame(shape, prompts, vae=self.vae, seed=seed, **given)
        videos = settings.num_videos_per_prompt
        return PreparedRun(
            schedule=schedule,
            state=initial_state(schedule.sampler, noise),
            conditions=Conditions(
                call=_call_model,
                channel_axis=2,
                text=jnp.repeat(positive, videos, axis=0),
                negative_text=repeat_each(negative, videos),
                channels=images,
                number=None if config.ofs_embed_dim is None else np.float32(_OFS),
            ),
            scales=tuple(scales.tolist()),
            key=seed_key(seed),
            layout=layout,
            padding_frames=padding_frames,
            sampler_noise=sampler_noise,
        )

    @property
    def compression(self) -> Compression:
        """What the VAE makes of a video; that of released ones if it was left out."""
        if not self.has_vae:
            return NO_VAE
        if self.vae is None:
            return RELEASED._replace(frames=self.transformer.config.temporal_compression_ratio)
        config = self.vae.config
        return Compression(config.temporal_compression_ratio, config.spatial_compression_ratio)

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `VideoPipeline.video_size`; frames are those that the VAE makes."""
        config, compression = self.transformer.config, self.compression
        frames, rows, columns = video_size(config, compression, num_frames, height, width)
        shape, padding_frames = latent_shape(
            config, compression=compression, num_frames=frames, height=rows, width=columns
        )
        return decoded_frames(shape[0] - padding_frames, compression), rows, columns

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
            raise ValueError(
                "this checkpoint has no text encoder: pass prompt_embeds (--prompt-embeds)"
            )
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
