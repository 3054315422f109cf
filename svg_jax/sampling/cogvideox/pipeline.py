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

from svg_jax.media.images import AnyImage
from svg_jax.models import CogVideoXTransformer, CogVideoXVAE, T5Encoder
from svg_jax.sampling.cogvideox.image_conditions import check_image, encode_first_frame
from svg_jax.sampling.components import (
    Lazy,
    in_memory,
    repeat_each,
    run_encoder,
)
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.denoising import guidance_scales
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
from svg_jax.sampling.pipeline import VideoPipeline, with_settings
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.prompt_features import take_prompts
from svg_jax.sampling.schedules.config import Sampler, SchedulerConfig
from svg_jax.sampling.schedules.noise import seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import Schedule, make_schedule
from svg_jax.sampling.settings import SettingError, count_prompts
from svg_jax.text.tokenizer import PromptTokenizer

_LOGGER = logging.getLogger(__name__)
_OFS = 2.0  # the only value that CogVideoX-1.5 image to video was trained with

# Ranks alone: sizes are checked against each other with errors that say what to do.
Embeddings = Float[Array | np.ndarray, "_batch _text_tokens _features"]
Latents = Float[Array | np.ndarray, "_batch _frames _channels _height _width"]
Noise = Float[Array | np.ndarray, "_steps _batch _frames _channels _height _width"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CogVideoXPipeline(VideoPipeline):
    """A CogVideoX checkpoint that can be called.

    Attributes:
        transformer: The denoiser.
        vae: See `VideoPipeline`.
        scheduler: From scheduler_config.json.
        text_encoder: T5, or None: prompts then come as embeddings.
        tokenizer: T5's, or None.
        has_vae: Whether latents are a VAE's. Without one they are pixels in −1…1.
    """

    samplers: ClassVar[tuple[str, ...]] = ("ddim", "dpm")

    transformer: CogVideoXTransformer | Lazy[CogVideoXTransformer]
    vae: CogVideoXVAE | Lazy[CogVideoXVAE] | None = None
    scheduler: SchedulerConfig
    text_encoder: T5Encoder | Lazy[T5Encoder] | None = None
    tokenizer: PromptTokenizer | None = None
    has_vae: bool = True

    @property
    def authors_settings(self) -> dict[str, Any]:
        """See `VideoPipeline.authors_settings`."""
        return {"num_inference_steps": 50, "guidance_scale": 6.0}

    @with_settings
    def prepare(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: AnyImage | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        guidance_interval: tuple[float | int, float | int] | None = None,
        use_dynamic_cfg: bool = False,
        scheduler: Sampler | None = None,
        latents: Latents | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        image_latents: Latents | None = None,
        image_noise: Latents | None = None,
        sampler_noise: Noise | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = 0,
        max_sequence_length: int | None = None,
    ) -> PreparedRun:
        """Do the first part of `__call__`: encode prompts and image, make schedule and noise.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            image: The first frame: one for all prompts, or one for each, as paths, Pillow's images
                or arrays (see `svg_jax.media.images.as_image`); resized without regard to its
                proportions. Needed by image-to-video checkpoints.
            negative_prompt: What guidance leads away from; one for all prompts, or one for each.
            height: Height in pixels. Default: what the checkpoint was trained at (768 for 1.5).
            width: Width in pixels. Default: as trained (1360 for 1.5).
            num_frames: Frames of the video. As with diffusers, numbers of the form 4k + 1 and 8k
                are made as they are, others are rounded up to one. Default: as trained.
            num_inference_steps: Denoising steps. Default: the folder's, or 50.
            guidance_scale: Strength of classifier-free guidance; at most 1 turns it off and halves
                the work. Default: the folder's, or 6.
            guidance_interval: Shares of the steps between which guidance is computed: (0, 0.3) is
                the first 30 %. Default: the folder's, or all.
            use_dynamic_cfg: Vary the guidance scale over the run, as diffusers does.
            scheduler: "ddim" or "dpm". Default: the checkpoint's own.
            latents: Initial noise in place of the seed's, padding frames included.
            prompt_embeds: T5 features [batch, text_tokens, features] in place of prompts.
            negative_prompt_embeds: Features of the negative prompt, in the same form.
            image_latents: The VAE's latents of the first frame [1 or prompts, 1, channels, height,
                width], scaled as the model expects them, in place of an image.
            image_noise: Standard normal numbers of image_latents' shape, by which the VAE's latents
                of an image are drawn, in place of the seed's.
            sampler_noise: What "dpm" adds in its steps, [steps, *shape of the latents], in place of
                the seed's.
            num_videos_per_prompt: Videos of each prompt, from noise of their own.
            seed: The same seed, from 0 to 2^64 − 1, gives the same noise on every device. None
                draws one, which the outcome's `info` has.
            max_sequence_length: Text tokens, padding included. Default: the model's.

        Raises:
            ValueError: On arguments that do not fit the checkpoint or each other.
        """
        assert num_inference_steps is not None
        assert guidance_scale is not None
        assert guidance_interval is not None
        assert seed is not None
        schedule = make_schedule(self.scheduler, num_inference_steps, scheduler)
        scales = guidance_scales(
            schedule.timesteps,
            guidance_scale,
            guidance_interval=guidance_interval,
            use_dynamic_cfg=use_dynamic_cfg,
        )
        guided = bool((scales != 1).any())
        config, compression = self.transformer.config, self.compression
        size = video_size(config, compression, num_frames, height, width)
        frame_shape, padding_frames = latent_shape(
            config, compression=compression, num_frames=size[0], height=size[1], width=size[2]
        )
        prompts = count_prompts(prompt, prompt_embeds)
        shape = (prompts * num_videos_per_prompt, *frame_shape)
        tokens = max_sequence_length or config.max_text_seq_length
        if prompt_embeds is not None:
            tokens = prompt_embeds.shape[1]
        layout = config.layout(shape[1], shape[3], shape[4], tokens)
        made = self.video_size(num_frames, height, width)[0]
        check_memory(
            self.transformer,
            layout,
            shape,
            guided=guided,
            video=(made, *size[1:]) if self.makes_frames else None,
        )
        if self.has_vae and made != size[0]:
            _LOGGER.warning("of num_frames=%d this model makes %d frames", size[0], made)
        noise = starting_latents(latents, shape, seed)
        sampler_noise = _checked_noise(sampler_noise, schedule, shape)
        given: dict[str, Any] = {
            "image": image,
            "image_latents": image_latents,
            "image_noise": image_noise,
        }
        check_image(config, has_encoder=self.vae is not None, **given)
        image_shape = (prompts, 1, *shape[2:])
        check_shape("image_latents", image_latents, image_shape, (1, *image_shape[1:]))
        check_shape("image_noise", image_noise, image_shape, (1, *image_shape[1:]))
        positive, negative = take_prompts(
            None if self.text_encoder is None else self.encode_prompts,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            guided=guided,
            shape=(prompts, tokens, config.text_embed_dim),
        )
        images = encode_first_frame(shape, prompts, vae=self.vae, seed=seed, **given)
        return PreparedRun(
            schedule=schedule,
            state=initial_state(schedule.sampler, noise),
            conditions=Conditions(
                call=_call_model,
                channel_axis=2,
                text=jnp.repeat(positive, num_videos_per_prompt, axis=0),
                negative_text=repeat_each(negative, num_videos_per_prompt),
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
