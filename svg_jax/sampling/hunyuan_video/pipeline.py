"""HunyuanVideo from a prompt to a video, and both of its models from an image to a video.

Follows diffusers' HunyuanVideoPipeline and HunyuanVideoImageToVideoPipeline (0.42.1) in names and
arithmetic; latents stay float32, where diffusers rounds them to the model's dtype in every step.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float

from svg_jax.media.images import as_frame, images_of_each
from svg_jax.models import HunyuanVideoTransformer, HunyuanVideoVAE, VideoLayout
from svg_jax.sampling.components import Component, in_memory
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.hunyuan_video.conditions import call_model, embedded_guidance, image_channels
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders, Texts, negative_texts
from svg_jax.sampling.hunyuan_video.settings import HunyuanVideoSettings
from svg_jax.sampling.latents import check_shape, is_480p, latent_grid
from svg_jax.sampling.pipeline import VideoOutput, VideoPipeline
from svg_jax.sampling.prepared_run import PreparedRun, plan_run
from svg_jax.sampling.prompt_features import list_of_prompts, repeat_each
from svg_jax.sampling.records import SamplingInfo
from svg_jax.sampling.settings import RunSettings, SettingError
from svg_jax.sampling.settings.run import OutputType
from svg_jax.stages import stage

_FRAMES, _HEIGHT, _WIDTH = 129, 720, 1280
_TEXT_TOKENS = 256
_NOISE = np.float32(0.999)  # share of noise in the initial latents where there is an image
_STRIDES = {"latent_concat": 2, "token_replace": 4}  # one image feature in so many is kept


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HunyuanVideoPipeline(VideoPipeline[HunyuanVideoSettings]):
    """A HunyuanVideo checkpoint that can be called.

    Attributes:
        transformer: See `VideoPipeline`; its config says what it does with an image.
        vae: See `VideoPipeline`.
        encoders: Encoders of prompts, and of an image as a part of them.
    """

    frame_rate: ClassVar[float] = 24.0
    settings_class: ClassVar[type[RunSettings]] = HunyuanVideoSettings

    transformer: Component[HunyuanVideoTransformer]
    vae: Component[HunyuanVideoVAE] | None = None
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

    @stage("encoding")
    def prepare(self, settings: HunyuanVideoSettings) -> PreparedRun:
        """See `VideoPipeline.prepare`."""
        settings = self.completed(settings)
        assert settings.max_sequence_length is not None
        config = self.transformer.config
        plan = plan_run(self, settings, guidance_scale=settings.true_cfg_scale)
        guidance = embedded_guidance(
            settings.guidance_scale, self.transformer.dtype, takes_one=config.guidance_embeds
        )
        self._check_image(settings, plan.shape)
        parts = self._all_texts(settings, guided=plan.is_guided)
        noise, first_frame, channels = plan.noise, None, None
        if config.image_condition_type is not None:
            encoded = self._image_latents(settings, noise.shape)
            noise = noise * _NOISE + encoded * (1 - _NOISE)
            if config.image_condition_type == "token_replace":
                noise, first_frame = noise[:, :, 1:], encoded
            else:
                channels = image_channels(encoded, noise.shape[2])
        encoded_parts = self.encoders.encode(parts, settings.max_sequence_length)
        text, *negative = repeat_each(encoded_parts, settings.num_videos_per_prompt)
        conditions = Conditions(
            call=call_model,
            text=text,
            negative_text=negative[0] if negative else None,
            number=guidance,
            first_frame=first_frame,
            channels=channels,
        )
        # Features of an image count as text: their number is known once prompts are encoded.
        layout = self.layout(plan.shape[1:], text.embeds.shape[1])
        return plan.run(conditions, noise=noise, layout=layout)

    def latent_shape(
        self, num_frames: int, height: int, width: int
    ) -> tuple[tuple[int, int, int, int], int]:
        """See `VideoPipeline.latent_shape`: channels, frames, height and width."""
        config, compression = self.transformer.config, self.compression
        grid = latent_grid(
            num_frames, height, width, compression=compression, patch_size=config.patch_size
        )
        if config.image_condition_type is not None and num_frames == 1:
            raise SettingError(
                "num_frames", f"behind an image must be at least {1 + compression.frames}: got 1"
            )
        return (config.out_channels, *grid), 0

    def layout(self, latents: tuple[int, ...], text_tokens: int) -> VideoLayout:
        """See `VideoPipeline.layout`."""
        _, frames, rows, columns = latents
        return self.transformer.config.layout(frames, rows, columns, text_tokens)

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

    def _check_image(self, settings: HunyuanVideoSettings, shape: tuple[int, ...]) -> None:
        """Raise ValueError if the image of a run does not fit the checkpoint."""
        image, image_latents = settings.image, settings.image_latents
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
        expected = (shape[1], 1, *shape[3:])
        check_shape(
            "image_latents", image_latents, (settings.num_prompts, *expected), (1, *expected)
        )

    def _all_texts(self, settings: HunyuanVideoSettings, *, guided: bool) -> list[Texts]:
        """Take the prompts and, if any step is guided, the negative ones."""
        parts = [self._texts(settings)]
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

    def _texts(self, settings: HunyuanVideoSettings) -> Texts:
        """Take the prompts, with the images that are encoded among them."""
        features = (
            settings.prompt_embeds,
            settings.prompt_attention_mask,
            settings.pooled_prompt_embeds,
        )
        if settings.prompt is None:
            return Texts(None, *features)
        prompts = list_of_prompts(settings.prompt)
        kind = self.transformer.config.image_condition_type
        if kind is None:
            return Texts(prompts, *features)
        if settings.image is None:
            raise ValueError("the text encoder reads the image, too: pass it beside image_latents")
        images = images_of_each(settings.image, len(prompts))
        images *= len(prompts) // len(images)
        return Texts(prompts, *features, images=images, stride=_STRIDES[kind])

    def _image_latents(
        self, settings: HunyuanVideoSettings, shape: tuple[int, ...]
    ) -> Float[Array, "videos channels 1 height width"]:
        """Encode the image of a run, or take its latents, for each video."""
        latents = settings.image_latents
        if latents is None:
            assert self.vae is not None
            scale = self.compression.pixels
            size = scale * shape[3], scale * shape[4]
            images = images_of_each(settings.image, settings.num_prompts)
            frames = np.stack([as_frame(image, *size) for image in images])
            with in_memory(self.vae) as vae:
                posterior = vae.encode(jnp.asarray(frames)[:, :, None])
                latents = vae.normalize(posterior.mean.astype(jnp.float32))
        return jnp.repeat(jnp.asarray(latents, jnp.float32), shape[0] // len(latents), axis=0)
