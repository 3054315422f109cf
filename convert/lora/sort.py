"""Sort the tensors of a LoRA's file by the modules that they change."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.show import show_some
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.lora.files import is_zero
from svg_jax.convert.lora.merge import Group
from svg_jax.convert.lora.targets import ModuleNames, Target, Targets, tensor_names
from svg_jax.convert.tables.lora_names import (
    TRANSFORMER,
    Part,
    is_wrapper,
    name_method,
    normal_name,
    read_name,
    readings,
)

_NAME_LIMIT = 160  # characters of a tensor's name, of which errors hold two
_MOST_WORDS = 8  # of an unknown prefix
_SOME = 1000  # names, one of which must fit without an unknown prefix
_BESIDE = "bundle_emb."  # embeddings that OneTrainer stores with a LoRA
_DIFFERENCES = {"difference": 0, "bias difference": 1, "bias": 1}  # weights, biases


@dataclass
class SortedParts:
    """Contents of a file.

    Attributes:
        groups: Parts that fit, by component and modules.
        absent: Names of the modules that the model lacks, with an asterisk for each number.
        foreign: Number of modules of another kind of model.
        notes: Sentences to the user about how the file was read.
    """

    groups: dict[tuple[str, Targets], Group] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    foreign: int = 0
    notes: list[str] = field(default_factory=list)


def sort_tensors(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    components: Mapping[str, ModuleNames],
    into: str,
) -> SortedParts:
    """Sort the tensors of a file by what they change.

    Args:
        file: File of the LoRA, for errors.
        tensors: Tensors of the file.
        components: Modules of the components that are converted.
        into: Component that the transformer's names mean.

    Raises:
        ConversionError: If a tensor is no part of a LoRA that can be merged; or the LoRA is of
            another model, because nothing or less than half of it fits.
    """
    parts = _read_names(file, tensors, components)
    found = _sort(tensors, parts, components, into, "")
    for prefix in () if found.groups else _wrappers([part.module for part in parts.values()]):
        some = itertools.islice(parts.values(), _SOME)
        read = ((_readings(part, prefix, components, into), part) for part in some)
        if any(_fitting(readable, part, components) for readable, part in read):
            found = _sort(tensors, parts, components, into, prefix)
            found.notes.append(f"its names begin with {prefix:.80}, which is passed over.")
            break
    if not found.groups and not found.absent:
        raise ConversionError(f"{file}: changes nothing: choose another file.")
    where = " or ".join(sorted(components))
    if not found.groups and into not in components:
        raise ConversionError(
            f"{file}: is for the {into}, and what is converted is {where}: choose that with "
            "lora_into=…, or other components."
        )
    if not found.groups or found.foreign > len(found.groups):
        count = len(found.groups)
        fits = f"only {count} of its modules fit" if count else "nothing in it fits"
        absent = show_some(sorted(found.absent))
        raise ConversionError(
            f"{file}: {fits} {where}, where there is no {absent}: the LoRA is of another model; "
            "choose another file, or other components."
        )
    others = tensors.keys() - parts.keys()
    if _is_whole(parts):
        found.notes.append("its trainer (SAT) does not store alpha: its default, 1, is taken.")
        if others:
            found.notes.append(f"{len(others)} tensors are the model's own, and are passed over.")
    else:
        found.absent.update(map(_pattern, others))
    return found


def _read_names(
    file: Path, tensors: Mapping[str, StoredTensor], components: Mapping[str, ModuleNames]
) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for key in tensors:
        if len(key) > _NAME_LIMIT:
            raise ConversionError(f"{file}: {key:.{_NAME_LIMIT}}… is no name in a LoRA.")
        if method := name_method(key):
            raise ConversionError(
                f"{file}: {key} makes it {method}, which is not merged like a LoRA: merge it in "
                "its trainer."
            )
        if part := read_name(key):
            parts[key] = part
    for key in tensors:
        if key not in parts and not key.startswith(_BESIDE) and not _is_whole(parts):
            raise ConversionError(
                f"{file}: {key} is no part of a LoRA that can be merged into "
                f"{' or '.join(sorted(components))}: choose another file, or other components."
            )
    return parts


def _is_whole(parts: Mapping[str, Part]) -> bool:
    """Tell whether SAT wrote the file, which stores a LoRA's matrices with the whole model."""
    return any(part.suffix.alpha is not None for part in parts.values())


def _sort(
    tensors: Mapping[str, StoredTensor],
    parts: Mapping[str, Part],
    components: Mapping[str, ModuleNames],
    into: str,
    prefix: str,
) -> SortedParts:
    found = SortedParts()
    foreign: set[str] = set()
    for key, part in parts.items():
        tensor, kind = tensors[key], part.suffix.kind
        readable = _readings(part, prefix, components, into)
        fitting = _fitting(readable, part, components)
        if fitting is None:
            component, rest = readable[-1]
            if kind in _DIFFERENCES and is_zero(tensor):
                continue  # some trainers write zeros for all norms and biases
            name = _pattern(rest)
            found.absent.add(name if component == into else f"{component}.{name}")
            own = components.get(component)
            if own is not None and not any(own.knows(rest) for _, rest in readable):
                foreign.add(rest)
            continue
        component, rest, targets = fitting
        group = found.groups.setdefault((component, targets), Group(rest, part.suffix.alpha))
        if kind in group.parts:
            raise ConversionError(
                f"{tensor.file}: {key} and {group.parts[kind].name} are the same part: keep one of "
                "them."
            )
        group.parts[kind] = tensor
        group.alpha = group.alpha if part.suffix.alpha is None else part.suffix.alpha
    found.foreign = len(foreign)
    return found


def _readings(
    part: Part, prefix: str, components: Mapping[str, ModuleNames], into: str
) -> list[tuple[str, str]]:
    found = readings(part.module.removeprefix(prefix), components)
    return [(into if component == TRANSFORMER else component, rest) for component, rest in found]


def _fitting(
    readable: list[tuple[str, str]], part: Part, components: Mapping[str, ModuleNames]
) -> tuple[str, str, Targets] | None:
    """Find the first reading of a name that means modules of the model; None if none does."""
    for component, rest in readable:
        own = components.get(component)
        targets = None if own is None else own.targets.get(normal_name(rest))
        if own is None or targets is None:
            continue
        if part.number is not None:
            if part.number >= len(targets):
                return None
            target = targets[part.number]
            targets = (Target(target.module, ((0, target.rows),)),)
        which = _DIFFERENCES.get(part.suffix.kind)
        names = (tensor_names(target.module, own.shapes) for target in targets)
        if which is not None and any(of[which] not in own.shapes for of in names):
            return None
        return component, rest, targets
    return None


def _wrappers(modules: Sequence[str]) -> Iterator[str]:
    """Yield the beginnings of all names that may be an unknown prefix."""
    ends = (match.end() for match in re.finditer(r"[._]", modules[0] if modules else ""))
    for end in itertools.islice(ends, _MOST_WORDS):
        prefix = modules[0][:end]
        if not all(module.startswith(prefix) for module in modules):
            return
        if is_wrapper(prefix):
            yield prefix


def _pattern(name: str) -> str:
    """Replace each number between dots or underscores of a name by an asterisk."""
    return re.sub(r"(?<!transformer_)(?<!encoder_)(?<=[._])\d+(?=[._])", "*", name)
