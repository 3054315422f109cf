"""What is read: a pipeline's folder, a component's without a pipeline, or one file of weights."""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
from svg_jax.convert.rules import ConversionError
from svg_jax.convert.torch_file import SUFFIXES

_GIVE = "give the folder of a pipeline or of a component, or a .safetensors, .pt or .pth file"

_SUFFIXES = (".safetensors", *SUFFIXES)


@dataclass(frozen=True)
class Source:
    """Where components are read from.

    Attributes:
        path: The folder, or the file of weights.
        index: What model_index.json says; of a component alone, what it will say.
        alone: Whether it is a component without a pipeline: then there is no model_index.json.
    """

    path: Path
    index: PipelineIndex
    alone: bool

    @property
    def file(self) -> Path | None:
        """The file of weights, if that was given."""
        return self.path if self.alone and not self.path.is_dir() else None

    @property
    def name(self) -> str:
        """What the source is called; a link to a file in the hub's cache has the better name."""
        return self.path.absolute().name if self.file else self.path.resolve().name

    @property
    def index_text(self) -> str:
        """The model_index.json of a component alone."""
        entries = {name: [FAMILIES[of].library, of] for name, of in self.index.classes.items()}
        return json.dumps({"_class_name": None, **entries}, indent=2) + "\n"

    @cached_property
    def allowed(self) -> tuple[Path, ...]:
        """Where links may lead: the hub's cache keeps the files of a snapshot in `blobs`."""
        folder = self.path if self.file is None else self.path.parent
        above = folder.resolve().parents[: 2 if self.alone else 1]  # of the snapshot, or in it
        return (folder, *(at.parent / "blobs" for at in above if at.name == "snapshots"))

    def folder(self, component: str) -> Path:
        """Where a component's config.json is, and its weights if no file of them was given."""
        if not self.alone:
            return self.path / component
        return self.path if self.file is None else self.path.parent

    def weights_files(self, component: str, variant: str | None) -> list[Path]:
        """See `reader.weights_files`."""
        if self.file is not None:
            return [self.file]
        return weights_files(self.folder(component), variant)

    def read(
        self, component: str, variant: str | None
    ) -> tuple[Mapping[str, StoredTensor], OriginalComponent | None]:
        """A component's tensors, and what they are if they are of an original release.

        Raises:
            ConversionError: See `reader.read_weights` and `releases.find_original`.
        """
        folder = self.folder(component)
        original = self._find_original(folder, self.index.classes[component], variant)
        if original is not None:
            return original.tensors, original
        if self.file is not None:
            return read_header(self.file), None
        return read_weights(folder, self.allowed, variant), None

    def _find_original(
        self, folder: Path, class_name: str | None, variant: str | None
    ) -> OriginalComponent | None:
        check_inside(folder / "config.json", (folder, *self.allowed))
        if variant is not None:
            return None
        return find_original(self.file or folder, class_name, self.allowed)


def open_source(path: Path, variant: str | None = None) -> Source:
    """Recognises what a path leads to; a component alone gets the name of its class's role.

    Args:
        path: A folder with model_index.json; or one with config.json and weights, or with weights
            of an original release that tell all of it; or a file of such weights.
        variant: See `convert_pipeline`.

    Raises:
        ConversionError: If it is nothing of the kind, or of a class that is not ported.
    """
    if not path.is_dir():
        _check_file(path, variant)
    elif os.path.lexists(path / "model_index.json"):
        return Source(path, read_pipeline_index(path), alone=False)
    elif not _holds_component(path):
        raise ConversionError(
            f"{path}: holds no model_index.json, and neither config.json nor weights: {_GIVE}."
        )
    source = Source(path, PipelineIndex(None, {}), alone=True)
    class_name = _class_of(source, variant)
    return replace(source, index=PipelineIndex(None, {FAMILIES[class_name].role: class_name}))


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


def _class_of(source: Source, variant: str | None) -> str:
    """The class of a component alone: its tensors' if they are an original release's."""
    folder = source.folder("")
    original = source._find_original(folder, None, variant)
    if original is not None:
        return original.class_name
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ConversionError(
            f"{source.path}: its tensors are of no original release that is known, so that "
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
