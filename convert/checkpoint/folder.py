"""A converted folder, believed only as far as it was checked against its manifest."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from svg_jax.convert.checkpoint.manifest import NAME, SMALL_BYTES, Manifest, read_manifest
from svg_jax.convert.checkpoint.orbax_writer import LeafFiles, open_leaves, unreadable
from svg_jax.convert.checkpoint.staging import standing_folder
from svg_jax.convert.components import COPIED, component_leaves, read_pipeline_index
from svg_jax.convert.errors import ConversionError, DamageError, RefusedError
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.paths import real_path
from svg_jax.convert.progress import Progress, count_bytes
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.convert.tables.rules import Leaf

WEIGHTS = "weights"


@dataclass(frozen=True)
class ConvertedFolder:
    """A converted folder whose small files are those that were converted.

    Attributes:
        path: The folder, without links and `..`.
        manifest: What it holds.
        pipeline: The pipeline's class; None of a component converted alone.
        classes: Class of each component that model_index.json names, there or not.
    """

    path: Path
    manifest: Manifest
    pipeline: str | None
    classes: Mapping[str, str]


def open_folder(path: str | Path) -> ConvertedFolder:
    """Open a converted folder: all of it but the weights is read and compared with the manifest.

    Raises:
        ConversionError: If it is no converted folder.
        DamageError: If a small file is not as it was converted, or one lies where a component's
            are that the conversion did not put there.
        RefusedError: If the system does not let it be read.
    """
    folder = standing_folder(real_path(path))
    manifest = read_manifest(folder)
    for name, sha256 in manifest.files.items():
        if check_file(folder, name) > SMALL_BYTES or file_digest(folder / name) != sha256:
            advice = "edit the source and convert it again"
            if Path(name).parts[0] == "scheduler":
                advice += ", or give a call its own scheduler or flow_shift"
            raise DamageError(
                f"{folder / name}: is not the file that was converted, and a converted folder is "
                f"not edited: {advice}."
            )
    index = read_pipeline_index(folder)
    parts = {*COPIED, *index.classes, *manifest.components}
    if stray := sorted(set(_small_files(folder, parts)) - manifest.files.keys() - {NAME}):
        raise DamageError(
            f"{folder / stray[0]}: was not put there by the conversion: remove it, or convert the "
            "source again with it."
        )
    for name in manifest.components:
        if index.classes.get(name) not in MODEL_CLASSES:
            raise DamageError(
                f"{folder}: model_index.json names no class for the converted {name} that is "
                "known: convert the source again."
            )
    return ConvertedFolder(folder, manifest, index.pipeline, index.classes)


def _small_files(folder: Path, parts: Iterable[str]) -> Iterator[str]:
    """The files that a reader might look for: configs at the top, all in a component's folder."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".json"):
            yield entry.name
    for part in parts:
        if (folder / part).is_dir():
            for entry in os.scandir(folder / part):
                if not entry.name.startswith(".") and not entry.is_dir():
                    yield f"{part}/{entry.name}"


def check_file(folder: Path, name: str) -> int:
    """Check that a file of a converted folder is one before it is opened: a pipe would never end.

    Args:
        folder: A real path.
        name: The file's path in the folder.

    Returns:
        Its size in bytes.

    Raises:
        DamageError: If it is missing, no regular file, or a link that leads elsewhere.
        RefusedError: If the system does not let it be looked at.
    """
    found = _look_at(folder, name)
    if isinstance(found, str):
        raise DamageError(f"{folder / name}: {found}: convert the source again.")
    return found


def _look_at(folder: Path, name: str) -> int | str:
    """A file's size in bytes, or what is wrong with it."""
    file = os.path.join(folder, *name.split("/"))
    real = os.path.realpath(file)
    if real != file and not _is_inside(Path(real), folder):
        return f"leads out of the folder, to {real}"
    try:
        found = os.stat(real)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read ({error.strerror}).") from error
    if not stat.S_ISREG(found.st_mode):
        return "is no file but a folder, a pipe or a device"
    return found.st_size


def _is_inside(target: Path, folder: Path) -> bool:
    """Whether a link's target is the folder's: the hub's cache keeps a snapshot's in `blobs`."""
    if folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs"):
        return True
    return target.is_relative_to(folder)


def check_weights(
    folder: ConvertedFolder, component: str
) -> tuple[tuple[Leaf, ...], dict[tuple[str, ...], LeafFiles]]:
    """Check the files of a component's weights without reading their numbers.

    Returns:
        The leaves that its config asks for, and how each must lie in its files, by its path.

    Raises:
        DamageError: If a file is missing, no regular file or of another size, or what says how
            numbers lie is not as it was converted.
    """
    records, where = folder.manifest.components[component], folder.path / component
    shapes = {name: record.shape for name, record in records.items()}
    try:
        leaves = component_leaves(where, folder.classes[component], shapes)
    except ConversionError as error:
        raise DamageError(str(error)) from error
    files = {}
    for leaf in leaves:
        dtypes = {records[name].stored_dtype for names in leaf.names for name in names}
        files[leaf.path] = lying = LeafFiles.of(leaf, np.dtype(min(dtypes)))
        if len(dtypes) > 1:
            raise unreadable(where / WEIGHTS, f"{leaf.rule.target} is of several dtypes")
        for file, nbytes in lying.files(where / WEIGHTS):
            name = file.relative_to(folder.path).as_posix()
            found = _look_at(folder.path, name)
            if isinstance(found, str):
                fault = found
            elif nbytes is not None:
                fault = "" if found == nbytes else f"has {found} bytes, {nbytes} expected"
            else:  # it says how the numbers lie
                is_same = found <= SMALL_BYTES and (
                    file_digest(file) == folder.manifest.weights.get(name)
                )
                fault = "" if is_same else "is not as it was converted"
            if fault:
                within = file.relative_to(where / WEIGHTS).as_posix()
                raise unreadable(where / WEIGHTS, f"{within} {fault}")
    return leaves, files


def check_components(
    folder: ConvertedFolder,
    components: Iterable[str],
    *,
    verify: bool,
    progress: Progress | None = None,
) -> dict[str, dict[tuple[str, ...], ts.TensorStore]]:
    """Check components' weights, before anything is done with them, and open them.

    Args:
        folder: The folder.
        components: Names of the components.
        verify: Whether to read their files, in little memory, and to compare them with the
            manifest; otherwise only their layout and sizes are checked.
        progress: Called with (bytes done, bytes in all, component) while files are compared.

    Returns:
        Each component's leaves, of which no number was read, by their path.

    Raises:
        DamageError: If a file is not as it was converted.
    """
    opened, sizes = {}, {}
    for component in components:
        _, files = check_weights(folder, component)
        opened[component] = open_leaves(folder.path / component / WEIGHTS, files)
        if verify:
            prefix = f"{component}/"
            names = [name for name in folder.manifest.weights if name.startswith(prefix)]
            sizes |= {name: check_file(folder.path, name) for name in names}
    advance = count_bytes(sum(sizes.values()), progress)
    for name, nbytes in sizes.items():
        if file_digest(folder.path / name) != folder.manifest.weights[name]:
            raise DamageError(
                f"{folder.path / name}: is not as it was converted: the disk or someone changed "
                "it; convert the source again."
            )
        advance(nbytes, name.split("/")[0])
    return opened
