"""What is read: the folder of a pipeline, a release or a component, or one file of weights."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
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
from svg_jax.convert.sources.files import SourceFiles, folder_of
from svg_jax.convert.sources.scales import attach_scales, check_scales
from svg_jax.convert.sources.weights import SUFFIXES, is_weights, weights_files
from svg_jax.convert.tables.registry import MODEL_CLASSES

_GIVE = (
    f"give the folder of a pipeline or of a component, or a file of weights ({', '.join(SUFFIXES)})"
)


@dataclass(frozen=True)
class ComponentWeights:
    """What a component's files hold.

    Attributes:
        tensors: Its tensors by the names that its class gives them.
        others: Full names of tensors that are not the component's, or that it does without.
        original: What they are if they are of an original release.
        said: Its config.json; None if it has none.
        config: Its config, of which an original release may tell a part; None of a class that is
            not ported.
    """

    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    original: OriginalComponent | None
    said: JsonFile | None
    config: Any


@dataclass(frozen=True)
class Source:
    """Where components are read from.

    Attributes:
        path: The folder, or the file of weights.
        index: What model_index.json says; or will say, if the source has none.
        places: The folder or file that a component is in, if that is not the folder of its name.
        texts: Files that the source lacks and the result has, by their path in it.
        files: What was read of it.
    """

    path: Path
    index: PipelineIndex
    places: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: SourceFiles = field(default_factory=SourceFiles)

    @property
    def name(self) -> str:
        """What the source is called; a link to a file in the hub's cache has the better name."""
        return self.path.resolve().name if self.path.is_dir() else self.path.absolute().name

    @cached_property
    def allowed(self) -> tuple[Path, ...]:
        """Where links may lead."""
        return _allowed(self.path)

    def folder(self, component: str) -> Path:
        """Where a component's config.json is, and its weights but for a file of their own."""
        return folder_of(self._place(component))

    def weights_files(self, component: str, variant: str | None) -> list[Path]:
        """See `reader.weights_files`."""
        place = self._place(component)
        if place != folder_of(place):
            return [place] if variant is None else []
        return weights_files(place, variant)

    def read(self, component: str, variant: str | None) -> ComponentWeights:
        """Find a component's tensors, under the names that its class gives them.

        Raises:
            ConversionError: If its place is empty; see `weights.read_weights`,
                `releases.find_original` and `wrappers.choose`.
        """
        place, class_name = self._place(component), self.index.classes[component]
        if component in self.places and place != self.path:
            if not os.path.lexists(place):
                raise ConversionError(
                    f"{place}: is missing, the {component} of this release: fetch it, or leave it "
                    "out with components=… (--components)."
                )
            check_inside(place, self.allowed)
        stored, said = self._stored(place, variant)
        weights_key = self.files.weights_key
        if variant is None:
            values = {} if said is None else said.values
            original = identify(stored, place, class_name, values, weights_key)
            if original is not None:
                config = MODEL_CLASSES[class_name].read_config(original.config)
                return ComponentWeights(original.tensors, original.unused, original, said, config)
        stored = attach_scales(drop_layer_wrappers(stored))
        if class_name not in MODEL_CLASSES:
            return ComponentWeights(stored, (), None, said, None)
        said = said or self.files.json(folder_of(place) / "config.json")  # which says what is wrong
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
        return ComponentWeights(tensors, others, None, said, config)

    def class_of(self, variant: str | None) -> str:
        """Tell the class of a component alone: its tensors' if they are an original release's.

        Raises:
            ConversionError: If nothing tells it, or it is of a class that is not ported.
        """
        folder = folder_of(self.path)
        if variant is None:
            stored, said = self._stored(self.path, variant)
            values = {} if said is None else said.values
            original = identify(stored, self.path, None, values, self.files.weights_key)
            if original is not None:
                return original.class_name
        file = folder / "config.json"
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

    def _stored(
        self, place: Path, variant: str | None
    ) -> tuple[Mapping[str, StoredTensor], JsonFile | None]:
        """The tensors in a component's files as they are there, and its config.json if any."""
        folder = folder_of(place)
        config = folder / "config.json"
        check_inside(config, (folder, *self.allowed))
        said = self.files.json(config) if os.path.lexists(config) else None
        allowed = self.allowed
        if place == self.path == folder:  # a folder of one's own may have its large files elsewhere
            links = (file for file in folder.glob("*") if is_weights(file) and file.is_symlink())
            allowed = (*allowed, *(Path(os.path.realpath(file)).parent for file in links))
        return self.files.weights(place, allowed, variant), said


def _allowed(path: Path) -> tuple[Path, ...]:
    """Where links may lead: the hub's cache keeps the files of a snapshot in `blobs`."""
    folder = folder_of(path)
    above = folder.resolve().parents[:2]  # of the snapshot, or of a component in it
    return (folder, *(at.parent / "blobs" for at in above if at.name == "snapshots"))


def open_source(path: Path, variant: str | None = None, weights_key: str | None = None) -> Source:
    """Recognise what a path leads to; a component alone gets the name of its class's role.

    Args:
        path: A folder with model_index.json; or that of an original release; or one with
            config.json and weights, or with weights of an original release that tell all of it; or
            a file of such weights.
        variant: See `convert_pipeline`.
        weights_key: See `convert_pipeline`.

    Raises:
        ConversionError: If it is nothing of the kind, or of a class that is not ported.
    """
    files = SourceFiles(weights_key)
    if not path.is_dir():
        _check_file(path, variant)
    elif os.path.lexists(path / "model_index.json"):
        return Source(path, read_pipeline_index(path), files=files)
    elif (repository := read_repository(path, files, _allowed(path))) is not None:
        return Source(path, repository.index, repository.places, repository.texts, files)
    elif not _holds_component(path):
        raise ConversionError(
            f"{path}: holds no model_index.json, and neither config.json nor weights: {_GIVE}."
        )
    unnamed = Source(path, PipelineIndex(None, {}), files=files)
    class_name = unnamed.class_of(variant)
    role = MODEL_CLASSES[class_name].role
    index = PipelineIndex(None, {role: class_name})
    texts = {"model_index.json": index.text()}
    return replace(unnamed, index=index, places={role: path}, texts=texts)


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


def _holds_component(folder: Path) -> bool:
    return any(file.name == "config.json" or is_weights(file) for file in folder.glob("*"))


def select_variants(
    source: Source, chosen: Collection[str], variant: str | None
) -> Mapping[str, str | None]:
    """Each component's variant: as in diffusers, those that do not have it give what they have.

    Raises:
        ConversionError: If none has it.
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
