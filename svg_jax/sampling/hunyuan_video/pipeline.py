"""HunyuanVideo from a prompt to a video, and both of its models from an image to a video.

Follows diffusers' HunyuanVideoPipeline and HunyuanVideoImageToVideoPipeline (0.42.1) in names and
arithmetic; latents stay float32, where diffusers rounds them to the model's dtype in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float

from svg_jax.media.images import AnyImage, as_frame, images_of_each
from svg_jax.models import HunyuanVideoTransformer, HunyuanVideoVAE
from svg_jax.sampling.components import Lazy, in_memory
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.hunyuan_video.conditions import (
    call_model,
    embedded_guidance,
    image_channels,
)
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders, Texts, negative_texts
from svg_jax.sampling.hunyuan_video.settings import HunyuanVideoSettings
from svg_jax.sampling.latents import (
    RELEASED,
    Compression,
    check_shape,
    is_480p,
    latent_grid,
    starting_latents,
)
from svg_jax.sampling.memory import check_memory
from svg_jax.sampling.pipeline import VideoOutput, VideoPipeline
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.prompt_features import list_of_prompts
from svg_jax.sampling.records import SamplingInfo
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.noise import seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import make_schedule
from svg_jax.sampling.settings import RunSettings, SettingError
from svg_jax.sampling.settings.run import OutputType

_FRAMES, _HEIGHT, _WIDTH = 129, 720, 1280
_TEXT_TOKENS = 256
_NOISE = np.float32(0.999)  # share of noise in the initial latents where there is an image
_STRIDES = {"latent_concat": 2, "token_replace": 4}  # every so manieth image feature is kept

# Ranks alone: sizes are checked against each other with errors that say what to do.
Latents = Float[Array | np.ndarray, "_batch _channels _frames _height _width"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HunyuanVideoPipeline(VideoPipeline[HunyuanVideoSettings]):
    """A HunyuanVideo checkpoint that can be called.

    Attributes:
        transformer: The denoiser; its config says what it does with an image.
        vae: See `VideoPipeline`.
        scheduler: From scheduler_config.json.
        encoders: Of prompts, and of an image as a part of them.
    """

    frame_rate: ClassVar[float] = 24.0
    settings_class: ClassVar[type[RunSettings]] = HunyuanVideoSettings

    transformer: HunyuanVideoTransformer | Lazy[HunyuanVideoTransformer]
    vae: HunyuanVideoVAE | Lazy[HunyuanVideoVAE] | None = None
    scheduler: SchedulerConfig
    encoders: HunyuanVideoEncoders

    @property
    def authors_settings(self) -> dict[str, Any]:
        """See `VideoPipeline.authors_settings`; for image to video guidance is diffusers'."""
        config, guidance = self.transformer.config, None
        if config.guidance_embeds:
            guidance = 6.0 if config.image_condition_type is None else 1.0
        return {
            "num_frames": _FRAMES,
            "height": _HEIGHT,
            "width": _WIDTH,
            "num_inference_steps": 50,
            "guidance_scale": guidance,
            "max_sequence_length": _TEXT_TOKENS,
        }

    def prepare(self, settings: HunyuanVideoSettings) -> PreparedRun:
        """See `VideoPipeline.prepare`."""
        settings = self.completed(settings)
        num_frames, height, width = settings.num_frames, settings.height, settings.width
        assert num_frames is not None
        assert height is not None
        assert width is not None
        assert settings.num_inference_steps is not None
        assert settings.max_sequence_length is not None
        assert settings.seed is not None
        shift = self.scheduler.shift if settings.flow_shift is None else float(settings.flow_shift)
        schedule = make_schedule(
            replace(self.scheduler, shift=shift), settings.num_inference_steps, settings.scheduler
        )
        scales = self.guidance_scales(settings, schedule, settings.true_cfg_scale)
        config = self.transformer.config
        frame_shape = self._latent_shape(num_frames, height, width)
        guidance = embedded_guidance(
            settings.guidance_scale, self.transformer.dtype, takes_one=config.guidance_embeds
        )
        image, image_latents = settings.image, settings.image_latents
        self._check_image(image, image_latents)
        parts = self._all_texts(settings, guided=bool((scales != 1).any()))
        prompts, videos = parts[0].count, settings.num_videos_per_prompt
        shape = (prompts * videos, *frame_shape)
        tokens = settings.max_sequence_length
        if settings.prompt_embeds is not None:
            tokens = settings.prompt_embeds.shape[1]
        check_memory(
            self.transformer,
            config.layout(*shape[2:], tokens),
            shape,
            guided=len(parts) > 1,
            video=(num_frames, height, width) if self.makes_frames else None,
        )
        self._check_image_latents(image_latents, prompts, shape)
        noise = starting_latents(settings.latents, shape, settings.seed)
        first_frame = channels = None
        if config.image_condition_type is not None:
            encoded = self._image_latents(image, image_latents, prompts, shape)
            encoded = jnp.repeat(encoded, len(noise) // len(encoded), axis=0)
            noise = noise * _NOISE + encoded * (1 - _NOISE)
            if config.image_condition_type == "token_replace":
                noise, first_frame = noise[:, :, 1:], encoded
            else:
                channels = image_channels(encoded, shape[2])
        encoded_parts = self.encoders.encode(parts, settings.max_sequence_length)
        text, *negative = [each.repeated(videos) for each in encoded_parts]
        return PreparedRun(
            schedule=schedule,
            state=initial_state(schedule.sampler, noise),
            conditions=Conditions(
                call=call_model,
                text=text,
                negative_text=negative[0] if negative else None,
                number=guidance,
                first_frame=first_frame,
                channels=channels,
            ),
            scales=tuple(scales.tolist()),
            key=seed_key(settings.seed),
            layout=config.layout(*shape[2:], text.embeds.shape[1]),
        )

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `VideoPipeline.video_size`; the 33-channel image model leaves the image out."""
        frames, height, width = super().video_size(num_frames, height, width)
        if self.transformer.config.image_condition_type == "latent_concat":
            frames -= self.compression.frames
        return frames, height, width

    def paper_preset(self, height: int | None = None, width: int | None = None) -> str:
        """See `VideoPipeline.paper_preset`."""
        small = is_480p(height or _HEIGHT, width or _WIDTH)
        return "hunyuanvideo-480p" if small else "hunyuanvideo-720p"

    def finished_latents(self, run: PreparedRun) -> Array:
        """See `VideoPipeline.finished_latents`."""
        latents, first_frame = run.state.latents, run.conditions.first_frame
        return latents if first_frame is None else jnp.concatenate([first_frame, latents], axis=2)

    def decode(
        self,
        run: PreparedRun,
        info: SamplingInfo,
        *,
        output_type: OutputType = "np",
        vae_tiling: bool = False,
    ) -> VideoOutput:
        """See `VideoPipeline.decode`."""
        out = super().decode(run, info, output_type=output_type, vae_tiling=vae_tiling)
        if self.transformer.config.image_condition_type != "latent_concat":
            return out
        # As released: the first latent frame, the image again, is decoded and left out.
        frames = None if out.frames is None else out.frames[:, self.compression.frames :]
        return VideoOutput(frames, out.latents[:, :, 1:], out.info)

    @property
    def compression(self) -> Compression:
        """What the VAE makes of a video; that of released ones if it was left out."""
        if self.vae is None:
            return RELEASED
        config = self.vae.config
        return Compression(config.temporal_compression_ratio, config.spatial_compression_ratio)

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of a video."""
        config = self.transformer.config
        compression = self.compression
        grid = latent_grid(
            num_frames, height, width, compression=compression, patch_size=config.patch_size
        )
        if config.image_condition_type is not None and num_frames == 1:
            raise SettingError(
                "num_frames", f"behind an image must be at least {1 + compression.frames}: got 1"
            )
        return config.out_channels, *grid

    def _check_image(self, image: AnyImage | None, image_latents: Latents | None) -> None:
        if self.transformer.config.image_condition_type is None:
            if image is not None or image_latents is not None:
                raise ValueError(
                    "this is a text-to-video checkpoint: it takes no image and no image_latents"
                )
        elif image is None and image_latents is None:
            raise ValueError("this is an image-to-video checkpoint: pass an image")
        elif image_latents is None and self.vae is None:
            raise ValueError(
                "this checkpoint has no VAE: pass the image_latents of the image, scaled as the "
                "model expects them"
            )

    def _all_texts(self, settings: HunyuanVideoSettings, *, guided: bool) -> list[Texts]:
        """Take the prompts and, if any step is guided, the negative ones."""
        features = (
            settings.prompt_embeds,
            settings.prompt_attention_mask,
            settings.pooled_prompt_embeds,
        )
        parts = [self._texts(settings.prompt, features, settings.image)]
        if guided:
            features = (
                settings.negative_prompt_embeds,
                settings.negative_prompt_attention_mask,
                settings.negative_pooled_prompt_embeds,
            )
            black = PIL.Image.new("RGB", (1, 1))  # resized it is as black as in the video's size
            parts.append(negative_texts(settings.negative_prompt, features, black, parts[0].count))
        for part in parts:
            part.check(self.transformer.config)
        return parts

    def _texts(
        self,
        prompt: str | Sequence[str] | None,
        features: tuple[Any, Any, Any],
        image: AnyImage | None,
    ) -> Texts:
        """The prompts, with the images that are encoded among them."""
        if prompt is None:
            return Texts(None, *features)
        prompts, kind = list_of_prompts(prompt), self.transformer.config.image_condition_type
        if kind is None:
            return Texts(prompts, *features)
        if image is None:
            raise ValueError("the text encoder reads the image, too: pass it beside image_latents")
        images = images_of_each(image, len(prompts))
        images *= len(prompts) // len(images)
        return Texts(prompts, *features, images=images, stride=_STRIDES[kind])

    def _image_latents(
        self,
        image: AnyImage | None,
        image_latents: Latents | None,
        prompts: int,
        shape: tuple[int, ...],
    ) -> Float[Array, "_batch _channels 1 _height _width"]:
        """Of one image, or of one for each prompt; as the transformer takes them."""
        if image_latents is None:
            assert image is not None
            assert self.vae is not None
            scale = self.compression.pixels
            size = scale * shape[3], scale * shape[4]
            frames = np.stack([as_frame(each, *size) for each in images_of_each(image, prompts)])
            with in_memory(self.vae) as vae:
                posterior = vae.encode(jnp.asarray(frames)[:, :, None])
                return vae.normalize(posterior.mean.astype(jnp.float32))
        return jnp.asarray(image_latents, jnp.float32)

    def _check_image_latents(
        self, image_latents: Latents | None, prompts: int, shape: tuple[int, ...]
    ) -> None:
        expected = (shape[1], 1, *shape[3:])
        check_shape("image_latents", image_latents, (prompts, *expected), (1, *expected))
