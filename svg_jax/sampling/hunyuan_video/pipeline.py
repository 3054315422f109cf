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
from jaxtyping import Array, Bool, Float, Int

from svg_jax.media.images import AnyImage, as_frame, images_of_each
from svg_jax.models import HunyuanVideoTransformer, HunyuanVideoVAE
from svg_jax.models.vae_tiling import Tiling
from svg_jax.sampling.components import Lazy, in_memory
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.denoising import guidance_scales
from svg_jax.sampling.hunyuan_video.conditions import (
    call_model,
    embedded_guidance,
    image_channels,
)
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders, Texts, negative_texts
from svg_jax.sampling.latents import (
    RELEASED,
    Compression,
    check_shape,
    is_480p,
    latent_grid,
    starting_latents,
)
from svg_jax.sampling.memory import check_memory
from svg_jax.sampling.pipeline import (
    OutputType,
    VideoOutput,
    VideoPipeline,
    with_settings,
)
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.prompt_features import list_of_prompts
from svg_jax.sampling.records import SamplingInfo
from svg_jax.sampling.schedules.config import Sampler, SchedulerConfig
from svg_jax.sampling.schedules.noise import seed_key
from svg_jax.sampling.schedules.steps import initial_state
from svg_jax.sampling.schedules.tables import make_schedule
from svg_jax.sampling.settings import SettingError

_FRAMES, _HEIGHT, _WIDTH = 129, 720, 1280
_NOISE = np.float32(0.999)  # share of noise in the initial latents where there is an image
_STRIDES = {"latent_concat": 2, "token_replace": 4}  # every so manieth image feature is kept

# Ranks alone: sizes are checked against each other with errors that say what to do.
Embeddings = Float[Array | np.ndarray, "_batch _text_tokens _features"]
Pooled = Float[Array | np.ndarray, "_batch _features"]
Mask = (
    Int[Array | np.ndarray, "_batch _text_tokens"]
    | Bool[Array | np.ndarray, "_batch _text_tokens"]
    | Float[Array | np.ndarray, "_batch _text_tokens"]
)
Latents = Float[Array | np.ndarray, "_batch _channels _frames _height _width"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HunyuanVideoPipeline(VideoPipeline):
    """A HunyuanVideo checkpoint that can be called.

    Attributes:
        transformer: The denoiser; its config says what it does with an image.
        vae: See `VideoPipeline`.
        scheduler: From scheduler_config.json.
        encoders: Of prompts, and of an image as a part of them.
    """

    frame_rate: ClassVar[float] = 24.0

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
        return {"num_inference_steps": 50, "guidance_scale": guidance}

    @with_settings
    def prepare(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: AnyImage | None = None,
        height: int = _HEIGHT,
        width: int = _WIDTH,
        num_frames: int = _FRAMES,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        true_cfg_scale: float | int = 1.0,
        guidance_interval: tuple[float | int, float | int] | None = None,
        scheduler: Sampler | None = None,
        flow_shift: float | int | None = None,
        latents: Latents | None = None,
        prompt_embeds: Embeddings | None = None,
        pooled_prompt_embeds: Pooled | None = None,
        prompt_attention_mask: Mask | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        negative_pooled_prompt_embeds: Pooled | None = None,
        negative_prompt_attention_mask: Mask | None = None,
        image_latents: Latents | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = 0,
        max_sequence_length: int = 256,
    ) -> PreparedRun:
        """Do the first part of `__call__`: encode prompts and image, make schedule and noise.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            negative_prompt: What guidance leads away from; one for all prompts, or one for each.
            image: With image to video, what the video begins with: one for all prompts, or one for
                each, as paths, Pillow's images or arrays (see `svg_jax.media.images.as_image`).
                It is stretched to the video's size.
            height: Height in pixels, a multiple of 16.
            width: Width in pixels, a multiple of 16.
            num_frames: Frames of the video, 4k + 1. The 33-channel image model returns four less.
            num_inference_steps: Denoising steps. Default: the folder's, or 50.
            guidance_scale: Guidance that the model was distilled to take as an input; costs
                nothing. Default: the folder's, or 6, and 1 for image to video, as in diffusers;
                the authors run image to video with 6. The 33-channel image model takes none.
            true_cfg_scale: Strength of classifier-free guidance, which needs a negative prompt and
                doubles the work; at most 1 turns it off.
            guidance_interval: Shares of the steps between which true_cfg_scale is computed:
                (0, 0.3) is the first 30 %. Default: the folder's, or all.
            scheduler: "euler" or "unipc". Default: the checkpoint's own, Euler.
            flow_shift: Moves the steps towards noise. Default: the checkpoint's own, 7.
            latents: Initial noise in place of the seed's.
            prompt_embeds: Features [batch, text_tokens, features] in place of prompts; they need
                the other two of the prompt.
            pooled_prompt_embeds: CLIP's features of the whole prompt [batch, features].
            prompt_attention_mask: 1 at each token of `prompt_embeds`, 0 at the padding behind.
            negative_prompt_embeds: Features of the negative prompt, maybe of another length.
            negative_pooled_prompt_embeds: CLIP's features of the negative prompt.
            negative_prompt_attention_mask: Mask of `negative_prompt_embeds`.
            image_latents: The VAE's latents of the image [batch, channels, 1, height, width],
                scaled as the model expects them, in place of encoding it.
            num_videos_per_prompt: Videos of each prompt, from noise of their own.
            seed: The same seed, from 0 to 2^64 − 1, gives the same noise on every device. None
                draws one, which the outcome's `info` has.
            max_sequence_length: Text tokens, padding included.

        Raises:
            ValueError: On arguments that do not fit the checkpoint or each other.
        """
        assert num_inference_steps is not None
        assert guidance_interval is not None
        assert seed is not None
        shift = self.scheduler.shift if flow_shift is None else float(flow_shift)
        schedule = make_schedule(
            replace(self.scheduler, shift=shift), num_inference_steps, scheduler
        )
        scales = guidance_scales(
            schedule.timesteps, true_cfg_scale, guidance_interval=guidance_interval
        )
        config = self.transformer.config
        frame_shape = self._latent_shape(num_frames, height, width)
        guidance = embedded_guidance(
            guidance_scale, self.transformer.dtype, takes_one=config.guidance_embeds
        )
        self._check_image(image, image_latents)
        features = prompt_embeds, prompt_attention_mask, pooled_prompt_embeds
        parts = [self._texts(prompt, features, image)]
        if (scales != 1).any():
            features = (
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                negative_pooled_prompt_embeds,
            )
            black = PIL.Image.new("RGB", (1, 1))  # resized it is as black as in the video's size
            parts.append(negative_texts(negative_prompt, features, black, parts[0].count))
        for part in parts:
            part.check(config)
        shape = (parts[0].count * num_videos_per_prompt, *frame_shape)
        tokens = max_sequence_length if prompt_embeds is None else prompt_embeds.shape[1]
        check_memory(
            self.transformer,
            config.layout(*shape[2:], tokens),
            shape,
            guided=len(parts) > 1,
            video=(num_frames, height, width) if self.makes_frames else None,
        )
        self._check_image_latents(image_latents, parts[0].count, shape)
        noise = starting_latents(latents, shape, seed)
        first_frame = channels = None
        if config.image_condition_type is not None:
            encoded = self._image_latents(image, image_latents, parts[0].count, shape)
            encoded = jnp.repeat(encoded, len(noise) // len(encoded), axis=0)
            noise = noise * _NOISE + encoded * (1 - _NOISE)
            if config.image_condition_type == "token_replace":
                noise, first_frame = noise[:, :, 1:], encoded
            else:
                channels = image_channels(encoded, shape[2])
        encoded_parts = self.encoders.encode(parts, max_sequence_length)
        text, *negative = [each.repeated(num_videos_per_prompt) for each in encoded_parts]
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
            key=seed_key(seed),
            layout=config.layout(*shape[2:], text.embeds.shape[1]),
        )

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `VideoPipeline.video_size`; the 33-channel image model leaves the image out."""
        frames = _FRAMES if num_frames is None else num_frames
        if self.transformer.config.image_condition_type == "latent_concat":
            frames -= self.compression.frames
        return (
            frames,
            _HEIGHT if height is None else height,
            _WIDTH if width is None else width,
        )

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

    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Videos [batch, 3, frames, height, width] of latents, about from −1 to 1."""
        assert self.vae is not None
        with in_memory(self.vae) as vae:
            tiling = Tiling() if vae_tiling else None
            return vae.decode(vae.denormalize(latents), tiling=tiling)

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
