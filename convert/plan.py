"""Plan a conversion: check and count everything before anything is written."""

import json
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from svg_jax.convert import scheduler_config
from svg_jax.convert.checkpoint.manifest import NAME, SMALL_BYTES
from svg_jax.convert.checkpoint.orbax_writer import LeafFiles, checkpoint_nbytes
from svg_jax.convert.checkpoint.staging import check_destination
from svg_jax.convert.components import COPIED, match_component, select_components
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import (
    FileState,
    check_inside,
    check_regular,
    find_changed,
)
from svg_jax.convert.formats.digests import bytes_digest
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.stored_tensor import DTYPES, StoredTensor
from svg_jax.convert.formats.values import sentence_of
from svg_jax.convert.lora.change import Change
from svg_jax.convert.lora.read import Lora, changes_of, read_loras
from svg_jax.convert.paths import real_place, usable_path
from svg_jax.convert.run_defaults import FILE as RUN_DEFAULTS
from svg_jax.convert.run_defaults import read_run_defaults
from svg_jax.convert.settings import ConversionSettings, list_loras
from svg_jax.convert.source import ComponentWeights, Source, open_source, select_variants
from svg_jax.convert.tables.lora_names import TRANSFORMER
from svg_jax.convert.tables.rules import Leaf

_BYTES_A_RECORD = 330  # in the manifest, beside the tensor's name
_BYTES_A_FILE = 130  # in the manifest
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComponentPlan:
    """A component that was checked and can be written.

    Attributes:
        name: Name of the component and of its folder in the destination.
        class_name: Class in model_index.json.
        tensors: Tensors to read, by name.
        leaves: Leaves to write.
        files: Files of each leaf, by the leaf's path.
        unused: Names of tensors in the source that the model does not need.
        states: States of the files that are read, taken before they were checked.
        changes: Changes by LoRAs to tensors, by name, in the order of the LoRAs.
        config_text: Text of the new config.json: the source's own, in which only a dtype follows a
            cast.
        digests: Digest of the source's config.json, which was read whole.
    """

    name: str
    class_name: str
    tensors: Mapping[str, StoredTensor]
    leaves: tuple[Leaf, ...]
    files: Mapping[tuple[str, ...], LeafFiles]
    unused: tuple[str, ...]
    states: Mapping[Path, FileState]
    changes: Mapping[str, tuple[Change, ...]]
    config_text: str
    digests: Mapping[Path, str]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.files.values())

    def check_unchanged(self) -> None:
        """Check that the files that were read are as they were before.

        Raises:
            ConversionError: If one was written to, replaced or removed meanwhile.
        """
        if (file := find_changed(self.states)) is not None:
            raise ConversionError(
                f"{file}: was changed while it was read: wait until it is whole, and convert again."
            )


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion reads and writes.

    Attributes:
        settings: Settings that were asked for; their destination is a real place.
        source: Source to read.
        components: Components to convert, sorted by name.
        files: Files to copy as they are, by their path in the destination.
        dtype: Dtype to cast weights to; None keeps theirs.
        loras: LoRAs to merge into the weights.
    """

    settings: ConversionSettings
    source: Source
    components: tuple[ComponentPlan, ...]
    files: Mapping[str, Path]
    dtype: np.dtype | None
    loras: tuple[Lora, ...]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the source's components that are left out, sorted."""
        chosen = {component.name for component in self.components}
        return tuple(sorted(self.source.index.classes.keys() - set(COPIED) - chosen))

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to read."""
        return sum(component.nbytes for component in self.components)

    @property
    def written_nbytes(self) -> int:
        """Bytes of the whole new folder, to within 1 % if it has at least 10 MB."""
        size = sum(file.stat().st_size for file in self.files.values())
        size += sum(len(text.encode()) for text in self.source.texts.values())
        for component in self.components:
            size += checkpoint_nbytes(component.files) + len(component.config_text.encode())
            size += sum(_BYTES_A_RECORD + len(name) for name in component.tensors)
            size += _BYTES_A_FILE * sum(1 + leaf.num_chunks for leaf in component.files.values())
        return size


def plan_conversion(
    source: str | Path,
    *,
    lora: str | Path | Sequence[str | Path] | None = (),
    lora_scale: float | Sequence[float] = 1.0,
    lora_into: str | Sequence[str] = TRANSFORMER,
    **settings: Any,
) -> ConversionPlan:
    """Check a source without reading its weights, and write nothing; see `make_plan`.

    Args:
        source: Folder or file to read; see `ConversionSettings`.
        lora: Path of a LoRA to merge into the weights, or a list of them; see `LoraSource`.
        lora_scale: Strength of all LoRAs, or one for each.
        lora_into: Component that receives the LoRAs' layers of a "transformer": one for all, or one
            for each.
        **settings: Other fields of `ConversionSettings`.

    Raises:
        ConversionError: One sentence that says what is wrong with the source or a LoRA.
    """
    loras = list_loras(lora, lora_scale, lora_into)
    return make_plan(ConversionSettings(source=source, loras=loras, **settings))


def make_plan(settings: ConversionSettings) -> ConversionPlan:
    """Check everything that a conversion needs except the values of its weights; write nothing.

    Raises:
        ConversionError: One sentence that says what is wrong with the source, a LoRA or the
            destination.
        RefusedError: If the disk has too little room.
    """
    destination = None if settings.destination is None else real_place(settings.destination)
    source = usable_path(settings.source)
    if settings.revision is not None:
        raise ConversionError(f"{source}: revision={settings.revision!r} goes with a hub id alone.")
    if (source / NAME).is_file():
        raise ConversionError(f"{source}: is converted already: use it as it is.")
    cast = None if settings.dtype is None else _weight_dtype(settings.dtype)
    opened = open_source(source, settings.variant, settings.weights_key)
    chosen = select_components(opened.index, settings.components, opened.path)
    variants = select_variants(opened, chosen, settings.variant)
    plans = [_plan_component(opened, name, cast, variants[name]) for name in chosen]
    leaves = {part.name: part.leaves for part in plans}
    loras = read_loras(settings.loras, leaves, strict=settings.strict)
    plan = ConversionPlan(
        settings=replace(settings, destination=destination),
        source=opened,
        components=tuple(replace(part, changes=changes_of(loras, part.name)) for part in plans),
        files=_small_files(opened),
        dtype=cast,
        loras=loras,
    )
    if destination is not None:
        for path in (opened.path, *(lora.path for lora in loras)):
            check_destination(destination, path, plan.written_nbytes, settings.overwrite)
    return plan


def _weight_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in DTYPES.values():
        raise ConversionError(f"dtype={dtype!r}: must be float32, float16 or bfloat16.")
    return found


def _small_files(source: Source) -> dict[str, Path]:
    """List the files to copy as they are, by their path in the destination."""
    index = "model_index.json"
    files = {} if index in source.texts else {index: source.path / index}
    if os.path.lexists(defaults := source.path / RUN_DEFAULTS):
        check_inside(defaults, source.allowed)
        read_run_defaults(source.path)
        files[RUN_DEFAULTS] = defaults
    made = {Path(name).parent.name for name in source.texts}
    for name in COPIED:
        if name not in source.index.classes or name in made:
            continue
        folder = source.folder(name)
        found = sorted(file for file in folder.glob("*") if not file.is_dir())
        if not found:
            raise ConversionError(f"{folder}: the {name} of this pipeline is missing: fetch it.")
        for file in found:
            check_inside(file, source.allowed)
            check_regular(file)
            if file.stat().st_size > SMALL_BYTES:
                raise ConversionError(f"{file}: is too large for a {name}: remove it.")
            files[f"{name}/{file.name}"] = file
    if (file := files.get(scheduler_config.FILE)) is not None:
        classes = scheduler_config.classes_of(source.index.pipeline)
        found = scheduler_config.check_scheduler(read_json(file), classes)
        if found.malformed:
            raise ConversionError(f"{file}: {sentence_of(found.malformed, 300)}: correct it.")
        if found.unported:
            reasons = sentence_of(found.unported, 300)
            _LOGGER.warning("%s: %s: it is carried as it is, and cannot be sampled", file, reasons)
    return files


def _plan_component(
    source: Source, name: str, cast: np.dtype | None, variant: str | None
) -> ComponentPlan:
    folder, class_name = source.folder(name), source.index.classes[name]
    weights = source.read(name, variant)
    tensors, said = weights.tensors, weights.said
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    leaves = match_component(folder, class_name, weights.config, shapes)
    used = {name for leaf in leaves for names in leaf.names for name in names}
    read = {folder / "config.json", *source.weights_files(name, variant)}
    read |= {file for name in used for file in tensors[name].files}
    dtypes = _leaf_dtypes(folder, class_name, weights, leaves, cast)
    return ComponentPlan(
        name=name,
        class_name=class_name,
        tensors={name: tensors[name] for name in tensors if name in used},
        leaves=leaves,
        files={leaf.path: LeafFiles.of(leaf, dtypes[leaf.path]) for leaf in leaves},
        unused=tuple(sorted({*(tensors.keys() - used), *weights.others})),
        states={file: of for file, of in source.files.states(folder).items() if file in read},
        changes={},
        config_text=_config_text(weights, cast),
        digests={} if said is None else {said.path: bytes_digest(said.content)},
    )


def _config_text(weights: ComponentWeights, cast: np.dtype | None) -> str:
    values = dict(weights.values)
    named = [key for key in ("dtype", "torch_dtype") if key in values]
    if cast is not None and named:
        values |= dict.fromkeys(named, cast.name)
    elif weights.said is not None and weights.release is None:
        return weights.said.content.decode("utf-8")
    return json.dumps(values, indent=2) + "\n"


def _leaf_dtypes(
    folder: Path,
    class_name: str,
    weights: ComponentWeights,
    leaves: Collection[Leaf],
    cast: np.dtype | None,
) -> dict[tuple[str, ...], np.dtype]:
    for names in (names for leaf in leaves for names in leaf.names):
        for name in names:
            _ = weights.tensors[name].converted_dtype  # refuses what is no weight
    if cast is not None:
        from svg_jax.convert.checkpoint.load import param_dtypes  # imports flax and all the models

        return param_dtypes(class_name, weights.config, cast)
    dtypes = {}
    for leaf in leaves:
        stored = [weights.tensors[name] for names in leaf.names for name in names]
        found = {tensor.converted_dtype for tensor in stored}
        if len(found) > 1 and any(tensor.dtype not in found for tensor in stored):
            found = {DTYPES["F32"]}  # some are widened anyway; it holds all of them exactly
        if len(found) > 1:
            named = " and ".join(sorted(dtype.name for dtype in found))
            raise ConversionError(
                f"{folder}: the layers of {leaf.rule.source} mix {named}: choose one dtype to "
                "cast the weights to."
            )
        (dtypes[leaf.path],) = found
    return dtypes
