"""What the families' pipelines share: prepare, denoise, decode, and when weights are loaded."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float

from svg_jax.config import PAPER_PRESETS, Preset, SparsityConfig, Warmup
from svg_jax.convert.formats.values import shown
from svg_jax.convert.run_defaults import RunDefaults
from svg_jax.masks import warn_of_lost_sparsity
from svg_jax.models import Attend, Tiling
from svg_jax.sampling.components import component_names, in_memory
from svg_jax.sampling.denoising import check_labels, denoise, guidance_scales
from svg_jax.sampling.identity import identity_of, make_fingerprint
from svg_jax.sampling.latents import to_frames
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import SamplingInfo, StepRecord, VideoOutput
from svg_jax.sampling.run_state import (
    RunFile,
    damaged,
    open_run_file,
    saved_fingerprint,
    saving,
)
from svg_jax.sampling.schedules.tables import Schedule
from svg_jax.sampling.settings import RunSettings, SettingError, check_settings, settings_of
from svg_jax.sampling.settings.run import OutputType, draw_seed, few_steps_note

_LOGGER = logging.getLogger(__name__)
_NO_DEFAULTS = RunDefaults()
Settings = TypeVar("Settings", bound=RunSettings)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VideoPipeline(ABC, Generic[Settings]):
    """A checkpoint that can be called; a class for each family says how it is prepared.

    Attributes:
        transformer: The denoiser.
        scheduler: What scheduler_config.json says.
        vae: Decodes latents, and encodes images; None where the checkpoint was converted without
            it: the outcome is then latents.
        weights: Digest of the folder that it was loaded from, by which a saved run is known to be
            of the same weights; None if it was put together otherwise.
        defaults: What the folder says of a run; goes before the authors' settings.
    """

    frame_rate: ClassVar[float] = 8.0  # frames per second that the family was trained at
    settings_class: ClassVar[type[RunSettings]]  # what a run of the family is asked for

    transformer: Any
    scheduler: Any
    vae: Any = None
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
        and at an exception, and the same call with `resume` goes on from there, with the same
        outcome bit for bit on the same device. The file goes when the call returns, for then the
        outcome is in the caller's hands.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            **arguments: Fields of the family's settings (`help(pipe.settings_class)`): size, steps,
                guidance, seed, image, sparsity and so on.

        Returns:
            Frames, latents, and what happened on the way.

        Raises:
            SettingError: On settings that no run can have, or that the family does not have.
            ValueError: On what does not fit the checkpoint, or a state that is damaged or another
                run's; says what differs.
            FileExistsError: If there is a state, and it is not to be resumed.
            FloatingPointError: If latents stop being finite.
        """
        settings = self.settings(prompt, **arguments)
        steps, sparsity = settings.num_inference_steps, settings.sparsity
        if settings.labels is not None:
            assert steps is not None
            check_labels(
                settings.labels,
                self.transformer.config,
                num_steps=steps,
                batch=settings.num_videos,
            )
        if sparsity is not None:
            assert steps is not None
            note = few_steps_note(settings.warmup or Warmup(), steps)
            if note is not None:
                _LOGGER.warning(note)
        file = None if settings.state_file is None else self.open_run_file(settings)
        run = self.prepare(settings)
        run, records = self.denoise(
            run,
            sparsity=sparsity,
            warmup=settings.warmup,
            attend=settings.attend,
            labels=settings.labels,
            file=file,
            callback_on_step_end=settings.callback_on_step_end,
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
        """Make the value of a call with these arguments: checked, with all defaults filled in.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            **arguments: Other fields of `settings_class`.

        Raises:
            SettingError: On what no run can have, and on what the family does not have
                (`UnknownSettingError`, which is a TypeError, too).
            ValueError: On what is no image.
        """
        known = settings_of(self.settings_class)
        # What other libraries have is Python's own before the value sees it.
        plain = check_settings({"prompt": prompt, **arguments}, known)
        made: Any = self.settings_class(**plain)
        return self.completed(made)

    def completed(self, settings: Settings) -> Settings:
        """Fill in what settings leave to the model: what its folder says, or else the authors'.

        A seed of None is that of the saved run that is to be resumed; or it is drawn.

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
            if name in known and getattr(settings, name) is None and value is not None
        }
        if settings.sparsity is not None and settings.warmup is None:
            chosen["warmup"] = Warmup()
        if settings.seed is None:
            chosen["seed"] = self._seed_of(settings)
        return dataclasses.replace(settings, **chosen) if chosen else settings

    def _seed_of(self, settings: Settings) -> int:
        """Take the seed of the saved run that is to be resumed; or draw one."""
        if settings.resume and settings.state_file is not None:
            saved = saved_fingerprint(settings.state_file)
            if saved:
                return saved.get("seed", RunSettings.seed)
        seed = draw_seed()
        _LOGGER.warning("the seed %d was drawn", seed)
        return seed

    def fingerprint(self, settings: Settings) -> dict[str, Any]:
        """Tell what determines the latents of a run with these settings, and of no other, as JSON.

        Args:
            settings: What `settings` made, of a seed that is known.
        """
        settings = self.completed(settings)
        return make_fingerprint(
            **identity_of(settings),
            dtype=np.dtype(self.transformer.dtype).name,
            weights=self.weights,
            model_scheduler=self.scheduler,
        )

    def open_run_file(self, settings: Settings) -> RunFile:
        """Look at the state file of settings that have one; see `run_state.open_run_file`."""
        assert settings.state_file is not None
        return open_run_file(
            settings.state_file,
            self.fingerprint(settings),
            save_every=settings.save_every,
            resume=settings.resume,
            allow_rounding=settings.allow_rounding,
            kind=self.settings_class,
        )

    @abstractmethod
    def paper_preset(self, height: int | None = None, width: int | None = None) -> str | None:
        """The paper's setting for this model, by its name in PAPER_PRESETS; None has none.

        Args:
            height: Of the video, in pixels. Default: as `prepare`'s.
            width: Likewise.
        """

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Tell frames, height and width of the video that a call with these makes.

        Args:
            num_frames: Frames that are asked for. Default: the authors'.
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
        """The paper's sparsity for this model and size; the general default where it has none.

        As in `sparsity, warmup = pipe.paper_sparsity()`, or with another density
        `dataclasses.replace(sparsity, density=0.2)`.

        Args:
            height: Of the video, in pixels. Default: as `prepare`'s.
            width: Likewise.
        """
        name = self.paper_preset(height, width)
        return Preset(SparsityConfig(), Warmup()) if name is None else PAPER_PRESETS[name]

    def default_sparsity(self, height: int | None = None, width: int | None = None) -> Preset:
        """The sparsity that the model's folder asks for; what it leaves out is the paper's.

        Args:
            height: Height in pixels. Default: as `prepare`'s.
            width: Width in pixels. Default: as `prepare`'s.
        """
        sparsity, warmup = self.paper_sparsity(height, width)
        return Preset(
            dataclasses.replace(sparsity, **self.defaults.sparsity),
            dataclasses.replace(warmup, **self.defaults.warmup),
        )

    @property
    def default_steps(self) -> int:
        """Denoising steps that `prepare` takes unless told."""
        own = self.defaults.num_inference_steps
        return self.authors_settings["num_inference_steps"] if own is None else own

    @property
    def default_fps(self) -> float:
        """Frames per second of a video unless told."""
        return float(self.frame_rate if self.defaults.fps is None else self.defaults.fps)

    @property
    @abstractmethod
    def authors_settings(self) -> dict[str, Any]:
        """What `prepare` takes where neither the caller nor the model's folder says anything."""

    @abstractmethod
    def prepare(self, settings: Settings) -> PreparedRun:
        """Do the first part of `__call__`: encode prompts and images, make schedule and noise.

        Args:
            settings: What `settings` made; or a value of `settings_class`, of which None is filled
                in.

        Raises:
            ValueError: On what does not fit the checkpoint, or does not fit into memory.
        """

    def guidance_scales(
        self,
        settings: Settings,
        schedule: Schedule,
        scale: float | int | None,
        *,
        use_dynamic_cfg: bool = False,
    ) -> Float[np.ndarray, " steps"]:
        """Give the scale of classifier-free guidance in every step of a run.

        Args:
            settings: Settings of the run.
            schedule: All steps.
            scale: The setting that says how strong this guidance is, which differs by family.
            use_dynamic_cfg: See `svg_jax.sampling.denoising.guidance_scales`.
        """
        interval = settings.guidance_interval
        assert scale is not None
        assert interval is not None
        return guidance_scales(
            schedule.timesteps, scale, interval=interval, use_dynamic_cfg=use_dynamic_cfg
        )

    def denoise(
        self,
        run: PreparedRun,
        *,
        sparsity: SparsityConfig | None = None,
        warmup: Warmup | None = None,
        attend: Attend | None = None,
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
                if len(done) > run.schedule.num_steps:
                    raise damaged(file.path)
            steps = range(len(done), run.schedule.num_steps)
        if steps is not None and not steps:  # nothing to load the transformer for
            return dataclasses.replace(run, state=state), done
        save_run = nullcontext() if file is None else saving(file)
        if sparsity is not None:
            # What a density leaves, or that it leaves nothing, is told before anything is loaded.
            warn_of_lost_sparsity(run.layout, sparsity)
        with save_run as save, in_memory(self.transformer) as transformer:
            run, records = denoise(
                transformer,
                dataclasses.replace(run, state=state),
                sparsity=sparsity,
                warmup=warmup,
                attend=attend,
                labels=labels,
                steps=steps,
                save=save,
                callback_on_step_end=callback_on_step_end,
            )
        return run, done + records

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
        return VideoOutput(frames, np.asarray(latents), dataclasses.replace(info, seed=run.seed))

    def finished_latents(self, run: PreparedRun) -> Array:
        """The latents of a video, of a run after its last step."""
        return run.state.latents

    @property
    def makes_frames(self) -> bool:
        """Whether there is what decodes latents."""
        return self.vae is not None

    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Decode latents to videos [batch, 3, frames, height, width], about from −1 to 1."""
        assert self.vae is not None
        with in_memory(self.vae) as vae:
            return vae.decode(vae.denormalize(latents), tiling=Tiling() if vae_tiling else None)
