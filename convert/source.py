"""Open a source: the folder of a pipeline, a release or a component, or a file of weights."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from svg_jax.convert.components import (
    PipelineIndex,
    check_component_config,
    named_class,
    read_pipeline_index,
    rule_names,
)
from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_inside, check_regular
from svg_jax.convert.formats.json_file import JsonFile
from svg_jax.convert.formats.show import show
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.formats.wrappers import (
    check_prefix,
    choose,
    drop_layer_wrappers,
    find_wrapped,
    unwrap,
)
from svg_jax.convert.releases.recognise import OriginalComponent, identify
from svg_jax.convert.releases.wan_repository import read_repository
from svg_jax.convert.sources.files import SourceFiles
from svg_jax.convert.sources.scales import attach_scales, check_scales
from svg_jax.convert.sources.weights import SUFFIXES, folder_of, is_weights, weights_files
from svg_jax.convert.tables.registry import MODEL_CLASSES

_GIVE = (
    f"give the folder of a pipeline or of a component, or a file of weights ({', '.join(SUFFIXES)})"
)


@dataclass(frozen=True)
class ComponentWeights:
    """The weights and the config of a component.

    Attributes:
        tensors: Tensors of the component, by the names that its class gives them.
        others: Full names of tensors in the same files that it does not need.
        said: The component's config.json, if there is one.
        values: Values of config.json, which the tensors of an original release complete.
        config: Config made of these; None if the component's class is not ported.
        release: Name of the original release that the tensors are from, if they are.
    """

    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    said: JsonFile | None
    values: Mapping[str, Any]
    config: Any = None
    release: str | None = None


@dataclass(frozen=True)
class Source:
    """What components are read from.

    Attributes:
        path: Folder or file of weights.
        index: Content of model_index.json, made up if the source has none.
        places: Folder or file of each component that is not in the folder of its name.
        texts: Texts of files that the source lacks and the converted folder has, by path in it.
        files: Files that were read so far.
    """

    path: Path
    index: PipelineIndex
    places: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: SourceFiles = field(default_factory=SourceFiles)

    @cached_property
    def allowed(self) -> tuple[Path, ...]:
        """Folders that links may lead to: the hub's cache keeps a snapshot's files in `blobs`."""
        folder = folder_of(self.path)
        above = folder.resolve().parents[:2]  # the path is a snapshot, or a component in one
        return (folder, *(at.parent / "blobs" for at in above if at.name == "snapshots"))

    def folder(self, component: str) -> Path:
        """Return the folder of a component's config.json."""
        return folder_of(self._place(component))

    def weights_files(self, component: str, variant: str | None) -> list[Path]:
        """List the files of weights that a component has; see `weights.weights_files`."""
        return weights_files(self._place(component), variant)

    def read(self, component: str, variant: str | None) -> ComponentWeights:
        """Find a component's tensors, under the names that its class gives them.

        Raises:
            ConversionError: If they are missing or damaged, or do not fit config.json.
        """
        place, class_name = self._place(component), self.index.classes[component]
        if component in self.places and place != self.path:
            if not os.path.lexists(place):
                raise ConversionError(
                    f"{place}: is missing, the {component} of this release: fetch it, or leave it "
                    "out with components=…."
                )
            check_inside(place, self.allowed)
        stored, said, of = self._find(place, class_name, variant)
        if of is not None:
            config = MODEL_CLASSES[class_name].read_config(of.config)
            return ComponentWeights(of.tensors, of.unused, said, of.config, config, of.release)
        stored, weights_key = attach_scales(drop_layer_wrappers(stored)), self.files.weights_key
        said = said or self.files.json(folder_of(place) / "config.json")  # says that it is missing
        if class_name not in MODEL_CLASSES:
            return ComponentWeights(stored, (), said, said.values)
        config = check_component_config(said, class_name)
        rules = MODEL_CLASSES[class_name].rules(config)
        ours = dict.fromkeys(rule_names(rules, layers=1), True).get
        counts = find_wrapped(stored, ours, weights_key)
        if not counts:
            check_prefix(stored, ours, place)
        most = max(counts.values(), default=0)
        prefixes = [prefix for (prefix, _), count in counts.items() if 2 * count >= most]
        prefix = choose(prefixes, weights_key, place) if prefixes else ""
        check_scales(stored, prefix)
        tensors, others = unwrap(stored, prefix, prefixes)
        return ComponentWeights(tensors, others, said, said.values, config)

    def class_of(self, variant: str | None) -> str:
        """Recognise the class of a component alone, by its tensors or its config.json.

        Raises:
            ConversionError: If neither tells, or the class is not ported.
        """
        original = None if variant is not None else self._find(self.path, None, None)[2]
        if original is not None:
            return original.class_name
        file = folder_of(self.path) / "config.json"
        if not os.path.lexists(file):
            raise ConversionError(
                f"{self.path}: its tensors are of no original release that is known, so that "
                f"{file} must say what they are: put it there."
            )
        class_name = named_class(self.files.json(file).values)
        if class_name is None:
            raise ConversionError(f"{file}: names no class (_class_name or architectures): add it.")
        if class_name not in MODEL_CLASSES:
            raise ConversionError(
                f"{file}: is the config of a {show(class_name)}, and only "
                f"{', '.join(sorted(MODEL_CLASSES))} can be converted."
            )
        return class_name

    def _place(self, component: str) -> Path:
        return self.places.get(component, self.path / component)

    def _find(
        self, place: Path, class_name: str | None, variant: str | None
    ) -> tuple[Mapping[str, StoredTensor], JsonFile | None, OriginalComponent | None]:
        """Find a component's tensors, its config.json, and what it is in an original release."""
        folder = folder_of(place)
        config = folder / "config.json"
        check_inside(config, (folder, *self.allowed))
        said = self.files.json(config) if os.path.lexists(config) else None
        allowed = self.allowed
        if place == self.path == folder:  # a user may keep the large files elsewhere
            links = (file for file in folder.glob("*") if is_weights(file) and file.is_symlink())
            allowed = (*allowed, *(Path(os.path.realpath(file)).parent for file in links))
        stored = self.files.weights(place, allowed, variant)
        if variant is not None:
            return stored, said, None
        values = {} if said is None else said.values
        return stored, said, identify(stored, place, class_name, values, self.files.weights_key)


def open_source(path: Path, variant: str | None = None, weights_key: str | None = None) -> Source:
    """Recognise what a path leads to. A component alone is named after the role of its class.

    Args:
        path: Folder with model_index.json, of an original release, or of a component; or a file of
            a component's weights.
        variant: Set of weights to read; see `ConversionSettings`.
        weights_key: Key of the weights to read; see `ConversionSettings`.

    Raises:
        ConversionError: If it is none of these, or of a class that is not ported.
    """
    files = SourceFiles(weights_key)
    unnamed = Source(path, PipelineIndex(None, {}), files=files)
    if not path.is_dir():
        _check_file(path, variant)
    elif os.path.lexists(path / "model_index.json"):
        return Source(path, read_pipeline_index(path), files=files)
    elif (repository := read_repository(path, files, unnamed.allowed)) is not None:
        return Source(path, *repository, files)
    elif not any(file.name == "config.json" or is_weights(file) for file in path.glob("*")):
        raise ConversionError(
            f"{path}: holds no model_index.json, and neither config.json nor weights: {_GIVE}."
        )
    class_name = unnamed.class_of(variant)
    role = MODEL_CLASSES[class_name].role
    index = PipelineIndex(None, {role: class_name})
    return Source(path, index, {role: path}, {"model_index.json": index.text()}, files)


def _check_file(file: Path, variant: str | None) -> None:
    if not os.path.lexists(file):
        raise ConversionError(f"{file}: is no folder and no file: {_GIVE}.")
    check_regular(file)
    if not is_weights(file):
        raise ConversionError(f"{file}: is no file of weights: {_GIVE}.")
    if re.search(r"-\d+-of-\d+\b", file.name):
        raise ConversionError(f"{file}: is one of several files of weights: give their folder.")
    if variant is not None:
        raise ConversionError(f"{file}: is a file, for which variant={variant!r} says nothing.")


def select_variants(
    source: Source, chosen: Collection[str], variant: str | None
) -> Mapping[str, str | None]:
    """Choose each component's variant: None for those that lack it, as in diffusers.

    Raises:
        ConversionError: If all lack it.
    """
    if variant is not None and not variant.isalnum():
        raise ConversionError(f"variant={variant!r}: is no name of a variant, such as 'fp16'.")
    found = {name: variant if source.weights_files(name, variant) else None for name in chosen}
    if variant is not None and not any(found.values()):
        raise ConversionError(
            f"{source.path}: no component has weights of the variant {variant!r}: choose another, "
            "or none."
        )
    return found
