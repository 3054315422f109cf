"""Wan 2.1 from a prompt to a video: text to video, image to video, first and last frame to video.

Follows diffusers' WanPipeline and WanImageToVideoPipeline (0.42.1) in names and arithmetic; latents
stay float32, where diffusers rounds the model's input and guidance to its dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from svg_jax.media.images import AnyImage, CLIPImageProcessor
from svg_jax.models import CLIPVisionEncoder, T5Encoder, WanTransformer, WanVAE
from svg_jax.models.vae_tiling import Tiling
from svg_jax.sampling.components import Lazy, in_memory, repeat_each, run_encoder
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.denoising import guidance_scales
from svg_jax.sampling.latents import (
    RELEASED,
    Compression,
    is_480p,
    latent_grid,
    starting_latents,
)
from svg_jax.sampling.memory import check_memory
from svg_jax.sampling.pipeline import VideoPipeline, with_settings
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.prompt_features import take_prompts
from svg_jax.sampling.schedules.config import Sampler, SchedulerConfig
from svg_jax.sampling.schedules.noise import seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import make_schedule
from svg_jax.sampling.settings import SettingError, count_prompts
from svg_jax.sampling.wan.image_conditions import encode_first_frames
from svg_jax.text.prompts import wan_tokens
from svg_jax.text.tokenizer import PromptTokenizer

_TEXT_TOKENS = 512
_FRAMES = 81
_SMALL, _LARGE = (480, 832), (720, 1280)
_WIDTH_OF_14B = 5120
_SHIFT_OF_SMALL = 3.0

# Ranks alone: sizes are checked against each other with errors that say what to do.
Embeddings = Float[Array | np.ndarray, "_batch _tokens _features"]
Latents = Float[Array | np.ndarray, "_batch _channels _frames _height _width"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WanPipeline(VideoPipeline):
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
        return {"num_inference_steps": 40 if from_one_image else 50, "guidance_scale": 5.0}

    @with_settings
    def prepare(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: AnyImage | None = None,
        last_image: AnyImage | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int = _FRAMES,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        guidance_interval: tuple[float | int, float | int] | None = None,
        scheduler: Sampler | None = None,
        flow_shift: float | int | None = None,
        latents: Latents | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        image_embeds: Embeddings | None = None,
        image_latents: Latents | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = 0,
        max_sequence_length: int = _TEXT_TOKENS,
    ) -> PreparedRun:
        """Do the first part of `__call__`: encode prompts and images, make schedule and noise.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            image: The first frame: one for all prompts, or one for each, as paths, Pillow's images
                or arrays (see `svg_jax.media.images.as_image`); resized without regard to its
                proportions. Needed by image-to-video checkpoints.
            last_image: The last frame, in the same forms; needed by those of first and last frame
                (FLF2V).
            negative_prompt: What guidance leads away from; one for all prompts, or one for each.
            height: Height in pixels, a multiple of 16. Default: 480 for 1.3B, and for 14B image to
                video if the checkpoint's shift is at most 3, by which the 480p one is told from the
                720p one; else 720.
            width: Width in pixels, a multiple of 16. Default: 832 at height 480, else 1280.
            num_frames: Frames of the video, 4k + 1.
            num_inference_steps: Denoising steps. Default, as by Wan's authors: 50; 40 for image to
                video (diffusers takes 50 there, too). A folder's own goes before it.
            guidance_scale: Strength of classifier-free guidance; at most 1 turns it off and halves
                the work. Default: the folder's, or 5.
            guidance_interval: Shares of the steps between which guidance is computed: (0, 0.3) is
                the first 30 %. Default: the folder's, or all.
            scheduler: "unipc" or "euler", whose steps are HunyuanVideo's. Default: the
                checkpoint's own, which is "unipc".
            flow_shift: Shift of the schedule; by Wan's authors 5 at 720p, 3 at 480p for image to
                video, 16 for first and last frame. Default: the checkpoint's own.
            latents: Initial noise [batch, 16, latent_frames, height / 8, width / 8] in place of the
                seed's.
            prompt_embeds: UMT5 features [batch, text_tokens, features] in place of prompts, zero
                behind each prompt.
            negative_prompt_embeds: Features of the negative prompt, in the same form.
            image_embeds: CLIP features [1 or batch, image_tokens, features] in place of those of
                the images (FLF2V: of both, one behind the other).
            image_latents: Latents of the image and zeros behind it (FLF2V: between the two images),
                encoded as a video and normalised, in place of the VAE's; [1 or batch, 16,
                latent_frames, height / 8, width / 8].
            num_videos_per_prompt: Videos of each prompt, from noise of their own.
            seed: The same seed, from 0 to 2^64 − 1, gives the same noise on every device. None
                draws one, which the outcome's `info` has.
            max_sequence_length: Text tokens, padding included; 512 for image to video.

        Raises:
            ValueError: On arguments that do not fit the checkpoint or each other.
        """
        config, sampling = self.transformer.config, self.scheduler
        if flow_shift is not None:
            sampling = replace(sampling, shift=float(flow_shift))
        assert num_inference_steps is not None
        assert guidance_scale is not None
        assert guidance_interval is not None
        assert seed is not None
        schedule = make_schedule(sampling, num_inference_steps, scheduler)
        scales = guidance_scales(
            schedule.timesteps, guidance_scale, guidance_interval=guidance_interval
        )
        num_frames, height, width = self.video_size(num_frames, height, width)
        guided, compression = bool((scales != 1).any()), self.compression
        grid = latent_grid(
            num_frames, height, width, compression=compression, patch_size=config.patch_size[1]
        )
        layout = config.layout(*grid)
        prompts = count_prompts(prompt, prompt_embeds)
        shape = (prompts * num_videos_per_prompt, config.out_channels, *grid)
        video = (num_frames, height, width) if self.makes_frames else None
        check_memory(self.transformer, layout, shape, guided=guided, video=video)
        self._check_text_tokens(max_sequence_length, prompt_embeds)
        noise = starting_latents(latents, shape, seed)
        images = encode_first_frames(
            config,
            (num_frames, height, width),
            compression,
            (image, last_image),
            prompts=prompts,
            vae=self.vae,
            image_encoder=self.image_encoder,
            image_processor=self.image_processor,
            image_embeds=image_embeds,
            image_latents=image_latents,
        )
        positive, negative = take_prompts(
            None if self.text_encoder is None else self.encode_prompts,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            guided=guided,
            shape=(
                prompts,
                max_sequence_length if prompt_embeds is None else prompt_embeds.shape[1],
                config.text_dim,
            ),
        )
        if images is not None:
            images = images.for_each(shape[0], num_videos_per_prompt)
        return PreparedRun(
            schedule=schedule,
            state=initial_state(schedule.sampler, noise),
            conditions=Conditions(
                call=_call_model,
                text=jnp.repeat(positive, num_videos_per_prompt, axis=0),
                negative_text=repeat_each(negative, num_videos_per_prompt),
                channels=None if images is None else images.channels,
                image_features=None if images is None else images.features,
            ),
            scales=tuple(scales.tolist()),
            key=seed_key(seed),
            layout=layout,
        )

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `VideoPipeline.video_size`."""
        rows, columns = self._default_size()
        return (
            _FRAMES if num_frames is None else num_frames,
            rows if height is None else height,
            columns if width is None else width,
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

    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Videos [batch, 3, frames, height, width] of latents, from −1 to 1."""
        assert self.vae is not None
        with in_memory(self.vae) as vae:
            return vae.decode(vae.denormalize(latents), tiling=Tiling() if vae_tiling else None)

    def _default_size(self) -> tuple[int, int]:
        """Height and width; see `prepare`."""
        config = self.transformer.config
        if config.width < _WIDTH_OF_14B:
            return _SMALL
        of_480p = config.image_dim is not None and self.scheduler.shift <= _SHIFT_OF_SMALL
        return _SMALL if of_480p else _LARGE

    def _check_text_tokens(
        self, max_sequence_length: int, prompt_embeds: Embeddings | None
    ) -> None:
        name, length = "max_sequence_length", max_sequence_length
        if prompt_embeds is not None:
            name, length = "prompt_embeds", prompt_embeds.shape[1]
        if self.transformer.config.image_dim is not None and length != _TEXT_TOKENS:
            raise SettingError(
                name,
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
