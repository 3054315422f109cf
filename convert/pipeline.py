"""A pipeline or a component in diffusers' layout to a converted folder, a tensor at a time."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svg_jax.convert.checkpoint.manifest import (
    NAME,
    Manifest,
    TensorRecord,
    library_versions,
    read_manifest,
    write_manifest,
)
from svg_jax.convert.checkpoint.staging import clear, partial_folder, staged_folder
from svg_jax.convert.copying import copy_weights
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import find_changed
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.paths import real_place
from svg_jax.convert.plan import ComponentPlan, ConversionPlan, make_plan
from svg_jax.convert.progress import Progress, Terminated, count_bytes
from svg_jax.convert.settings import ConversionSettings, list_loras
from svg_jax.convert.tables.lora_names import TRANSFORMER

_LOGGER = logging.getLogger(__name__)
# The manifest of a folder that is not whole yet: what it lists is, and a later run may rely on it.
PARTIAL = "manifest.partial.json"


@dataclass(frozen=True)
class _Written:
    """What the manifest says of one component."""

    records: Mapping[str, TensorRecord]
    sources: Mapping[str, str]
    files: Mapping[str, str]
    weights: Mapping[str, str]


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
    """Convert a pipeline, or a component alone, in diffusers' layout into orbax checkpoints.

    The result holds `model_index.json`, `manifest.json`, the files of scheduler, tokenizers and
    image processor, and per component `config.json` and `weights/`, an orbax checkpoint of the
    module's pure dict. It appears whole or not at all. At no time more than a few tensors are in
    memory. Tensors that nothing needs (Wan I2V's `norm_added_q`, LLaVA's `lm_head`) are left out.
    A run that was killed or terminated is taken up again by the next one with the same arguments:
    components that it had finished, in the hidden `.NAME.partial` beside the destination, are read
    once more, compared with their digests and kept. An exception, Ctrl-C among them, leaves nothing
    there.

    Args:
        source: Folder or file to read; see `ConversionSettings`.
        destination: Folder to be made.
        lora: LoRAs to merge into the weights, in this order: their paths; see `LoraSource`.
        lora_scale: Strength of the LoRAs: one for all, or one for each.
        lora_into: Component that the LoRAs mean by the transformer: one for all, or one for each.
        progress: Called with (bytes done, bytes in all, component).
        settings: Fields of `ConversionSettings`: components, dtype, variant, weights_key, strict,
            allow_nonfinite, overwrite.

    Raises:
        ConversionError: One sentence that says what is wrong with the source or the destination,
            where, and what to do. At `destination` is then what was there before, or nothing.
        RefusedError: The same of the disk, its rights, or another run for this destination.
    """
    loras = list_loras(lora, lora_scale, lora_into)
    made = ConversionSettings(source=source, destination=destination, loras=loras, **settings)
    write_plan(make_plan(made), progress)


def write_plan(plan: ConversionPlan, progress: Progress | None = None) -> None:
    """Write what a plan says to the destination that its settings name.

    Args:
        plan: What to read and write.
        progress: Called with (bytes done, bytes in all, component).

    Raises:
        ConversionError: See `convert_pipeline`; or if the settings name no destination.
        RefusedError: See `convert_pipeline`.
    """
    settings = plan.settings
    if settings.destination is None:
        raise ConversionError(f"{plan.source.path}: destination=None: must be the folder to make.")
    destination = real_place(settings.destination)
    advance = count_bytes(plan.nbytes, progress)
    try:
        with staged_folder(destination, overwrite=settings.overwrite, take_over=True) as staging:
            _write(plan, staging, settings.allow_nonfinite, advance)
    except Terminated:
        _LOGGER.info("%s", _what_stands(destination))
        raise


def _write(
    plan: ConversionPlan,
    staging: Path,
    allow_nonfinite: bool,
    advance: Callable[[int, str], None],
) -> None:
    empty = Manifest(
        source=plan.source.name,
        pipeline=plan.source.index.pipeline,
        dtype=None if plan.dtype is None else plan.dtype.name,
        variant=plan.settings.variant,
        components={},
        skipped=plan.skipped,
        sources={},
        files={},
        weights={},
        versions=library_versions(),
        loras=tuple(part.record() for part in plan.loras),
    )
    written = _take_over(staging, plan, empty, allow_nonfinite)
    try:
        for component in plan.components:
            if component.name in written:
                advance(component.nbytes, component.name)
                continue
            written[component.name] = _write_component(component, staging, allow_nonfinite, advance)
            write_manifest(staging, _manifest(empty, written, {}), PARTIAL)
    except Terminated:  # what is half written is no use to the next run
        clear(staging, keep=(PARTIAL, *written) if written else ())
        raise
    for lora in plan.loras:
        if (file := find_changed(lora.states)) is not None:
            raise ConversionError(f"{file}: a LoRA was changed while it was read: convert again.")
    files = _write_small_files(plan, staging)
    write_manifest(staging, _manifest(empty, written, files), PARTIAL)
    os.replace(staging / PARTIAL, staging / NAME)


def _what_stands(destination: Path) -> str:
    """What a conversion leaves that was told to end."""
    staging = partial_folder(destination)
    place = "stands whole" if destination.exists() else "was not made"
    if not staging.exists():
        return f"stopped: {destination} {place}, and nothing else was left; convert again"
    return (
        f"stopped: {destination} {place}; the components that are done are kept in {staging}, from "
        "which the same command goes on"
    )


def _manifest(
    empty: Manifest, written: Mapping[str, _Written], files: Mapping[str, str]
) -> Manifest:
    parts = written.values()
    return replace(
        empty,
        components={name: part.records for name, part in written.items()},
        sources={name: sha for part in parts for name, sha in part.sources.items()},
        files={**files, **{name: sha for part in parts for name, sha in part.files.items()}},
        weights={name: sha for part in parts for name, sha in part.weights.items()},
    )


def _take_over(
    staging: Path, plan: ConversionPlan, empty: Manifest, allow_nonfinite: bool
) -> dict[str, _Written]:
    """The components that a run which was killed had finished, proven; all else is removed."""
    name = NAME if (staging / NAME).is_file() else PARTIAL
    written: dict[str, _Written] = {}
    try:
        before = read_manifest(staging, name)
    except ConversionError:
        before = empty
    if _manifest(before, {}, {}) == empty:
        for component in plan.components:
            if (part := _proven(staging, before, component, allow_nonfinite)) is not None:
                written[component.name] = part
    write_manifest(staging, _manifest(empty, written, {}), PARTIAL)
    clear(staging, keep=(PARTIAL, *written))
    return written


def _proven(
    staging: Path, before: Manifest, component: ComponentPlan, allow_nonfinite: bool
) -> _Written | None:
    """What the manifest says of a component, if all its files and its sources' are so now."""
    prefix = f"{component.name}/"
    sources, files, weights = (
        {name: sha for name, sha in part.items() if name.startswith(prefix)}
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
        return None
    component.check_unchanged()
    if any(file_digest(staging / name) != sha for name, sha in {**files, **weights}.items()):
        return None
    return _Written(records, sources, files, weights)


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
    allow_nonfinite: bool,
    advance: Callable[[int, str], None],
) -> _Written:
    name, folder = component.name, staging / component.name
    folder.mkdir()
    (folder / "config.json").write_text(component.config_text, encoding="utf-8", newline="")
    copied = copy_weights(
        component, folder / "weights", allow_nonfinite=allow_nonfinite, advance=advance
    )
    component.check_unchanged()
    return _Written(
        records=copied.records,
        sources={f"{name}/{file.name}": sha for file, sha in copied.sources.items()},
        files={f"{name}/config.json": file_digest(folder / "config.json")},
        weights={f"{name}/weights/{file}": sha for file, sha in copied.files.items()},
    )
