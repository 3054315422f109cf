"""What the files of a LoRA change: which tensors of which components, and how strongly.

What a file means is what diffusers 0.42.1 (`load_lora_weights`, `fuse_lora`) and PEFT make of it;
what they drop with a warning or without one is refused here.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svg_jax.convert.digests import file_digest
from svg_jax.convert.lora_change import Change
from svg_jax.convert.lora_config import PEFT_CONFIG, PEFT_FILE, LoraConfig, read_lora_config
from svg_jax.convert.lora_names import TRANSFORMER, Kind, is_peft_name, read_name
from svg_jax.convert.manifest import LoraRecord
from svg_jax.convert.reader import StoredTensor, count_nonfinite, read_header, read_tensor
from svg_jax.convert.rules import ConversionError, Leaf

_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
_MATRICES = ("transpose", "patch", "conv")  # transforms of their weights

Parts = Mapping[Kind, StoredTensor]


@dataclass(frozen=True)
class Lora:
    """A LoRA that was checked and can be merged.

    Attributes:
        path: The file or folder that was given.
        scale: Its strength.
        into: The component that its names of the transformer mean.
        files: The files that are read.
        changes: Per component, the change of each tensor.
    """

    path: Path
    scale: float
    into: str
    files: tuple[Path, ...]
    changes: Mapping[str, Mapping[str, Change]]

    def record(self) -> LoraRecord:
        """What the manifest says of it; reads the files."""
        return LoraRecord(
            source=self.path.resolve().name,
            scale=self.scale,
            into=self.into,
            files={file.name: file_digest(file) for file in self.files},
        )


def read_loras(
    paths: str | Path | Sequence[str | Path],
    scales: float | Sequence[float],
    leaves: Mapping[str, Sequence[Leaf]],
    into: str | Sequence[str] = TRANSFORMER,
) -> tuple[Lora, ...]:
    """Reads what LoRAs change, but not their weights.

    Args:
        paths: Files or folders, see `convert_pipeline`.
        scales: One for all, or one for each.
        leaves: Of each component that is converted.
        into: The component that names of the transformer mean: one for all, or one for each.

    Raises:
        ConversionError: If a part of one fits nothing, is missing, or needs another kind of merge.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    scales = list(scales) if isinstance(scales, Sequence) else [scales]
    components = [into] if isinstance(into, str) else list(into)
    for what, given in (("scales", scales), ("components", components)):
        if len(given) == 1:
            given *= len(paths)
        if len(given) != len(paths):
            raise ConversionError(
                f"{len(given)} {what} for {len(paths)} LoRAs: give one for all, or one for each."
            )
    return tuple(
        _read_lora(Path(path), scale, component, leaves)
        for path, scale, component in zip(paths, scales, components, strict=True)
    )


def changes_of(loras: Sequence[Lora], component: str) -> dict[str, tuple[Change, ...]]:
    """What LoRAs add to the tensors of a component, by name, in their order."""
    changes: dict[str, tuple[Change, ...]] = {}
    for lora in loras:
        for name, change in lora.changes.get(component, {}).items():
            changes[name] = (*changes.get(name, ()), change)
    return changes


def _read_lora(path: Path, scale: float, into: str, leaves: Mapping[str, Sequence[Leaf]]) -> Lora:
    if into not in {TRANSFORMER, *leaves}:
        raise ConversionError(
            f"{path}: is meant for the component {into!r} and those that are converted are "
            f"{', '.join(sorted(leaves))}: choose one of them."
        )
    if not math.isfinite(scale):
        raise ConversionError(f"{path}: its scale is {scale} and must be a finite number.")
    file = _weights_file(path)
    tensors = read_header(file)
    config = read_lora_config(file)
    changes: dict[str, dict[str, Change]] = {}
    for (component, modules), parts in _sort(file, tensors, leaves, into, config).items():
        meant = (component, TRANSFORMER) if component == into else (component,)
        own = None if config is None else config.of(*meant)
        found = changes.setdefault(component, {})
        for name, change in _changes(modules, parts, scale, own, _shapes(leaves[component])):
            if name in found:
                raise ConversionError(
                    f"{file}: {change.up.name} and {found[name].up.name} both change {name} of the "
                    f"{component}: keep one of them."
                )
            found[name] = change
    if not changes:
        raise ConversionError(f"{file}: changes nothing: choose another file.")
    files = (file,) if config is None or config.where == file else (file, config.where)
    return Lora(path, scale, into, files, changes)


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise ConversionError(
                f"{path}: is no .safetensors file and no folder with one: give a LoRA's."
            )
        return path
    found = [path / name for name in _FILES if (path / name).exists()]
    if len(found) != 1:
        what = "both" if found else "neither"
        raise ConversionError(
            f"{path}: holds {what} of {' and '.join(_FILES)}: give the file that is meant."
        )
    return found[0]


def _sort(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    components: Collection[str],
    into: str,
    config: LoraConfig | None,
) -> Mapping[tuple[str, tuple[str, ...]], Parts]:
    """The tensors by component and modules."""
    sorted_parts: dict[tuple[str, tuple[str, ...]], dict[Kind, StoredTensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if "dora_scale" in key or "lora_magnitude_vector" in key:
            raise ConversionError(
                f"{file}: {key} makes it a DoRA, which is not merged like a LoRA: merge it in its "
                "trainer."
            )
        if is_peft_name(key) and config is None:
            raise ConversionError(
                f"{file}: {key} is PEFT's, and {PEFT_CONFIG}, which says its scale, is missing: "
                f"put it beside {PEFT_FILE}."
            )
        # Some trainers write zeros for all norms and biases.
        if key.endswith((".diff", ".diff_b")) and not np.any(read_tensor(tensor)):
            continue
        part = read_name(key, components, into)
        if part is None or part.component not in components:
            raise ConversionError(
                f"{file}: {key} is no part of a LoRA that can be merged into "
                f"{' or '.join(sorted(components))}: choose another file, or other components."
            )
        parts = sorted_parts[part.component, part.modules]
        if part.kind in parts:
            raise ConversionError(
                f"{file}: {key} and {parts[part.kind].name} are the same part: keep one of them."
            )
        parts[part.kind] = tensor
    return sorted_parts


def _shapes(leaves: Sequence[Leaf]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a LoRA may change: weights of matrices and convolutions, and biases.

    A tensor that is stored twice, under two names, is not among them.
    """
    return {
        name: leaf.rule.source_shape
        for leaf in leaves
        for (name, *ties) in leaf.names
        if not ties and (leaf.rule.transform in _MATRICES or name.endswith(".bias"))
    }


def _changes(
    modules: Sequence[str],
    parts: Parts,
    scale: float,
    config: LoraConfig | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, Change]]:
    """The changes of modules that share an "up", by the names of the tensors."""
    some = next(iter(parts.values()))
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        raise ConversionError(
            f"{some.file}: {some.name} has no {'A (down)' if down is None else 'B (up)'} beside "
            "it: the LoRA is not whole; fetch it again."
        )
    rank = down.shape[0] if down.shape else 0
    if rank == 0 or up.shape[1:] != (rank, *[1] * (len(down.shape) - 2)):
        raise ConversionError(
            f"{down.file}: {down.name} is {list(down.shape)} and {up.name} is {list(up.shape)}: "
            "they have no rank in common; fetch the LoRA again."
        )
    strength = _alpha(parts["alpha"], config) / rank if "alpha" in parts else 1.0
    changes, start = [], 0
    for module in modules:
        shape = shapes.get(f"{module}.weight", ())
        if shape[1:] != down.shape[1:] or not shape:
            fits = f"is {list(shape)}" if shape else "is none that a LoRA can change"
            raise ConversionError(
                f"{down.file}: {down.name} is {list(down.shape)} and {module}.weight {fits}: the "
                "LoRA is of another model."
            )
        factor = scale * (strength if config is None else config.scaling(module, rank))
        changes.append((f"{module}.weight", Change(down, up, start, factor)))
        for bias, by in ((parts.get("bias"), factor), (parts.get("plain bias"), scale)):
            if bias is not None:
                changes.append((f"{module}.bias", Change(None, bias, start, by)))
        start += shape[0]
    for name, change in changes:
        expected = (start,) if change.down is None else (start, *up.shape[1:])
        if change.up.shape != expected or name not in shapes:
            raise ConversionError(
                f"{up.file}: {change.up.name} is {list(change.up.shape)} and does not fit {name}, "
                f"{list(shapes.get(name, ()))}: the LoRA is of another model."
            )
    return changes


def _alpha(stored: StoredTensor, config: LoraConfig | None) -> float:
    if config is not None:
        raise ConversionError(
            f"{stored.file}: {stored.name} and {config.where.name} both say its scale: remove one."
        )
    alpha = read_tensor(stored)
    if alpha.size != 1 or count_nonfinite(alpha):
        raise ConversionError(
            f"{stored.file}: {stored.name} is not one finite number: fetch the LoRA again."
        )
    return float(alpha.reshape(()))
