"""Open a converted folder and check its files against its manifest."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from svg_jax.convert.checkpoint.manifest import NAME, SMALL_BYTES, Manifest, read_manifest
from svg_jax.convert.checkpoint.orbax_writer import LeafFiles, open_leaves, unreadable
from svg_jax.convert.checkpoint.staging import standing_folder
from svg_jax.convert.components import (
    COPIED,
    PipelineIndex,
    match_component,
    read_component_config,
    read_pipeline_index,
)
from svg_jax.convert.errors import ConversionError, DamageError, RefusedError
from svg_jax.convert.formats.digests import file_digest
from svg_jax.convert.paths import real_path
from svg_jax.convert.progress import Progress, count_bytes
from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.convert.tables.rules import Leaf

WEIGHTS = "weights"


@dataclass(frozen=True)
class ConvertedFolder:
    """A converted folder whose small files are as they were converted.

    Attributes:
        path: Real path of the folder.
        manifest: Manifest of the folder.
        index: Content of model_index.json, which also names components that were left out.
    """

    path: Path
    manifest: Manifest
    index: PipelineIndex


def open_folder(path: str | Path) -> ConvertedFolder:
    """Open a converted folder and compare all of it except the weights with its manifest.

    Raises:
        ConversionError: If it is no converted folder.
        DamageError: If a small file is not as it was converted, or was added to the folder.
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
    return ConvertedFolder(folder, manifest, index)


def _small_files(folder: Path, parts: Iterable[str]) -> Iterator[str]:
    """Yield the files that a reader might open: JSON at the top, any file of a component."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".json"):
            yield entry.name
    for part in parts:
        if (folder / part).is_dir():
            for entry in os.scandir(folder / part):
                if not entry.name.startswith(".") and not entry.is_dir():
                    yield f"{part}/{entry.name}"


def check_file(folder: Path, name: str) -> int:
    """Check a file of a converted folder before it is opened: reading a pipe would never end.

    Args:
        folder: Real path of the folder.
        name: Path of the file in the folder.

    Returns:
        The file's size in bytes.

    Raises:
        DamageError: If it is missing, not a regular file, or a link that leads out of the folder.
        RefusedError: If the system does not let it be examined.
    """
    found = _look_at(folder, name)
    if isinstance(found, str):
        raise DamageError(f"{folder / name}: {found}: convert the source again.")
    return found


def _look_at(folder: Path, name: str) -> int | str:
    """Return a file's size in bytes, or what is wrong with it."""
    file = os.path.join(folder, *name.split("/"))
    real, roots = os.path.realpath(file), [folder]
    if folder.parent.name == "snapshots":  # the hub's cache keeps a snapshot's files in `blobs`
        roots.append(folder.parent.parent / "blobs")
    if real != file and not any(Path(real).is_relative_to(root) for root in roots):
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


def open_weights(
    folder: ConvertedFolder, component: str
) -> tuple[tuple[Leaf, ...], dict[tuple[str, ...], ts.TensorStore]]:
    """Check the files of a component's weights and open them, without reading values.

    Returns:
        The leaves that the component's config asks for, and each opened leaf by its path.

    Raises:
        DamageError: If a file is missing, not regular or of another size, or the metadata are not
            as they were converted.
        RefusedError: If the system does not let them be read.
    """
    records, where = folder.manifest.components[component], folder.path / component
    shapes = {name: record.shape for name, record in records.items()}
    class_name = folder.index.classes[component]
    try:
        config = read_component_config(where, class_name)
        leaves = match_component(where, class_name, config, shapes)
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
            else:  # metadata
                is_same = found <= SMALL_BYTES and (
                    file_digest(file) == folder.manifest.weights.get(name)
                )
                fault = "" if is_same else "is not as it was converted"
            if fault:
                within = file.relative_to(where / WEIGHTS).as_posix()
                raise unreadable(where / WEIGHTS, f"{within} {fault}")
    return leaves, open_leaves(where / WEIGHTS, files)


def check_components(
    folder: ConvertedFolder,
    components: Iterable[str],
    *,
    verify: bool,
    progress: Progress | None = None,
) -> dict[str, dict[tuple[str, ...], ts.TensorStore]]:
    """Check the weights of components and open them.

    Args:
        folder: Folder that they are in.
        components: Names of the components.
        verify: Whether to read all their files, in little memory, and compare them with the
            manifest; otherwise only layout and sizes are checked.
        progress: Function called with (bytes done, bytes in all, component) during that.

    Returns:
        The opened leaves of each component, by path.

    Raises:
        DamageError: If a file is not as it was converted.
    """
    opened, sizes = {}, {}
    for component in components:
        _, opened[component] = open_weights(folder, component)
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
