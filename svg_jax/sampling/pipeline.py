"""What the families' pipelines share: prepare, denoise, decode, and when weights are loaded."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from jaxtyping import Array

from svg_jax.config import PAPER_PRESETS, Preset, SparsityConfig, Warmup
from svg_jax.convert.formats.values import shown
from svg_jax.convert.run_defaults import RunDefaults
from svg_jax.models import Tiling, VideoLayout
from svg_jax.sampling.components import Component, component_names, in_memory
from svg_jax.sampling.denoising import denoise
from svg_jax.sampling.identity import identity_of, make_fingerprint
from svg_jax.sampling.latents import RELEASED, Compression, to_frames
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import SamplingInfo, StepRecord, VideoOutput
from svg_jax.sampling.run_state import RunFile, damaged, open_run_file, saved_fingerprint, saving
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.settings import RunSettings, SettingError, settings_of, with_values
from svg_jax.sampling.settings.run import OutputType, draw_seed, few_steps_note
from svg_jax.stages import stage

_LOGGER = logging.getLogger(__name__)
_NO_DEFAULTS = RunDefaults()
Settings = TypeVar("Settings", bound=RunSettings)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VideoPipeline(ABC, Generic[Settings]):
    """A checkpoint that can be called; each family has a class that prepares its runs.

    Attributes:
        transformer: Denoiser.
        scheduler: Content of scheduler_config.json.
        vae: Autoencoder that decodes latents and encodes images; None where the checkpoint was
            converted without it: the outcome is then latents.
        weights: Digest of the folder that the pipeline was loaded from, by which a saved run is
            recognised; None if it was put together otherwise.
        defaults: Settings that the folder asks for; they go before the authors'.
    """

    frame_rate: ClassVar[float] = 8.0  # frames per second that the family was trained at
    settings_class: ClassVar[type[RunSettings]]  # what a run of the family is asked for

    transformer: Any
    scheduler: SchedulerConfig
    vae: Component[Any] | None = None
    weights: str | None = None
    defaults: RunDefaults = _NO_DEFAULTS

    def __repr__(self) -> str:
        config, dtype = self.transformer.config, np.dtype(self.transformer.dtype).name
        size = f"{config.num_attention_layers} layers of width "
        size += str(config.num_attention_heads * config.attention_head_dim)
        others = ", ".join(name for name in component_names(self) if name != "transformer")
        return f"{type(self).__name__}({size} in {dtype}; with {others or 'no other component'})"

    def __call__(self, prompt: Any = None, **arguments: Any) -> VideoOutput:
        """Generate videos; arguments have diffusers' names and meanings.

        With a `state_file` a run survives what ends its process: it is saved there every few steps
        and at an exception, and the same call with `resume` continues it, with the same outcome bit
        for bit on the same device. The file is removed when the call returns.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            **arguments: Fields of the family's settings (`help(pipe.settings_class)`): size, steps,
                guidance, seed, image, sparsity and so on.

        Returns:
            Frames, latents and a record of every step.

        Raises:
            SettingError: On settings that no run can have, or that the family does not have.
            ValueError: On what does not fit the checkpoint, or a state that is damaged or another
                run's; says what differs.
            FileExistsError: If there is a state and `resume` is not set.
            FloatingPointError: If latents stop being finite.
        """
        settings = self.settings(prompt, **arguments)
        if settings.sparsity is not None:
            assert settings.num_inference_steps is not None
            note = few_steps_note(settings.warmup or Warmup(), settings.num_inference_steps)
            if note is not None:
                _LOGGER.warning(note)
        file = None if settings.state_file is None else self.open_run_file(settings)
        run, records = self.denoise(
            self.prepare(settings), file=file, callback_on_step_end=settings.callback_on_step_end
        )
        video = self.decode(
            run,
            SamplingInfo(records),
            output_type=settings.output_type,
            vae_tiling=settings.vae_tiling,
        )
        if file is not None:
            file.remove()
        return video

    def settings(self, prompt: Any = None, **arguments: Any) -> Settings:
        """Make the settings of a call with these arguments: checked, with all defaults filled in.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            **arguments: Other fields of `settings_class`.

        Raises:
            SettingError: On values that no run can have, and on fields that the family does not
                have (`UnknownSettingError`, which is a TypeError, too).
            ValueError: If an image cannot be read.
        """
        made: Any = self.settings_class.of({"prompt": prompt, **arguments})
        return self.completed(made)

    def completed(self, settings: Settings) -> Settings:
        """Fill in settings that are None: as the model's folder says, or else the authors.

        A seed of None becomes that of the saved run that is to be resumed; or it is drawn.

        Raises:
            SettingError: If they are another family's.
        """
        if not isinstance(settings, self.settings_class):
            name = self.settings_class.__name__
            raise SettingError(
                "settings", f"must be what pipe.settings() makes, {name}: got {shown(settings)}"
            )
        known = settings_of(self.settings_class)
        defaults = {"guidance_interval": (0.0, 1.0)} | self.authors_settings | self.defaults.given()
        chosen = {
            name: value
            for name, value in defaults.items()
            if name in known and getattr(settings, name) is None
        }
        if settings.sparsity is not None and settings.warmup is None:
            chosen["warmup"] = Warmup()
        if settings.seed is None:
            chosen["seed"] = self._seed_of(settings)
        return with_values(settings, **chosen)

    def _seed_of(self, settings: Settings) -> int:
        """Read the seed of the saved run that is to be resumed; or draw one."""
        if settings.resume and settings.state_file is not None:
            saved = saved_fingerprint(settings.state_file)
            if saved:
                return saved.get("seed", RunSettings.seed)
        seed = draw_seed()
        _LOGGER.warning("the seed %d was drawn", seed)
        return seed

    def fingerprint(self, settings: Settings) -> dict[str, Any]:
        """Collect everything that the latents of a run depend on, as JSON.

        Args:
            settings: Settings of the run, with a seed.
        """
        settings = self.completed(settings)
        return make_fingerprint(
            **identity_of(settings),
            dtype=np.dtype(self.transformer.dtype).name,
            weights=self.weights,
            model_scheduler=self.scheduler,
        )

    def open_run_file(self, settings: Settings) -> RunFile:
        """Open the state file of settings that have one; see `run_state.open_run_file`."""
        return open_run_file(settings, self.fingerprint(settings))

    @abstractmethod
    def paper_preset(self, height: int | None = None, width: int | None = None) -> str | None:
        """Name the paper's setting for this model in PAPER_PRESETS; None if it has none.

        Args:
            height: Height of the video in pixels. Default: the authors'.
            width: Width of the video in pixels. Default: the authors'.
        """

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Compute frames, height and width of the video that a call with these makes.

        Args:
            num_frames: Number of frames that are asked for. Default: the authors'.
            height: Height in pixels. Default: the authors'.
            width: Width in pixels. Default: the authors'.
        """
        own = self.authors_settings
        return (
            own["num_frames"] if num_frames is None else num_frames,
            own["height"] if height is None else height,
            own["width"] if width is None else width,
        )

    def paper_sparsity(self, height: int | None = None, width: int | None = None) -> Preset:
        """Give the paper's sparsity for this model and size; the general default if it has none.

        As in `sparsity, warmup = pipe.paper_sparsity()`, or with another density
        `dataclasses.replace(sparsity, density=0.2)`.

        Args:
            height: Height of the video in pixels. Default: the authors'.
            width: Width of the video in pixels. Default: the authors'.
        """
        name = self.paper_preset(height, width)
        return Preset(SparsityConfig(), Warmup()) if name is None else PAPER_PRESETS[name]

    def default_sparsity(self, height: int | None = None, width: int | None = None) -> Preset:
        """Give the sparsity that the model's folder asks for; what it leaves out is the paper's.

        Args:
            height: Height of the video in pixels. Default: the authors'.
            width: Width of the video in pixels. Default: the authors'.
        """
        sparsity, warmup = self.paper_sparsity(height, width)
        return Preset(
            dataclasses.replace(sparsity, **self.defaults.sparsity),
            dataclasses.replace(warmup, **self.defaults.warmup),
        )

    @property
    def default_fps(self) -> float:
        """Frames per second of a video where settings leave them out."""
        return float(self.frame_rate if self.defaults.fps is None else self.defaults.fps)

    @property
    @abstractmethod
    def authors_settings(self) -> dict[str, Any]:
        """Settings of the model's authors, for what caller and model's folder leave out."""

    @property
    def compression(self) -> Compression:
        """Frames and pixels to a latent of the VAE; those of released ones if it was left out."""
        if self.vae is None:
            return RELEASED
        config = self.vae.config
        return Compression(config.temporal_compression_ratio, config.spatial_compression_ratio)

    @abstractmethod
    def prepare(self, settings: Settings) -> PreparedRun:
        """Encode prompts and images, make schedule and noise: the first part of `__call__`.

        Args:
            settings: Settings of the run, from `settings` or made of `settings_class`; what is None
                in them is filled in.

        Raises:
            ValueError: On what does not fit the checkpoint, or does not fit into memory.
        """

    @abstractmethod
    def latent_shape(
        self, num_frames: int, height: int, width: int
    ) -> tuple[tuple[int, int, int, int], int]:
        """Compute the shape of a video's latents, and its number of padding frames.

        Args:
            num_frames: Number of frames that are asked for.
            height: Height in pixels.
            width: Width in pixels.

        Raises:
            SettingError: On a size that the model cannot take.
        """

    @abstractmethod
    def layout(self, latents: tuple[int, ...], text_tokens: int) -> VideoLayout:
        """Lay out the transformer's sequence of a video.

        Args:
            latents: Shape of the video's latents, from `latent_shape`.
            text_tokens: Number of tokens of its prompt.
        """

    def denoise(
        self,
        run: PreparedRun,
        *,
        steps: range | None = None,
        file: RunFile | None = None,
        callback_on_step_end: Callable[[StepRecord], None] | None = None,
    ) -> tuple[PreparedRun, tuple[StepRecord, ...]]:
        """Run all steps, or some of them from the state that `run` is in.

        Args:
            run: Run from `prepare`.
            steps: Steps to run; None runs all.
            file: File to continue from and to save in; the records are then those of the saved
                steps, too.
            callback_on_step_end: Function that is called with the record of each step.

        Returns:
            The run after the last step, and a record of each.

        Raises:
            ValueError: If both steps and a file are given, the file does not fit, or the run does
                not have these steps in a row.
            FloatingPointError: If latents are not finite after a step; names the step and layer.
        """
        done: tuple[StepRecord, ...] = ()
        if file is not None:
            if steps is not None:
                raise ValueError("a saved run knows its steps: pass either steps or a file")
            run, done = dataclasses.replace(run, state=file.state_like(run.state)), file.records
            if len(done) > run.schedule.num_steps:
                raise damaged(file.path)
            steps = range(len(done), run.schedule.num_steps)
        every = range(run.schedule.num_steps)
        if steps and (steps.step != 1 or steps[0] not in every or steps[-1] not in every):
            raise ValueError(f"steps must be consecutive, within {every}: got {steps}")
        if steps is not None and not steps:  # nothing to load the transformer for
            return run, done
        save_run = nullcontext() if file is None else saving(file)
        with save_run as save, in_memory(self.transformer) as transformer:
            run, records = denoise(
                transformer, run, steps=steps, save=save, callback_on_step_end=callback_on_step_end
            )
        return run, done + records

    @stage("decoding")
    def decode(
        self,
        run: PreparedRun,
        info: SamplingInfo,
        *,
        output_type: OutputType = "np",
        vae_tiling: bool = False,
    ) -> VideoOutput:
        """Drop padding frames and decode latents: the last part of `__call__`.

        Args:
            run: Run after its last step.
            info: Records of its steps.
            output_type: Form of the frames.
            vae_tiling: Whether to decode by the released tiles.
        """
        latents = self.finished_latents(run)
        frames = None
        if output_type != "latent" and self.makes_frames:
            frames = to_frames(self.decode_latents(latents, vae_tiling=vae_tiling))
            if output_type == "uint8":
                frames = (frames * 255).round().astype(np.uint8)
        return VideoOutput(frames, np.asarray(latents), dataclasses.replace(info, seed=run.seed))

    def finished_latents(self, run: PreparedRun) -> Array:
        """Take a video's latents out of a run after its last step."""
        return run.state.latents

    @property
    def makes_frames(self) -> bool:
        """Whether latents can be decoded."""
        return self.vae is not None

    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Decode latents to videos [batch, 3, frames, height, width], about from −1 to 1."""
        assert self.vae is not None
        with in_memory(self.vae) as vae:
            return vae.decode(vae.denormalize(latents), tiling=Tiling() if vae_tiling else None)
