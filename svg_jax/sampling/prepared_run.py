"""What the steps of a run need: what is planned of it, and the run as one pytree."""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from svg_jax.attention import attend_dense, attend_sparse
from svg_jax.config import Warmup, dense_step_count, share_of
from svg_jax.masks import sparse_mask, warn_of_lost_sparsity
from svg_jax.models import Attend, VideoLayout
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.latents import check_shape, starting_latents
from svg_jax.sampling.memory import check_memory
from svg_jax.sampling.schedules.noise import seed_key, seed_of, step_noise
from svg_jax.sampling.schedules.steps import SamplerState, initial_state
from svg_jax.sampling.schedules.tables import Schedule, make_schedule
from svg_jax.sampling.settings import FlowSettings, RunSettings, SettingError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PreparedRun:
    """What `prepare` makes of a run's settings, and what the loop carries on; a pytree.

    Runs of one shape, guidance and attention can be stacked, leaf by leaf, and given to `jax.vmap`.

    Attributes:
        schedule: All steps.
        state: Initial noise, or the sampler's state after some steps.
        conditions: Encoded prompts and image.
        scales: Guidance scale of every step, static; 1 means that the step is not guided.
        attends: Attention of every step, static.
        key: PRNG key of the rows that profiling samples; the seed can be read from it.
        layout: Where video and text stand in the transformer's sequence, static.
        padding_frames: Number of leading latent frames that are dropped at the end, static
            (CogVideoX-1.5).
        sampler_noise: Noise that DPM adds, [steps, *shape of the latents], in place of the seed's.
        labels: Labels that replace profiling, True = temporal: bool [steps, layers, entries,
            heads]. Entries are those of a guided step ([negative, positive]), or the positive ones
            alone for both. None profiles.
    """

    schedule: Schedule
    state: SamplerState
    conditions: Conditions
    scales: tuple[float, ...] = field(metadata={"static": True})
    attends: tuple[Attend, ...] = field(metadata={"static": True})
    key: Any
    layout: VideoLayout = field(metadata={"static": True})
    padding_frames: int = field(default=0, metadata={"static": True})
    sampler_noise: Any = None
    labels: Any = None

    @cached_property
    def seed(self) -> int:
        """Seed of all random numbers after the initial noise.

        Kept, since reading a key waits for what the device is at: for a step, within the loop.
        """
        return seed_of(self.key)

    def kind_of(self, step: int) -> tuple[Attend, bool]:
        """Tell the attention of a step, and whether the step is guided."""
        return self.attends[step], self.scales[step] != 1

    def dense(self) -> "PreparedRun":
        """Return the same run with dense attention in all steps."""
        return dataclasses.replace(self, attends=(attend_dense,) * len(self.attends), labels=None)

    def with_sampler_noise(self) -> "PreparedRun":
        """Draw the noise that the sampler adds in every step, if it adds any and has none yet."""
        if not self.schedule.draws_noise or self.sampler_noise is not None:
            return self
        steps, shape = range(self.schedule.num_steps), self.state.latents.shape
        noise = np.stack([step_noise(self.seed, step, shape) for step in steps])
        return dataclasses.replace(self, sampler_noise=noise)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RunPlan:
    """What follows from a run's settings and configs, before anything is loaded.

    Attributes:
        settings: Settings of the run, all filled in.
        schedule: See `PreparedRun`.
        scales: See `PreparedRun`.
        attends: See `PreparedRun`.
        labels: See `PreparedRun`.
        shape: Shape of the latents, the batch first.
        padding_frames: See `PreparedRun`.
        text_tokens: Number of tokens of each prompt.
        layout: Layout of the sequence with so many text tokens.
    """

    settings: RunSettings
    schedule: Schedule
    scales: tuple[float, ...]
    attends: tuple[Attend, ...]
    labels: Bool[np.ndarray, "..."] | None
    shape: tuple[int, ...]
    padding_frames: int
    text_tokens: int
    layout: VideoLayout

    @property
    def is_guided(self) -> bool:
        """Whether any step is guided."""
        return any(scale != 1 for scale in self.scales)

    @property
    def seed(self) -> int:
        """Seed of all random numbers."""
        assert self.settings.seed is not None
        return self.settings.seed

    @cached_property
    def noise(self) -> Float[Array, "..."]:
        """Initial latents, float32: those of the settings, or drawn."""
        return starting_latents(self.settings.latents, self.shape, self.seed)

    def run(
        self,
        conditions: Conditions,
        *,
        noise: Float[Array, "..."] | None = None,
        layout: VideoLayout | None = None,
        sampler_noise: Any = None,
    ) -> PreparedRun:
        """Make the run.

        Args:
            conditions: Encoded prompts and image.
            noise: Initial latents in place of the plan's.
            layout: Layout of the sequence in place of the plan's.
            sampler_noise: See `PreparedRun`.

        Raises:
            ValueError: If the density is too small for the text.
        """
        layout = layout or self.layout
        if self.settings.sparsity is not None:
            warn_of_lost_sparsity(layout, self.settings.sparsity)
        return PreparedRun(
            schedule=self.schedule,
            state=initial_state(self.schedule.sampler, self.noise if noise is None else noise),
            conditions=conditions,
            scales=self.scales,
            attends=self.attends,
            key=seed_key(self.seed),
            layout=layout,
            padding_frames=self.padding_frames,
            sampler_noise=sampler_noise,
            labels=self.labels,
        )


def plan_run(
    pipeline: Any,
    settings: RunSettings,
    *,
    guidance_scale: float | int | None,
    use_dynamic_cfg: bool = False,
) -> RunPlan:
    """Compute what follows from settings and configs alone, before anything is loaded.

    Args:
        pipeline: Pipeline of the checkpoint.
        settings: Settings of the run, all filled in.
        guidance_scale: Strength of classifier-free guidance, which families name differently.
        use_dynamic_cfg: See `guidance_scales`.

    Raises:
        ValueError: On what does not fit the checkpoint, or does not fit into memory.
    """
    config, scheduler = pipeline.transformer.config, pipeline.scheduler
    size = settings.num_frames, settings.height, settings.width
    latents, padding_frames = pipeline.latent_shape(*size)
    num_steps, shape = settings.num_inference_steps, (settings.num_videos, *latents)
    text_tokens = settings.max_sequence_length
    if settings.prompt_embeds is not None:
        text_tokens = settings.prompt_embeds.shape[1]
    assert num_steps is not None
    assert text_tokens is not None
    assert guidance_scale is not None
    assert settings.guidance_interval is not None
    layout = pipeline.layout(latents, text_tokens)
    if isinstance(settings, FlowSettings) and settings.flow_shift is not None:
        scheduler = dataclasses.replace(scheduler, shift=float(settings.flow_shift))
    schedule = make_schedule(scheduler, num_steps, settings.scheduler)
    scales = guidance_scales(
        schedule.timesteps,
        guidance_scale,
        interval=settings.guidance_interval,
        use_dynamic_cfg=use_dynamic_cfg,
    )
    check_shape("latents", settings.latents, shape)
    if settings.sparsity is not None:  # a density that leaves nothing is refused
        sparse_mask(layout, settings.sparsity)
    plan = RunPlan(
        settings=settings,
        schedule=schedule,
        scales=tuple(scales.tolist()),
        attends=attends_of(settings, config.num_attention_layers, num_steps),
        labels=labels_of_steps(settings.labels, config, num_steps=num_steps, batch=shape[0]),
        shape=shape,
        padding_frames=padding_frames,
        text_tokens=text_tokens,
        layout=layout,
    )
    video = pipeline.video_size(*size) if pipeline.makes_frames else None
    check_memory(pipeline.transformer, layout, shape, guided=plan.is_guided, video=video)
    return plan


def attends_of(settings: RunSettings, num_layers: int, num_steps: int) -> tuple[Attend, ...]:
    """Choose the attention of each step: dense, sparse after its warm-up, or the caller's own.

    Args:
        settings: Settings of the run.
        num_layers: Number of the model's attention layers.
        num_steps: Number of steps in the schedule.
    """
    if settings.attend is not None:
        return (settings.attend,) * num_steps
    if settings.sparsity is None:
        return (attend_dense,) * num_steps
    warmup = settings.warmup or Warmup()
    sparse = attend_sparse(settings.sparsity, num_layers, warmup=warmup)
    dense_steps = dense_step_count(warmup, num_steps)
    return (attend_dense,) * dense_steps + (sparse,) * (num_steps - dense_steps)


def labels_of_steps(
    labels: Bool[Array | np.ndarray, "..."] | None, config: Any, *, num_steps: int, batch: int
) -> Bool[np.ndarray, "steps layers entries heads"] | None:
    """Give every step its labels.

    Args:
        labels: Labels [layers, entries, heads] for all steps, or with an axis of steps before
            these; or None.
        config: The transformer's config.
        num_steps: Number of steps in the schedule.
        batch: Number of videos.

    Raises:
        SettingError: If they do not fit.
    """
    if labels is None:
        return None
    labels = np.asarray(labels)
    layers, heads = config.num_attention_layers, config.num_attention_heads
    if labels.ndim not in (3, 4) or (labels.ndim == 4 and len(labels) != num_steps):
        raise SettingError(
            "labels",
            "are [layers, entries, heads] or [steps, layers, entries, heads] with "
            f"{num_steps} steps: got {labels.shape}",
        )
    if labels.shape[-2] not in (batch, 2 * batch):
        raise SettingError(
            "labels", f"have {labels.shape[-2]} batch entries, not {batch} or {2 * batch}"
        )
    if (labels.shape[-3], labels.shape[-1]) != (layers, heads):
        raise SettingError(
            "labels", f"are of {layers} layers and {heads} heads: got {labels.shape}"
        )
    return np.broadcast_to(labels, (num_steps, *labels.shape[-3:]))


def guidance_scales(
    timesteps: np.ndarray,
    guidance_scale: float | int,
    *,
    interval: tuple[float | int, float | int] = (0.0, 1.0),
    use_dynamic_cfg: bool = False,
) -> Float[np.ndarray, " steps"]:
    """Compute the guidance scale of every step, float64; 1 means that the step is not guided.

    Args:
        timesteps: Timesteps of the schedule.
        guidance_scale: Strength of guidance as in diffusers; 1 or less turns it off.
        interval: Shares of the steps between which steps are guided: (0, 0.3) is the first 30 %.
        use_dynamic_cfg: Whether the scale follows diffusers' formula, which compares the timestep
            (0 to 999) with the number of steps.
    """
    start, end = interval
    num_steps = len(timesteps)
    scales = np.full(num_steps, max(float(guidance_scale), 1.0))
    if use_dynamic_cfg and guidance_scale > 1:
        for step, timestep in enumerate(timesteps.tolist()):
            # In Python's float64: in float32 the cosine of these large angles is noise.
            angle = math.pi * ((num_steps - timestep) / num_steps) ** 5.0
            scales[step] = 1 + guidance_scale * ((1 - math.cos(angle)) / 2)
    scales[: share_of(start, num_steps)] = scales[share_of(end, num_steps) :] = 1.0
    return scales
