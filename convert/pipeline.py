"""Convert a pipeline or a component in diffusers' layout into a folder, a tensor at a time."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svg_jax.convert.checkpoint.manifest import NAME, Manifest, read_manifest, write_manifest
from svg_jax.convert.checkpoint.staging import clear, partial_folder, staged_folder
from svg_jax.convert.copying import copy_weights
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import find_changed
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.paths import name_of
from svg_jax.convert.plan import ComponentPlan, ConversionPlan, plan_conversion
from svg_jax.convert.progress import Advance, Progress, Terminated, count_bytes
from svg_jax.convert.tables.lora_names import TRANSFORMER
from svg_jax.convert.versions import package_versions

_LOGGER = logging.getLogger(__name__)
# Manifest of an unfinished folder. What it lists is complete, so that a later run can rely on it.
PARTIAL = "manifest.partial.json"
_VERSIONS_OF = ("svg-jax", "jax", "flax", "orbax-checkpoint", "tensorstore", "numpy")


def convert_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    lora: str | Path | Sequence[str | Path] | None = (),
    lora_scale: float | Sequence[float] = 1.0,
    lora_into: str | Sequence[str] = TRANSFORMER,
    progress: Progress | None = None,
    **settings: Any,
) -> None:
    """Convert a pipeline or a single component in diffusers' layout into orbax checkpoints.

    The result holds `model_index.json`, `manifest.json`, the files of scheduler, tokenizers and
    image processor, and for each component `config.json` and `weights/`, an orbax checkpoint of the
    module's pure dict. It appears whole or not at all. At most a few tensors are in memory at once.
    Tensors that no model needs (Wan I2V's `norm_added_q`, LLaVA's `lm_head`) are left out.

    A run that was killed or terminated is resumed by the next one with the same arguments: finished
    components, which lie in the hidden `.NAME.partial` beside the destination, are read again,
    compared with their digests and kept. An exception, including Ctrl-C, leaves nothing there.

    Args:
        source: Folder or file to read; see `ConversionSettings`.
        destination: Folder to write.
        lora: Path of a LoRA to merge into the weights, or a list of them; see `LoraSource`.
        lora_scale: Strength of all LoRAs, or one for each.
        lora_into: Component that receives the LoRAs' layers of a "transformer": one for all, or one
            for each.
        progress: Function called with (bytes done, bytes in all, component).
        **settings: Fields of `ConversionSettings`: components, dtype, variant, weights_key, strict,
            allow_nonfinite, overwrite.

    Raises:
        ConversionError: One sentence that says what is wrong with the source or the destination,
            where, and what to do. The destination is then as it was before.
        RefusedError: If the disk, its permissions or another run for this destination prevent it.
    """
    loras = {"lora": lora, "lora_scale": lora_scale, "lora_into": lora_into}
    write_plan(plan_conversion(source, destination=destination, **loras, **settings), progress)


def write_plan(plan: ConversionPlan, progress: Progress | None = None) -> None:
    """Carry out a plan: write to the destination that its settings name.

    Args:
        plan: Plan of what to read and write.
        progress: Function called with (bytes done, bytes in all, component).

    Raises:
        ConversionError: If the settings name no destination; see `convert_pipeline`.
        RefusedError: See `convert_pipeline`.
    """
    settings = plan.settings
    if settings.destination is None:
        raise ConversionError(f"{plan.source.path}: destination=None: must be the folder to make.")
    destination = Path(settings.destination)
    advance = count_bytes(plan.nbytes, progress)
    try:
        with staged_folder(destination, overwrite=settings.overwrite, take_over=True) as staging:
            _write(plan, staging, advance)
    except Terminated:
        left, place = ", and nothing else was left; convert again", "was not made"
        if destination.exists():
            place = "stands whole"
        if (staging := partial_folder(destination)).exists():
            left = f"; the components that are done are kept in {staging}, from which the same "
            left += "command goes on"
        _LOGGER.info("stopped: %s %s%s", destination, place, left)
        raise


def _write(plan: ConversionPlan, staging: Path, advance: Advance) -> None:
    allow_nonfinite = plan.settings.allow_nonfinite
    manifest = _resume(plan, staging)
    try:
        for component in plan.components:
            if component.name in manifest.components:
                advance(component.nbytes, component.name)
                continue
            manifest = _write_component(component, staging, manifest, allow_nonfinite, advance)
            write_manifest(staging, manifest, PARTIAL)
    except Terminated:  # the next run cannot use a component that is half written
        done = manifest.components
        clear(staging, keep=(PARTIAL, *done) if done else ())
        raise
    for lora in plan.loras:
        if (file := find_changed(lora.states)) is not None:
            raise ConversionError(f"{file}: a LoRA was changed while it was read: convert again.")
    files = {**manifest.files, **_write_small_files(plan, staging)}
    write_manifest(staging, replace(manifest, files=files), PARTIAL)
    os.replace(staging / PARTIAL, staging / NAME)


def _resume(plan: ConversionPlan, staging: Path) -> Manifest:
    """Keep the components that a killed run finished, once they are checked, and nothing else.

    Returns:
        The manifest of what is kept.
    """
    manifest = Manifest(
        source=name_of(plan.source.path),
        pipeline=plan.source.index.pipeline,
        dtype=None if plan.dtype is None else plan.dtype.name,
        variant=plan.settings.variant,
        components={},
        skipped=plan.skipped,
        sources={},
        files={},
        weights={},
        versions=package_versions(_VERSIONS_OF),
        loras=tuple(part.record() for part in plan.loras),
    )
    try:
        before = read_manifest(staging, NAME if (staging / NAME).is_file() else PARTIAL)
    except ConversionError:
        before = manifest
    if replace(before, components={}, sources={}, files={}, weights={}) == manifest:
        for component in plan.components:
            manifest = _keep(component, manifest, before, staging, plan.settings.allow_nonfinite)
    write_manifest(staging, manifest, PARTIAL)
    clear(staging, keep=(PARTIAL, *manifest.components))
    return manifest


def _keep(
    component: ComponentPlan,
    manifest: Manifest,
    before: Manifest,
    staging: Path,
    allow_nonfinite: bool,
) -> Manifest:
    """Add a component to the manifest if its files and its sources are as `before` says."""
    prefix = f"{component.name}/"
    sources, files, weights = (
        {name: sha256 for name, sha256 in part.items() if name.startswith(prefix)}
        for part in (before.sources, before.files, before.weights)
    )
    records = before.components.get(component.name, {})
    found = {
        path.relative_to(staging).as_posix()
        for path in (staging / component.name).rglob("*")
        if not path.is_dir()
    }
    if (
        records.keys() != component.tensors.keys()
        or (any(record.nonfinite for record in records.values()) and not allow_nonfinite)
        or found != files.keys() | weights.keys()
        or sources
        != {
            f"{prefix}{file.name}": component.digests.get(file) or file_digest(file)
            for file in component.states
        }
    ):
        return manifest
    component.check_unchanged()
    if any(file_digest(staging / name) != sha256 for name, sha256 in (files | weights).items()):
        return manifest
    return manifest.add(component.name, records, sources=sources, files=files, weights=weights)


def _write_small_files(plan: ConversionPlan, staging: Path) -> dict[str, str]:
    names = {*plan.files, *plan.source.texts}
    for name in names:
        (staging / name).parent.mkdir(exist_ok=True)
    for name, file in plan.files.items():
        shutil.copyfile(file, staging / name)
    for name, text in plan.source.texts.items():
        (staging / name).write_text(text, encoding="utf-8", newline="")
    return {name: file_digest(staging / name) for name in names}


def _write_component(
    component: ComponentPlan,
    staging: Path,
    manifest: Manifest,
    allow_nonfinite: bool,
    advance: Advance,
) -> Manifest:
    name, config = component.name, staging / component.name / "config.json"
    config.parent.mkdir()
    config.write_text(component.config_text, encoding="utf-8", newline="")
    records, sources, weights = copy_weights(
        component, config.with_name("weights"), allow_nonfinite=allow_nonfinite, advance=advance
    )
    component.check_unchanged()
    return manifest.add(
        name,
        records,
        sources={f"{name}/{file.name}": sha256 for file, sha256 in sources.items()},
        files={f"{name}/config.json": file_digest(config)},
        weights={f"{name}/weights/{file}": sha256 for file, sha256 in weights.items()},
    )
