"""Which tensors of which components a LoRA changes, and how strongly.

Files mean what diffusers 0.42.1 (`load_lora_weights`, `fuse_lora`) and PEFT make of them. Where
these drop a part or do not know a trainer's names, files mean what ComfyUI or the trainer does.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svg_jax.convert.checkpoint.manifest import LoraRecord
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import FileState, file_state
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.formats.show import show_some
from svg_jax.convert.lora.change import Change
from svg_jax.convert.lora.config import PEFT_CONFIG, read_lora_config
from svg_jax.convert.lora.files import find_lora, read_lora_file
from svg_jax.convert.lora.merge import group_changes
from svg_jax.convert.lora.sort import sort_tensors
from svg_jax.convert.lora.targets import ModuleNames, changeable_shapes, module_names
from svg_jax.convert.paths import name_of, usable_path
from svg_jax.convert.settings import LoraSource
from svg_jax.convert.tables.lora_names import PEFT, TRANSFORMER
from svg_jax.convert.tables.rules import Leaf

_LOGGER = logging.getLogger(__name__)

Changes = Mapping[str, tuple[Change, ...]]


@dataclass(frozen=True)
class Lora:
    """A LoRA that was checked and can be merged.

    Attributes:
        source: Settings of the LoRA.
        path: File or folder of the LoRA.
        name: Name in the manifest.
        states: States of its files before they were read.
        changes: Changes of each tensor, by component.
        skipped: Names, with an asterisk for each number, of parts for layers the model lacks.
    """

    source: LoraSource
    path: Path
    name: str
    states: Mapping[Path, FileState]
    changes: Mapping[str, Changes]
    skipped: tuple[str, ...]

    def record(self) -> LoraRecord:
        """Make the entry of the manifest, with digests of the files."""
        return LoraRecord(
            source=self.name,
            scale=self.source.scale,
            into=self.source.into,
            files={file.name: file_digest(file) for file in self.states},
            skipped=self.skipped,
        )


def read_loras(
    sources: Sequence[LoraSource], leaves: Mapping[str, Sequence[Leaf]], *, strict: bool = False
) -> tuple[Lora, ...]:
    """Find the changes that LoRAs make; their matrices are not read yet.

    Args:
        sources: LoRAs, in the order in which they are merged.
        leaves: Leaves of each component that is converted.
        strict: Whether parts for layers that the model lacks are refused instead of skipped.

    Raises:
        ConversionError: If nothing of a LoRA fits, or a part is missing, has another shape, or must
            be merged in another way.
    """
    named = leaves if sources else {}
    components = {name: module_names(changeable_shapes(own)) for name, own in named.items()}
    return tuple(_read_lora(source, components, strict=strict) for source in sources)


def changes_of(loras: Sequence[Lora], component: str) -> dict[str, tuple[Change, ...]]:
    """Collect the changes of a component's tensors by several LoRAs, in the LoRAs' order."""
    changes: dict[str, tuple[Change, ...]] = {}
    for lora in loras:
        for name, more in lora.changes.get(component, {}).items():
            changes[name] = (*changes.get(name, ()), *more)
    return changes


def _read_lora(source: LoraSource, components: Mapping[str, ModuleNames], *, strict: bool) -> Lora:
    path, into = source.path, source.into
    if into not in {TRANSFORMER, *components}:
        raise ConversionError(
            f"{path}: is meant for the component {into!r} and those that are converted are "
            f"{', '.join(sorted(components))}: choose one of them."
        )
    file = find_lora(path)
    parts = (file, file.with_name(PEFT_CONFIG))
    states = {part: file_state(part) for part in parts if part.exists()}
    header = read_lora_file(file)
    tensors = header.tensors
    is_peft = any(key.startswith(PEFT) for key in tensors)
    config = read_lora_config(file, header.metadata, is_peft=is_peft)
    found = sort_tensors(file, tensors, components, into)
    changes: dict[str, dict[str, tuple[Change, ...]]] = {}
    for (component, targets), group in found.groups.items():
        meant = (component, TRANSFORMER) if component == into else (component,)
        own = None if config is None else config.of(*meant)
        shapes = components[component].shapes
        changed = changes.setdefault(component, {})
        for name, change in group_changes(targets, group, source.scale, own, shapes):
            for other in changed.get(name, ()):
                if (other.down is None) == (change.down is None):
                    raise ConversionError(
                        f"{file}: {change.up.name} and {other.up.name} both change {name} of the "
                        f"{component}: keep one of them."
                    )
            changed[name] = (*changed.get(name, ()), change)
    absent = show_some(sorted(found.absent))
    if absent and strict:
        raise ConversionError(
            f"{file}: has parts for what the model lacks, which strict=True forbids: {absent}."
        )
    if absent:
        _LOGGER.warning("%.80s: parts for what the model lacks are skipped: %s.", file.name, absent)
    has_alpha = any("alpha" in group.parts for group in found.groups.values())
    if is_peft and config is None and not has_alpha:
        _LOGGER.warning(
            "%.80s: PEFT's %s is not beside it: alpha is taken as the rank.", file.name, PEFT_CONFIG
        )
    for note in found.notes:
        _LOGGER.warning("%.80s: %s", file.name, note)
    files = (file,) if config is None or config.where == file else (file, config.where)
    given = usable_path(path)
    place = given if given.exists() else file
    name = str(path) if place == file != given else name_of(given)
    states = {part: states[part] for part in files}
    return Lora(source, place, name, states, changes, tuple(sorted(found.absent)))
