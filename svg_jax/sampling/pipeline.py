"""What the families' pipelines share: prepare, denoise, decode, and when weights are loaded."""

import dataclasses
import functools
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Array, Bool

from svg_jax.config import PAPER_PRESETS, Preset, SparsityConfig, Warmup
from svg_jax.convert.run_defaults import RunDefaults
from svg_jax.masks import warn_of_lost_sparsity
from svg_jax.media.images import with_images_read
from svg_jax.models import Attend
from svg_jax.sampling.components import component_names, in_memory
from svg_jax.sampling.denoising import check_labels, denoise
from svg_jax.sampling.latents import to_frames
from svg_jax.sampling.prepared_run import PreparedRun
from svg_jax.sampling.records import SamplingInfo, StepRecord, VideoOutput
from svg_jax.sampling.run_state import (
    RunFile,
    damaged,
    make_fingerprint,
    open_run_file,
    saved_fingerprint,
    saving,
)
from svg_jax.sampling.settings import (
    SettingError,
    check_settings,
    count_prompts,
    draw_seed,
    few_steps_note,
)

_LOGGER = logging.getLogger(__name__)
_NO_DEFAULTS = RunDefaults()

OutputType = Literal["np", "uint8", "latent"]


# What a call takes beside the arguments of `prepare`.
_OF_CALL = (
    "sparsity",
    "warmup",
    "attend",
    "labels",
    "output_type",
    "vae_tiling",
    "callback_on_step_end",
)
_OF_CALL += ("state_file", "save_every", "resume")


def with_checked_call(call: Callable[..., "VideoOutput"]) -> Callable[..., "VideoOutput"]:
    """A pipeline's call, with settings that are all checked and have their defaults."""
    defaults = {name: inspect.signature(call).parameters[name].default for name in _OF_CALL}

    @functools.wraps(call)
    def checked(self: "VideoPipeline", prompt: Any = None, **arguments: Any) -> VideoOutput:
        given = {name: arguments.pop(name, default) for name, default in defaults.items()}
        own = check_settings(given)
        if own["resume"] and arguments.get("seed", 0) is None:
            arguments["seed"] = saved_fingerprint(own["state_file"]).get("seed")
        return call(self, **own, **self.settings(prompt, **arguments))

    return checked


def with_settings(prepare: Callable[..., PreparedRun]) -> Callable[..., PreparedRun]:
    """A family's `prepare`, called with settings that are checked and have their defaults."""

    @functools.wraps(prepare)
    def checked(self: "VideoPipeline", prompt: Any = None, **arguments: Any) -> PreparedRun:
        return prepare(self, **self.settings(prompt, **arguments))

    return checked


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VideoPipeline(ABC):
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
    samplers: ClassVar[tuple[str, ...]] = ("euler", "unipc")

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

    @with_checked_call
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        sparsity: SparsityConfig | None = None,
        warmup: Warmup | None = None,
        attend: Attend | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        output_type: OutputType = "np",
        vae_tiling: bool = False,
        callback_on_step_end: Callable[[StepRecord], None] | None = None,
        state_file: str | Path | None = None,
        save_every: int = 5,
        resume: bool = False,
        **arguments: Any,
    ) -> VideoOutput:
        """Generate videos; arguments have diffusers' names and meanings.

        With a `state_file` a run survives what ends its process: it is saved there every few steps
        and at an exception, and the same call with `resume` goes on from there, with the same
        outcome bit for bit on the same device. The file goes when the call returns, for then the
        outcome is in the caller's hands.

        Args:
            prompt: One prompt or several; or pass `prompt_embeds`.
            sparsity: Settings of Sparse VideoGen; None is dense attention.
            warmup: Steps and layers that stay dense under `sparsity`; None is `Warmup()`.
            attend: An attention of one's own in place of either, in all steps and layers (see
                `svg_jax.Attend`); its `step_state` is a `StepState`. What it gives beside the
                output is kept if it is a `SparseAttentionInfo`, and dropped otherwise. Each
                callable is compiled once. Such a run is not saved: nothing tells one callable
                from another.
            labels: Labels to use in place of profiling, True = temporal (see `denoise`).
            output_type: "np" for frames in 0…1, "uint8", or "latent" for latents alone.
            vae_tiling: Decode by the released tiles: less memory, and not quite the same frames.
            callback_on_step_end: Called with the record of each step that this call computes.
            state_file: Where to save the run's state; None saves nothing.
            save_every: Steps from one save to the next; 0 saves nothing.
            resume: Go on from the state that is there; starts as usual if there is none.
            **arguments: Arguments of the family's `prepare` (`help(pipe.prepare)`): size, steps,
                guidance, seed, image and so on.

        Returns:
            Frames, latents, and what happened on the way.

        Raises:
            ValueError: On settings that no run can have (`SettingError`), arguments that do not
                fit the checkpoint or each other, or a state that is damaged or another run's; says
                what differs.
            FileExistsError: If there is a state, and it is not to be resumed.
            FloatingPointError: If latents stop being finite.
        """
        settings = {"prompt": prompt, **arguments}
        self._check_labels(labels, settings)
        if sparsity is not None:
            note = few_steps_note(warmup or Warmup(), settings["num_inference_steps"])
            if note is not None:
                _LOGGER.warning(note)
        file = None
        if state_file is not None:
            identity = self.fingerprint(**settings, sparsity=sparsity, warmup=warmup, labels=labels)
            file = open_run_file(state_file, identity, save_every=save_every, resume=resume)
        run = self.prepare(**settings)
        run, steps = self.denoise(
            run,
            sparsity=sparsity,
            warmup=warmup,
            attend=attend,
            labels=labels,
            file=file,
            callback_on_step_end=callback_on_step_end,
        )
        info = SamplingInfo(steps)
        video = self.decode(run, info, output_type=output_type, vae_tiling=vae_tiling)
        if file is not None:
            file.remove()
        return video

    def settings(self, prompt: Any = None, **arguments: Any) -> dict[str, Any]:
        """All arguments of `prepare` for a call with these: checked, with defaults filled in.

        A default is what the model's folder says, or else the authors'. A seed of None is drawn,
        and images are read.

        Raises:
            SettingError: On what no run can have.
            ValueError: On what is no image.
            TypeError: On an argument that the family does not take.
        """
        signature = inspect.signature(self.prepare)
        given = signature.bind(prompt, **arguments)
        given.apply_defaults()
        settings = check_settings(given.arguments)
        if settings["scheduler"] not in (None, *self.samplers):
            names = " or ".join(map(repr, self.samplers))
            raise SettingError("scheduler", f"is {names}: got {settings['scheduler']!r}")
        prompts = count_prompts(settings["prompt"], settings["prompt_embeds"])
        settings = with_images_read(settings, prompts)
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        defaults |= {"guidance_interval": (0.0, 1.0)} | self.authors_settings
        defaults |= self.defaults.given()
        for name in settings.keys() - {"seed"}:
            if settings[name] is None:
                settings[name] = defaults[name]
        if settings["seed"] is None:
            settings["seed"] = draw_seed()
            _LOGGER.warning("the seed %d was drawn", settings["seed"])
        return settings

    def fingerprint(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        sparsity: SparsityConfig | None = None,
        warmup: Warmup | None = None,
        labels: Bool[np.ndarray, "..."] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """What determines the outcome of a call with these arguments, and of no other, as JSON."""
        if arguments.get("seed", 0) is None:
            raise SettingError("seed", "must be given: it tells a saved run from another")
        return make_fingerprint(
            **self.settings(prompt, **arguments),
            sparsity=sparsity,
            warmup=None if sparsity is None else warmup or Warmup(),
            labels=labels,
            dtype=np.dtype(self.transformer.dtype).name,
            weights=self.weights,
            model_scheduler=self.scheduler,
        )

    @abstractmethod
    def paper_preset(self, height: int | None = None, width: int | None = None) -> str | None:
        """The paper's setting for this model, by its name in PAPER_PRESETS; None has none.

        Args:
            height: Of the video, in pixels. Default: as `prepare`'s.
            width: Likewise.
        """

    @abstractmethod
    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Frames, height and width of the video that a call with these makes.

        Args:
            num_frames: Frames that are asked for. Default: as `prepare`'s.
            height: Height in pixels. Default: as `prepare`'s.
            width: Width in pixels. Default: as `prepare`'s.
        """

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
    def prepare(self, prompt: str | Sequence[str] | None = None, **arguments: Any) -> PreparedRun:
        """The first part of `__call__`: encodes prompts, makes the schedule and the noise."""

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

    def _check_labels(self, labels: np.ndarray | None, settings: dict[str, Any]) -> None:
        """SettingError if labels do not fit the model and the run."""
        if labels is not None:
            prompts = count_prompts(settings["prompt"], settings["prompt_embeds"])
            check_labels(
                labels,
                self.transformer.config,
                num_steps=settings["num_inference_steps"],
                batch=prompts * settings["num_videos_per_prompt"],
            )

    @property
    def makes_frames(self) -> bool:
        """Whether there is what decodes latents."""
        return self.vae is not None

    @abstractmethod
    def decode_latents(self, latents: Array, *, vae_tiling: bool = False) -> Array:
        """Videos [batch, 3, frames, height, width] of latents, about from −1 to 1."""
