"""Read what a pipeline folder is made of, and match its components to the ported models."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.json_file import JsonFile, read_json, read_json_file
from svg_jax.convert.formats.show import show, show_some
from svg_jax.convert.tables.registry import BUFFERS, MODEL_CLASSES, PIPELINES
from svg_jax.convert.tables.rules import Leaf, Rule, match_rules

COPIED = ("scheduler", "tokenizer", "tokenizer_2", "image_processor")  # small, copied as they are
# Keys of a config.json that name its model and the dtype of its weights.
_NAMES = frozenset({"_class_name", "_diffusers_version", "architectures", "model_type"})
_NAMES |= {"dtype", "torch_dtype"}
_LONGEST = 100  # characters of the name of a component or a class

Stored = TypeVar("Stored")


@dataclass(frozen=True)
class PipelineIndex:
    """The content of model_index.json.

    Attributes:
        pipeline: Class of the pipeline; None for a component alone.
        classes: Class of each component that is not null, by name.
    """

    pipeline: str | None
    classes: Mapping[str, str]

    def text(self, **settings: Any) -> str:
        """Return the text of model_index.json, with these settings of the pipeline."""
        values = {"_class_name": self.pipeline, **settings}
        for name, class_name in self.classes.items():
            library = "diffusers" if name == "scheduler" else "transformers"
            if class_name in MODEL_CLASSES:
                library = MODEL_CLASSES[class_name].library
            values[name] = [library, class_name]
        return json.dumps(values, indent=2) + "\n"


def read_pipeline_index(folder: Path) -> PipelineIndex:
    """Read model_index.json.

    Raises:
        ConversionError: If it is missing or damaged, or the pipeline is not supported.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        what = "holds no model_index.json" if folder.is_dir() else "is no folder"
        raise ConversionError(f"{folder}: {what}: give a pipeline's folder in diffusers' layout.")
    values = read_json(file)
    pipeline = values.get("_class_name", "")  # null for a component converted alone
    if pipeline not in (*PIPELINES, None):
        raise ConversionError(
            f"{file}: the pipeline is '{show(pipeline)}' and only {', '.join(PIPELINES)} are "
            "supported."
        )
    classes = {}
    for name, value in values.items():
        if isinstance(value, list):
            if len(value) != 2 or not all(isinstance(part, str | None) for part in value):
                raise ConversionError(
                    f"{file}: {show(name)} is not [library, class] but {show(value)}."
                )
            if not name.isidentifier() or len(name) > _LONGEST:  # it becomes a folder's name
                raise ConversionError(f"{file}: '{show(name)}' is no name of a component.")
            class_name = value[1] or "None"
            if not class_name.isidentifier() or len(class_name) > _LONGEST:
                raise ConversionError(
                    f"{file}: '{show(value[1])}', of {name}, is no name of a class: fetch it again."
                )
            if value[1] is not None:
                classes[name] = value[1]
    return PipelineIndex(pipeline, classes)


def select_components(
    index: PipelineIndex, components: Collection[str] | None, where: Path
) -> tuple[str, ...]:
    """Return the names of the components to convert, sorted.

    Args:
        index: Components of the source.
        components: Names of those that are asked for; None asks for all.
        where: Path of the source, for errors.

    Raises:
        ConversionError: If one of them is missing or not ported yet.
    """
    there = sorted(index.classes.keys() - set(COPIED))
    ported = [name for name in there if index.classes[name] in MODEL_CLASSES]
    wanted = there if components is None else sorted(set(components) - set(COPIED))
    if absent := sorted(set(wanted) - set(there)):
        raise ConversionError(
            f"{where}: has no {' and no '.join(map(show, absent[:3]))}; its components are "
            f"{', '.join(there)}."
        )
    if foreign := [f"{name} ({index.classes[name]})" for name in wanted if name not in ported]:
        raise ConversionError(
            f"{where}: {show_some(foreign, 3, 120)} cannot be converted yet: leave it out with "
            f"components={tuple(ported)!r}."
        )
    if not wanted:
        raise ConversionError(f"{where}: there is no component to convert.")
    return tuple(wanted)


def named_class(config: Mapping[str, Any]) -> str | None:
    """Return the class that a config.json names: diffusers as a string, transformers in a list."""
    found = config.get("_class_name") or config.get("architectures")
    return str(found[0] if isinstance(found, list) else found) if found else None


def passed_over(class_name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """List the keys of a config.json that do not affect what the model computes."""
    if class_name not in MODEL_CLASSES:
        return ()
    fields = MODEL_CLASSES[class_name].read_config(config).to_dict().keys()
    return tuple(sorted(config.keys() - fields - _NAMES))


def match_component(
    folder: Path, class_name: str, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Leaf, ...]:
    """Match the tensors that a model needs to the leaves that its config asks for.

    Args:
        folder: Folder of the component, for errors.
        class_name: Class of the component.
        config: Config of that class.
        shapes: Shape of each tensor, by name.

    Raises:
        ConversionError: If the tensors do not fit the config.
    """
    rules, unused = MODEL_CLASSES[class_name].rules(config), MODEL_CLASSES[class_name].unused
    used, _ = split_unused(shapes, rules, unused, folder)
    return match_rules(used, rules, where=str(folder))


def split_unused(
    tensors: Mapping[str, Stored],
    rules: Sequence[Rule],
    unused: re.Pattern[str] | None,
    where: Path,
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Separate the tensors that a model needs from its unused ones and from buffers.

    A tensor that a rule asks for is needed, whatever its name.

    Args:
        tensors: Tensors, or their shapes, by name.
        rules: Table of the model.
        unused: Pattern of the names that the model does not need.
        where: Path that is being read, for the error.

    Returns:
        The tensors that are needed, and the names of the others.

    Raises:
        ConversionError: If there are fewer tensors than layers.
    """
    layers = max(rule.layers or 0 for rule in rules)
    if layers > len(tensors):  # else listing what is missing could take forever
        raise ConversionError(
            f"{where}: the tensors do not fit the config: it has {layers} layers and there are "
            f"only {len(tensors)} tensors. Check that config.json belongs to these weights."
        )
    needed = set(rule_names(rules))
    spare = {
        name
        for name in tensors.keys() - needed
        if BUFFERS.fullmatch(name) or (unused is not None and unused.fullmatch(name))
    }
    return {n: of for n, of in tensors.items() if n not in spare}, tuple(sorted(spare))


def rule_names(rules: Sequence[Rule], layers: int | None = None) -> Iterator[str]:
    """Yield all names that rules ask for, of at most `layers` layers if that is given."""
    for rule in rules:
        count = rule.layers or 1
        for layer in range(count if layers is None else min(count, layers)):
            yield from rule.names_of(layer)


def read_component_config(folder: Path, class_name: str) -> Any:
    """Read the config of a component and check it against its class.

    Raises:
        ConversionError: If config.json is missing, damaged, or not of this class.
    """
    return check_component_config(read_json_file(folder / "config.json"), class_name)


def check_component_config(said: JsonFile, class_name: str) -> Any:
    """Make the config of a component from its config.json; see `read_component_config`."""
    file, values = said.path, said.values
    named = values.get("_class_name", class_name)
    if named != class_name:
        raise ConversionError(
            f"{file}: is the config of a {show(named)} and model_index.json has a {class_name} "
            "there."
        )
    try:
        return MODEL_CLASSES[class_name].read_config(values)
    except ValueError as error:
        raise ConversionError(f"{file}: {show(str(error), 300)}") from error
