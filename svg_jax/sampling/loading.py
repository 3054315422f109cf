"""From a model in any form to a pipeline that can be called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from svg_jax.convert import load_component, scheduler_config
from svg_jax.convert.checkpoint.folder import ConvertedFolder, check_components, open_folder
from svg_jax.convert.components import read_component_config, read_pipeline_index
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.progress import Progress
from svg_jax.convert.run_defaults import read_run_defaults
from svg_jax.convert.tables.registry import PIPELINES, Family
from svg_jax.media.images import load_image_processor
from svg_jax.sampling.cache import converted_folder
from svg_jax.sampling.cogvideox.pipeline import CogVideoXPipeline
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.hunyuan_video.pipeline import HunyuanVideoPipeline
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders
from svg_jax.sampling.identity import weights_digest
from svg_jax.sampling.pipeline import VideoPipeline
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.settings import UnknownSettingError
from svg_jax.sampling.wan.pipeline import WanPipeline
from svg_jax.text.tokenizer import load_tokenizer

_ARGUMENTS = ("dtype", "revision", "variant", "cache_dir", "verify", "progress")


def from_pretrained(
    model: str | Path,
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    **others: Any,
) -> VideoPipeline:
    """Load a video model, onto the default device.

    A folder that `svg-jax convert` made is used as it is. A folder in diffusers' layout or one from
    the hub is converted first: once, bit for bit, into a cache.

    Args:
        model: Converted folder, folder in diffusers' layout, hub id ("owner/name"), or "tiny" for
            the bundled model. A folder of that name goes before the hub and "tiny".
        dtype: Dtype of the matrix products; parameters stay as they are stored. Default: bfloat16
            on an accelerator, float32 on a CPU.
        revision: Branch, tag or commit of a hub id. Default: main.
        variant: Variant of the weights where a component has it, e.g. "fp16"; else the plain ones.
        cache_dir: Folder for downloads and, in its folder `svg-jax`, for conversions. Default: the
            hub's own cache for the former, $SVG_JAX_CACHE (~/.cache/svg-jax) for the latter.
        verify: Whether to read all weights first and to compare them with the manifest, as
            `svg-jax verify` does. Otherwise only the names, kinds, sizes and layout of the weights
            are compared, and all other files.
        progress: Function that a conversion and `verify` call with (bytes done, bytes in all,
            component).
        **others: Other arguments are refused; for diffusers' the error names the replacement.

    Returns:
        The pipeline of the checkpoint's family. Each component is loaded where it is used and freed
        afterwards: text encoder and transformer are never in memory together.

    Raises:
        TypeError: On other arguments.
        ValueError: If there is no such model, or it is of a kind that does not run.
        DamageError: If a converted folder does not hold what was converted; it is a ValueError.
        OSError: If a file cannot be read or written, the hub cannot be reached, or it denies access
            (`PermissionError`: a gated model).
    """
    for name in others:
        raise UnknownSettingError(name, _ARGUMENTS)
    folder = converted_folder(
        model,
        revision=revision,
        variant=variant,
        cache_dir=cache_dir,
        check=_refuse_what_does_not_run,
        progress=progress,
    )
    # A folder that is not whole is refused before anything else that is wrong with it.
    opened = open_folder(folder)
    _refuse_what_does_not_run(opened.path)
    assert opened.index.pipeline is not None
    check_components(opened, opened.manifest.components, verify=verify, progress=progress)
    if dtype is None:
        dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    pipeline = _LOAD[PIPELINES[opened.index.pipeline]](_Source(opened, jnp.dtype(dtype)))
    return replace(
        pipeline, weights=weights_digest(opened.manifest), defaults=read_run_defaults(opened.path)
    )


@dataclass(frozen=True)
class _Source:
    """A converted folder, and the dtype to load it in.

    Attributes:
        opened: Opened folder.
        dtype: Dtype of the matrix products, where a family needs no other.
    """

    opened: ConvertedFolder
    dtype: Any

    @property
    def folder(self) -> Path:
        """Path of the folder."""
        return self.opened.path

    @property
    def classes(self) -> Mapping[str, str]:
        """Class of each component that model_index.json names, there or not."""
        return self.opened.index.classes

    def lazy(self, name: str, dtype: Any = None) -> Lazy[Any] | None:
        """Make a component that is loaded later; None if it was left out by the conversion."""
        if name not in self.opened.manifest.components:
            return None
        dtype = self.dtype if dtype is None else dtype
        config = read_component_config(self.folder / name, self.classes[name])
        return Lazy(config, dtype, partial(load_component, self.folder, name, dtype=dtype))

    def shared(self) -> dict[str, Any]:
        """Make what every family has: transformer, encoder of prompts and its tokenizer."""
        transformer, text_encoder = (self.lazy(name) for name in ("transformer", "text_encoder"))
        if transformer is None:
            raise ValueError(
                f"{self.folder}: holds no transformer: convert the source again with it."
            )
        return {
            "transformer": transformer,
            "text_encoder": text_encoder,
            "tokenizer": text_encoder and load_tokenizer(self.folder / "tokenizer"),
        }

    def scheduler(self) -> SchedulerConfig:
        """Read scheduler_config.json."""
        entries = read_json(self.folder / scheduler_config.FILE)
        classes = scheduler_config.classes_of(self.opened.index.pipeline)
        return SchedulerConfig.from_dict(entries, classes)


def _refuse_what_does_not_run(folder: Path) -> None:
    entries = read_json(folder / "model_index.json")
    index = read_pipeline_index(folder)
    if index.pipeline is None:
        raise ValueError(
            f"{folder}: holds a component alone ({', '.join(index.classes)}), which makes no "
            "pipeline: load it with load_component, or convert a pipeline's folder."
        )
    if "transformer_2" in index.classes or entries.get("boundary_ratio") is not None:
        raise ValueError(f"{folder}: is a Wan 2.2 of two transformers, and only Wan 2.1 runs.")
    if entries.get("expand_timesteps"):
        raise ValueError(f"{folder}: is a Wan 2.2 with times by token, and only Wan 2.1 runs.")
    scheduler = folder / scheduler_config.FILE
    if "scheduler" not in entries and not scheduler.exists():
        raise ValueError(
            f"{scheduler}: cannot be read: the folder holds no scheduler, which a pipeline needs; "
            "add it to the source, and name it in model_index.json."
        )
    if scheduler.exists():  # of a download it comes later
        found = scheduler_config.check_scheduler(
            read_json(scheduler), scheduler_config.classes_of(index.pipeline)
        )
        try:
            found.check()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error


def _load_cogvideox(source: _Source) -> CogVideoXPipeline:
    return CogVideoXPipeline(
        **source.shared(),
        vae=source.lazy("vae"),
        scheduler=source.scheduler(),
        has_vae="vae" in source.classes,
    )


def _load_wan(source: _Source) -> WanPipeline:
    # Small, and diffusers advises float32 for them.
    image_encoder, vae = (
        source.lazy(name, jnp.dtype(jnp.float32)) for name in ("image_encoder", "vae")
    )
    return WanPipeline(
        **source.shared(),
        vae=vae,
        scheduler=source.scheduler(),
        image_encoder=image_encoder,
        image_processor=image_encoder and load_image_processor(source.folder / "image_processor"),
    )


def _load_hunyuan_video(source: _Source) -> HunyuanVideoPipeline:
    folder, shared = source.folder, source.shared()
    text_encoder_2 = source.lazy("text_encoder_2")
    has_processor = (folder / "image_processor").is_dir()
    return HunyuanVideoPipeline(
        transformer=shared["transformer"],
        vae=source.lazy("vae"),
        scheduler=source.scheduler(),
        encoders=HunyuanVideoEncoders(
            text_encoder=shared["text_encoder"],
            tokenizer=shared["tokenizer"],
            text_encoder_2=text_encoder_2,
            tokenizer_2=text_encoder_2 and load_tokenizer(folder / "tokenizer_2"),
            image_processor=(
                load_image_processor(folder / "image_processor") if has_processor else None
            ),
        ),
    )


_LOAD: Mapping[Family, Callable[[_Source], VideoPipeline]] = {
    "cogvideox": _load_cogvideox,
    "hunyuan_video": _load_hunyuan_video,
    "wan": _load_wan,
}
