"""CogVideoX from a prompt to a video: 2b, 5b and 1.5, text to video and image to video.

Follows diffusers' CogVideoXPipeline and CogVideoXImageToVideoPipeline (0.42.1) in names and
arithmetic; latents stay float32, where diffusers rounds them to the model's dtype in every step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from svg_jax.config import SparsityConfig
from svg_jax.models import CogVideoXTransformer, T5Encoder
from svg_jax.sampling.denoise import Conditions, denoise, guidance_scales
from svg_jax.sampling.latents import latent_shape, place_image, to_pixels
from svg_jax.sampling.record import SamplingInfo, StepRecord
from svg_jax.sampling.schedulers import (
    Sampler,
    SamplerState,
    Schedule,
    SchedulerConfig,
    initial_noise,
    initial_state,
    make_schedule,
)
from svg_jax.tokenizer import PromptTokenizer

_OFS = 2.0  # the only value that CogVideoX-1.5 image to video was trained with

# Ranks alone: sizes are checked against each other with errors that say what to do.
Embeddings = Float[Array | np.ndarray, "_batch _text_tokens _features"]
Latents = Float[Array | np.ndarray, "_batch _frames _channels _height _width"]


@dataclass(frozen=True, eq=False)
class VideoOutput:
    """What a pipeline returns.

    Attributes:
        frames: Pixels in 0…1, float32 [batch, frames, height, width, 3]; None where the checkpoint
            has a VAE, which is not ported yet, or latents were asked for.
        latents: Float32 [batch, frames, channels, height, width], without padding frames.
        info: What happened on the way.
    """

    frames: Float[np.ndarray, "batch frames height width 3"] | None
    latents: Float[np.ndarray, "batch latent_frames channels latent_height latent_width"]
    info: SamplingInfo


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """All that a run of the denoising loop needs; what `__call__` prepares from its arguments.

    Attributes:
        schedule: All steps.
        state: Initial noise.
        conditions: Encoded prompts and image.
        scales: Guidance scale of every step.
        seed: Of all random numbers after the initial noise.
        padding_frames: Leading latent frames that are dropped at the end (1.5).
    """

    schedule: Schedule
    state: SamplerState
    conditions: Conditions
    scales: Float[np.ndarray, " steps"]
    seed: int
    padding_frames: int


@dataclass(frozen=True, eq=False)
class CogVideoXPipeline:
    """A CogVideoX checkpoint that can be called.

    Attributes:
        transformer: The denoiser.
        scheduler: From scheduler_config.json.
        text_encoder: T5, or None: prompts then come as embeddings.
        tokenizer: T5's, or None.
        has_vae: Whether latents are a VAE's. Without one they are pixels in −1…1.
    """

    transformer: CogVideoXTransformer
    scheduler: SchedulerConfig
    text_encoder: T5Encoder | None = None
    tokenizer: PromptTokenizer | None = None
    has_vae: bool = True

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | int = 6.0,
        guidance_steps: float | int = 1.0,
        use_dynamic_cfg: bool = False,
        scheduler: Sampler | None = None,
        latents: Latents | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        image_latents: Latents | None = None,
        num_videos_per_prompt: int = 1,
        seed: int = 0,
        sparsity: SparsityConfig | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        max_sequence_length: int | None = None,
        output_type: Literal["np", "latent"] = "np",
        callback_on_step_end: Callable[[StepRecord], None] | None = None,
    ) -> VideoOutput:
        """Generates videos; arguments have diffusers' names and meanings.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            negative_prompt: What guidance leads away from; one for all prompts, or one for each.
            height: In pixels. Default: what the checkpoint was trained at (768 for 1.5).
            width: In pixels. Default: likewise (1360 for 1.5).
            num_frames: Frames of the video; with a VAE 4k + 1. Default: as trained.
            num_inference_steps: Denoising steps.
            guidance_scale: Of classifier-free guidance; at most 1 turns it off and halves the work.
            guidance_steps: Share of the steps, from the first on, that pay for guidance.
            use_dynamic_cfg: Vary the guidance scale over the run, as diffusers does.
            scheduler: "ddim" or "dpm". Default: the checkpoint's own.
            latents: Initial noise in place of the seed's, padding frames included.
            prompt_embeds: T5 features [batch, text_tokens, features] in place of prompts.
            negative_prompt_embeds: Likewise for the negative prompt.
            image_latents: The VAE's latents of the first frame [batch, 1, channels, height, width],
                scaled as the model expects them; needed by image-to-video checkpoints.
            num_videos_per_prompt: Videos of each prompt, from noise of their own.
            seed: The same seed gives the same noise on every device.
            sparsity: Sparse VideoGen; None is dense attention.
            labels: Labels to use in place of profiling, True = temporal (see `denoise`).
            max_sequence_length: Text tokens, padding included. Default: the model's.
            output_type: "np", or "latent" for latents alone.
            callback_on_step_end: Called with the record of each step.

        Returns:
            Frames, latents, and what happened on the way.

        Raises:
            ValueError: On arguments that do not fit the checkpoint or each other.
            FloatingPointError: If latents stop being finite.
        """
        run = self.prepare(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            use_dynamic_cfg=use_dynamic_cfg,
            scheduler=scheduler,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image_latents=image_latents,
            num_videos_per_prompt=num_videos_per_prompt,
            seed=seed,
            max_sequence_length=max_sequence_length,
        )
        run, steps = self.denoise(
            run, sparsity=sparsity, labels=labels, callback_on_step_end=callback_on_step_end
        )
        return self.decode(run, SamplingInfo(steps), output_type=output_type)

    def prepare(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | int = 6.0,
        guidance_steps: float | int = 1.0,
        use_dynamic_cfg: bool = False,
        scheduler: Sampler | None = None,
        latents: Latents | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        image_latents: Latents | None = None,
        num_videos_per_prompt: int = 1,
        seed: int = 0,
        max_sequence_length: int | None = None,
    ) -> PreparedRun:
        """The first half of `__call__`: encodes prompts, makes the schedule and the noise."""
        schedule = make_schedule(self.scheduler, num_inference_steps, scheduler)
        scales = guidance_scales(
            schedule.timesteps,
            guidance_scale,
            guidance_steps=guidance_steps,
            use_dynamic_cfg=use_dynamic_cfg,
        )
        config = self.transformer.config
        frame_shape, padding_frames = latent_shape(
            config, has_vae=self.has_vae, num_frames=num_frames, height=height, width=width
        )
        positive, negative = self._encode_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            guided=bool((scales != 1).any()),
            max_sequence_length=max_sequence_length,
        )
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt is at least 1: got {num_videos_per_prompt}")
        positive = positive.repeat(num_videos_per_prompt, axis=0)
        negative = None if negative is None else negative.repeat(num_videos_per_prompt, axis=0)
        shape = (len(positive), *frame_shape)
        self.transformer.layout(shape[1], shape[3], shape[4], positive.shape[1])
        if latents is None:
            if seed < 0:
                raise ValueError(f"seed must not be negative: got {seed}")
            latents = initial_noise(seed, shape)
        elif latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}: got {latents.shape}")
        _check_finite("latents", latents)
        return PreparedRun(
            schedule=schedule,
            state=initial_state(schedule.sampler, jnp.asarray(latents, jnp.float32)),
            conditions=Conditions(
                prompt_embeds=positive,
                negative_prompt_embeds=negative,
                image_latents=self._prepare_image(image_latents, shape),
                ofs=None if config.ofs_embed_dim is None else np.float32(_OFS),
            ),
            scales=scales,
            seed=seed,
            padding_frames=padding_frames,
        )

    def denoise(
        self,
        run: PreparedRun,
        *,
        sparsity: SparsityConfig | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        steps: range | None = None,
        callback_on_step_end: Callable[[StepRecord], None] | None = None,
    ) -> tuple[PreparedRun, tuple[StepRecord, ...]]:
        """Runs all steps, or `steps` of them from the state that `run` is in (see `denoise`)."""
        state, records = denoise(
            self.transformer,
            run.state,
            run.schedule,
            run.conditions,
            scales=run.scales,
            sparsity=sparsity,
            labels=labels,
            seed=run.seed,
            steps=steps,
            callback_on_step_end=callback_on_step_end,
        )
        return dataclasses.replace(run, state=state), records

    def decode(
        self, run: PreparedRun, info: SamplingInfo, *, output_type: Literal["np", "latent"] = "np"
    ) -> VideoOutput:
        """The last part of `__call__`: drops padding frames, and makes pixels of latents."""
        if output_type not in ("np", "latent"):
            raise ValueError(f"output_type is 'np' or 'latent': got {output_type!r}")
        latents = np.asarray(run.state.latents[:, run.padding_frames :])
        frames = None
        if output_type == "np" and not self.has_vae:
            frames = to_pixels(latents)
        return VideoOutput(frames, latents, info)

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
        return _encode(*nnx.split(self.text_encoder), input_ids)

    def _encode_prompts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str],
        prompt_embeds: Embeddings | None,
        negative_prompt_embeds: Embeddings | None,
        *,
        guided: bool,
        max_sequence_length: int | None,
    ) -> tuple[Array, Array | None]:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either a prompt or prompt_embeds")
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
            if not prompts:
                raise ValueError("pass at least one prompt")
            positive = self.encode_prompts(prompts, max_sequence_length)
        else:
            positive = jnp.asarray(prompt_embeds, jnp.float32)
        _check_finite("prompt_embeds", positive)
        if not guided:
            return positive, None
        if negative_prompt_embeds is None:
            if self.text_encoder is None:
                raise ValueError(
                    "this checkpoint has no text encoder: pass negative_prompt_embeds too, "
                    "or a guidance_scale of 1"
                )
            single = isinstance(negative_prompt, str)
            negatives = [negative_prompt] * len(positive) if single else list(negative_prompt)
            negative = self.encode_prompts(negatives, positive.shape[1])
        else:
            negative = jnp.asarray(negative_prompt_embeds, jnp.float32)
        _check_finite("negative_prompt_embeds", negative)
        if negative.shape != positive.shape:
            raise ValueError(
                "the negative prompts must be as many and as long as the prompts: "
                f"got features of {negative.shape} for {positive.shape}"
            )
        return positive, negative

    def _prepare_image(self, image_latents: Latents | None, shape: tuple[int, ...]) -> Array | None:
        config = self.transformer.config
        if config.in_channels == config.out_channels:
            if image_latents is not None:
                raise ValueError("this is a text-to-video checkpoint: it takes no image_latents")
            return None
        if image_latents is None:
            raise ValueError(
                "this is an image-to-video checkpoint and its VAE is not ported yet: "
                "pass the image_latents of its first frame"
            )
        expected = (shape[0], 1, *shape[2:])
        if image_latents.shape != expected:
            raise ValueError(
                f"image_latents must have the shape {expected}: got {image_latents.shape}"
            )
        _check_finite("image_latents", image_latents)
        return place_image(image_latents, shape[1])


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: Any, weights: Any, input_ids: Int[Array, "batch tokens"]) -> Array:
    return nnx.merge(graphdef, weights)(input_ids).astype(jnp.float32)


def _check_finite(name: str, array: Array | np.ndarray) -> None:
    if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"{name} has values that are not finite")
