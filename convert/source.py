"""What is read: the folder of a pipeline, a release or a component, or one file of weights."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from svg_jax.convert.components import (
    FAMILIES,
    PipelineIndex,
    named_class,
    read_pipeline_index,
)
from svg_jax.convert.reader import (
    StoredTensor,
    check_inside,
    check_regular,
    read_header,
    read_json,
    read_weights,
    weights_files,
)
from svg_jax.convert.releases import OriginalComponent, find_original
from svg_jax.convert.repository import read_repository
from svg_jax.convert.rules import ConversionError
from svg_jax.convert.torch_file import SUFFIXES

_GIVE = "give the folder of a pipeline or of a component, or a .safetensors, .pt or .pth file"

_SUFFIXES = (".safetensors", *SUFFIXES)


@dataclass(frozen=True)
class Source:
    """Where components are read from.

    Attributes:
        path: The folder, or the file of weights.
        index: What model_index.json says; or will say, if the source has none.
        places: The folder or file that a component is in, if that is not the folder of its name.
        texts: Files that the source lacks and the result has, by their path in it.
    """

    path: Path
    index: PipelineIndex
    places: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

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
        return _folder(self._place(component))

    def weights_files(self, component: str, variant: str | None) -> list[Path]:
        """See `reader.weights_files`."""
        place = self._place(component)
        if place != _folder(place):
            return [place] if variant is None else []
        return weights_files(place, variant)

    def read(
        self, component: str, variant: str | None
    ) -> tuple[Mapping[str, StoredTensor], OriginalComponent | None]:
        """A component's tensors, and what they are if they are of an original release.

        Raises:
            ConversionError: If its place is empty; see `reader.read_weights` and
                `releases.find_original`.
        """
        place = self._place(component)
        if component in self.places and place != self.path:
            if not os.path.lexists(place):
                raise ConversionError(
                    f"{place}: is missing, the {component} of this release: fetch it, or leave it "
                    "out with components=… (--components)."
                )
            check_inside(place, self.allowed)
        original = _find_original(place, self.index.classes[component], variant, self.allowed)
        if original is not None:
            return original.tensors, original
        if place != _folder(place):
            return read_header(place), None
        return read_weights(place, self.allowed, variant), None

    def _place(self, component: str) -> Path:
        return self.places.get(component, self.path / component)


def _folder(place: Path) -> Path:
    """The folder of a component, of which that or a file of weights is given."""
    return place.parent if place.suffix in _SUFFIXES and not place.is_dir() else place


def _allowed(path: Path) -> tuple[Path, ...]:
    """Where links may lead: the hub's cache keeps the files of a snapshot in `blobs`."""
    folder = _folder(path)
    above = folder.resolve().parents[:2]  # of the snapshot, or of a component in it
    return (folder, *(at.parent / "blobs" for at in above if at.name == "snapshots"))


def _find_original(
    place: Path, class_name: str | None, variant: str | None, allowed: tuple[Path, ...]
) -> OriginalComponent | None:
    folder = _folder(place)
    check_inside(folder / "config.json", (folder, *allowed))
    return None if variant is not None else find_original(place, class_name, allowed)


def open_source(path: Path, variant: str | None = None) -> Source:
    """Recognises what a path leads to; a component alone gets the name of its class's role.

    Args:
        path: A folder with model_index.json; or that of an original release; or one with
            config.json and weights, or with weights of an original release that tell all of it; or
            a file of such weights.
        variant: See `convert_pipeline`.

    Raises:
        ConversionError: If it is nothing of the kind, or of a class that is not ported.
    """
    if not path.is_dir():
        _check_file(path, variant)
    elif os.path.lexists(path / "model_index.json"):
        return Source(path, read_pipeline_index(path))
    elif (repository := read_repository(path, _allowed(path))) is not None:
        return Source(path, repository.index, repository.places, repository.texts)
    elif not _holds_component(path):
        raise ConversionError(
            f"{path}: holds no model_index.json, and neither config.json nor weights: {_GIVE}."
        )
    class_name = _class_of(path, variant)
    role = FAMILIES[class_name].role
    index = PipelineIndex(None, {role: class_name})
    return Source(path, index, {role: path}, {"model_index.json": index.text()})


def _check_file(file: Path, variant: str | None) -> None:
    if not os.path.lexists(file):
        raise ConversionError(f"{file}: is no folder and no file: {_GIVE}.")
    check_regular(file)
    if file.suffix not in _SUFFIXES:
        raise ConversionError(f"{file}: is no file of weights: {_GIVE}.")
    if re.search(r"-\d+-of-\d+\b", file.name):
        raise ConversionError(f"{file}: is one of several files of weights: give their folder.")
    if variant is not None:
        raise ConversionError(f"{file}: is a file, for which variant={variant!r} says nothing.")


def _holds_component(folder: Path) -> bool:
    return any(file.name == "config.json" or file.suffix in _SUFFIXES for file in folder.glob("*"))


def _class_of(path: Path, variant: str | None) -> str:
    """The class of a component alone: its tensors' if they are an original release's."""
    folder = _folder(path)
    original = _find_original(path, None, variant, _allowed(path))
    if original is not None:
        return original.class_name
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ConversionError(
            f"{path}: its tensors are of no original release that is known, so that "
            f"{file} must say what they are: put it there."
        )
    class_name = named_class(read_json(file))
    if class_name is None:
        raise ConversionError(f"{file}: names no class (_class_name or architectures): add it.")
    if class_name not in FAMILIES:
        raise ConversionError(
            f"{file}: is the config of a {class_name}, and only {', '.join(sorted(FAMILIES))} can "
            "be converted."
        )
    return class_name


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
