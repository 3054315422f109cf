"""What the families' pipelines share: prepare, denoise, decode, and when weights are loaded."""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from svg_jax.config import PAPER_PRESETS, SparsityConfig
from svg_jax.models import VideoLayout
from svg_jax.sampling.checkpoint import RunFile, make_fingerprint, open_run_file, saving
from svg_jax.sampling.denoise import Conditions, denoise
from svg_jax.sampling.flow import FlowSchedule, FlowState
from svg_jax.sampling.record import SamplingInfo, StepRecord
from svg_jax.sampling.schedulers import SamplerState, Schedule, initial_noise

OutputType = Literal["np", "uint8", "latent"]
Module = TypeVar("Module", bound=nnx.Module)


@dataclass(frozen=True, eq=False)
class Lazy(Generic[Module]):
    """A component that is loaded where it is used and freed behind it.

    Attributes:
        config: Of the module.
        dtype: Of its matrix products.
        load: Loads it onto the default device.
    """

    config: Any
    dtype: Any
    load: Callable[[], Module]


@contextmanager
def in_memory(component: Module | Lazy[Module]) -> Iterator[Module]:
    """The module of a component, for as long as the block lasts if it has to be loaded for it."""
    yield component.load() if isinstance(component, Lazy) else component


def loading_once(pipeline: Any) -> Any:
    """A copy whose components are loaded at most once, and freed with the copy.

    For several runs: one copy encodes all prompts and is dropped before another loads the
    transformer.
    """
    if isinstance(pipeline, Lazy):
        return dataclasses.replace(pipeline, load=cache(pipeline.load))
    if not dataclasses.is_dataclass(pipeline) or isinstance(pipeline, type):
        return pipeline
    parts = {field.name: getattr(pipeline, field.name) for field in dataclasses.fields(pipeline)}
    copies = {name: loading_once(part) for name, part in parts.items()}
    changed = {name: copy for name, copy in copies.items() if copy is not parts[name]}
    return dataclasses.replace(pipeline, **changed) if changed else pipeline


def run_encoder(encoder: nnx.Module, *inputs: Array, **options: int) -> Any:
    """What an encoder makes of its inputs, compiled, every array of it in float32.

    Args:
        encoder: The module.
        *inputs: What it is called with.
        **options: Settings that it is compiled for.
    """
    return _run_encoder(*nnx.split(encoder), inputs, tuple(options.items()))


@partial(jax.jit, static_argnums=(0, 3))
def _run_encoder(graphdef: Any, weights: Any, inputs: tuple[Array, ...], options: Any) -> Any:
    out = nnx.merge(graphdef, weights)(*inputs, **dict(options))
    return jax.tree.map(lambda array: array.astype(jnp.float32), out)


@dataclass(frozen=True, eq=False)
class VideoOutput:
    """What a pipeline returns.

    Attributes:
        frames: Pixels, float32 in 0…1 or uint8; None where latents were asked for, or where the
            checkpoint was converted without its VAE.
        latents: Float32 in the transformer's order, without padding frames.
        info: What happened on the way.
    """

    frames: (
        Float[np.ndarray, "batch frames height width 3"]
        | UInt8[np.ndarray, "batch frames height width 3"]
        | None
    )
    latents: Float[np.ndarray, "batch _ _ latent_height latent_width"]
    info: SamplingInfo


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """All that a run of the denoising loop needs; what `prepare` makes of its arguments.

    Attributes:
        schedule: All steps.
        state: Initial noise.
        conditions: Encoded prompts and image.
        scales: Guidance scale of every step.
        seed: Of all random numbers after the initial noise.
        layout: Where video and text stand in the transformer's sequence.
        padding_frames: Leading latent frames that are dropped at the end (CogVideoX-1.5).
        sampler_noise: See `denoise`.
    """

    schedule: Schedule | FlowSchedule
    state: SamplerState | FlowState
    conditions: Conditions
    scales: Float[np.ndarray, " steps"]
    seed: int
    layout: VideoLayout
    padding_frames: int = 0
    sampler_noise: Float[np.ndarray, "..."] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoPipeline(ABC):
    """A checkpoint that can be called; a class for each family says how it is prepared.

    Attributes:
        transformer: The denoiser.
        vae: Decodes latents, and encodes images; None where the checkpoint was converted without
            it: the outcome is then latents.
        weights: Digest of the folder that it was loaded from, by which a saved run is known to be
            of the same weights; None if it was put together otherwise.
    """

    frame_rate: ClassVar[float] = 8.0  # frames per second that the family was trained at

    transformer: Any
    vae: Any = None
    weights: str | None = None

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        sparsity: SparsityConfig | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        output_type: OutputType = "np",
        vae_tiling: bool = False,
        callback_on_step_end: Callable[[StepRecord], None] | None = None,
        state_file: str | Path | None = None,
        save_every: int = 5,
        resume: bool = False,
        **arguments: Any,
    ) -> VideoOutput:
        """Generates videos; arguments have diffusers' names and meanings.

        With a `state_file` a run survives what ends its process: it is saved there every few steps
        and at an exception, and the same call with `resume` goes on from there, with the same
        outcome bit for bit on the same device. The file goes when the call returns, for then the
        outcome is in the caller's hands.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            sparsity: Sparse VideoGen; None is dense attention.
            labels: Labels to use in place of profiling, True = temporal (see `denoise`).
            output_type: "np" for frames in 0…1, "uint8", or "latent" for latents alone.
            vae_tiling: Decode by the released tiles: less memory, and not quite the same frames.
            callback_on_step_end: Called with the record of each step that this call computes.
            state_file: Where to save the run's state; None saves nothing.
            save_every: Steps from one save to the next; 0 saves nothing.
            resume: Go on from the state that is there; starts as usual if there is none.
            **arguments: Of the family's `prepare`: size, steps, guidance, seed, image and so on.

        Returns:
            Frames, latents, and what happened on the way.

        Raises:
            ValueError: On arguments that do not fit the checkpoint or each other, or a state that
                is damaged or another run's; says what differs.
            FileExistsError: If there is a state, and it is not to be resumed.
            FloatingPointError: If latents stop being finite.
        """
        if output_type not in ("np", "uint8", "latent"):  # before the work, not after it
            raise ValueError(f"output_type is 'np', 'uint8' or 'latent': got {output_type!r}")
        file = None
        if state_file is not None:
            settings = self.fingerprint(prompt, sparsity=sparsity, labels=labels, **arguments)
            file = open_run_file(state_file, settings, save_every=save_every, resume=resume)
        run = self.prepare(prompt, **arguments)
        run, steps = self.denoise(
            run,
            sparsity=sparsity,
            labels=labels,
            file=file,
            callback_on_step_end=callback_on_step_end,
        )
        info = SamplingInfo(steps)
        video = self.decode(run, info, output_type=output_type, vae_tiling=vae_tiling)
        if file is not None:
            file.remove()
        return video

    def fingerprint(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        sparsity: SparsityConfig | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """What determines the outcome of a call with these arguments, and of no other, as JSON."""
        given = inspect.signature(self.prepare).bind(prompt, **arguments)
        given.apply_defaults()
        return make_fingerprint(
            **given.arguments,
            sparsity=sparsity,
            labels=labels,
            dtype=np.dtype(self.transformer.dtype).name,
            weights=self.weights,
        )

    @abstractmethod
    def paper_preset(self, height: int | None = None, width: int | None = None) -> str | None:
        """The paper's setting for this model, by its name in PAPER_PRESETS; None has none.

        Args:
            height: Of the video, in pixels. Default: as `prepare`'s.
            width: Likewise.
        """

    def paper_sparsity(self, height: int | None = None, width: int | None = None) -> SparsityConfig:
        """The paper's sparsity for this model and size; the general default where it has none.

        As in `pipe(prompt, sparsity=pipe.paper_sparsity())`, or with another density
        `dataclasses.replace(pipe.paper_sparsity(), density=0.2)`.

        Args:
            height: Of the video, in pixels. Default: as `prepare`'s.
            width: Likewise.
        """
        name = self.paper_preset(height, width)
        return SparsityConfig() if name is None else PAPER_PRESETS[name]

    @property
    def default_steps(self) -> int:
        """Denoising steps that `prepare` takes unless told, the authors' own."""
        return 50

    @abstractmethod
    def prepare(self, prompt: str | Sequence[str] | None = None, **arguments: Any) -> PreparedRun:
        """The first part of `__call__`: encodes prompts, makes the schedule and the noise."""

    def denoise(
        self,
        run: PreparedRun,
        *,
        sparsity: SparsityConfig | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        steps: range | None = None,
        file: RunFile | None = None,
        callback_on_step_end: Callable[[StepRecord], None] | None = None,
    ) -> tuple[PreparedRun, tuple[StepRecord, ...]]:
        """Runs all steps, or `steps` of them from the state that `run` is in (see `denoise`).

        With a `file` it goes on from what is saved there, and saves; the records are then those of
        the saved steps, too.
        """
        state, done = run.state, ()
        if file is not None:
            if steps is not None:
                raise ValueError("a saved run knows its steps: pass either steps or a file")
            if file.saved is not None:
                state, done = file.saved.state_like(state), file.records
            steps = range(len(done), run.schedule.num_steps)
        if steps is not None and not steps:  # nothing to load the transformer for
            return dataclasses.replace(run, state=state), done
        save_run = nullcontext() if file is None else saving(file)
        with save_run as save, in_memory(self.transformer) as transformer:
            state, records = denoise(
                transformer,
                state,
                run.schedule,
                run.conditions,
                scales=run.scales,
                sparsity=sparsity,
                labels=labels,
                seed=run.seed,
                sampler_noise=run.sampler_noise,
                steps=steps,
                save=save,
                callback_on_step_end=callback_on_step_end,
            )
        return dataclasses.replace(run, state=state), done + records

    def decode(
        self,
        run: PreparedRun,
        info: SamplingInfo,
        *,
        output_type: OutputType = "np",
        vae_tiling: bool = False,
    ) -> VideoOutput:
        """The last part of `__call__`: drops padding frames, and makes pixels of latents."""
        latents = self.finished_latents(run)
        frames = None
        if output_type != "latent" and self.makes_frames:
            frames = to_frames(self.decode_latents(latents, vae_tiling=vae_tiling))
            if output_type == "uint8":
                frames = (frames * 255).round().astype(np.uint8)
        return VideoOutput(frames, np.asarray(latents), info)

    def finished_latents(self, run: PreparedRun) -> Array:
        """The latents of a video, of a run after its last step."""
        return run.state.latents

    @property
    def makes_frames(self) -> bool:
        """Whether there is what decodes latents."""
        return self.vae is not None

    @abstractmethod
    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Videos [batch, 3, frames, height, width] of latents, about from −1 to 1."""


def is_480p(height: int, width: int) -> bool:
    """Whether a video is nearer to 480 × 832 pixels than to 720 × 1280, by their number."""
    return 2 * height * width < 480 * 832 + 720 * 1280


def to_frames(
    video: Float[Array | np.ndarray, "batch 3 frames height width"],
) -> Float[np.ndarray, "batch frames height width 3"]:
    """A video from −1 to 1 as pixels in 0…1, float32."""
    video = np.moveaxis(np.asarray(video, np.float32), 1, -1)
    return np.clip(video / 2 + np.float32(0.5), 0, 1)


def starting_latents(
    latents: Array | np.ndarray | None, shape: tuple[int, ...], seed: int
) -> Float[Array, "..."]:
    """Initial noise: what was given, or the seed's; float32.

    Raises:
        ValueError: On given noise of another shape or that is not finite, or a negative seed.
    """
    if latents is None:
        if seed < 0:
            raise ValueError(f"seed must not be negative: got {seed}")
        return jnp.asarray(initial_noise(seed, shape))
    if latents.shape != shape:
        raise ValueError(f"latents must have the shape {shape}: got {latents.shape}")
    check_finite("latents", latents)
    return jnp.asarray(latents, jnp.float32)


def check_finite(name: str, array: Array | np.ndarray) -> None:
    """ValueError if a given array holds NaN or infinity."""
    if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"{name} has values that are not finite")


def check_videos_per_prompt(count: int) -> None:
    """ValueError unless there is to be a video of each prompt."""
    if count < 1:
        raise ValueError(f"num_videos_per_prompt is at least 1: got {count}")


def repeat_each(array: Array | None, times: int) -> Array | None:
    """Every batch entry so many times, for several videos of a prompt."""
    return None if array is None else jnp.repeat(array, times, axis=0)
