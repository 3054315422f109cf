"""A converted folder back to diffusers' layout, bit for bit; and the check that it is unharmed."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from svg_jax.convert.components import FAMILIES, component_leaves, read_pipeline_index
from svg_jax.convert.manifest import (
    Manifest,
    TensorRecord,
    digest,
    file_digest,
    read_manifest,
)
from svg_jax.convert.progress import Progress, count_bytes
from svg_jax.convert.reader import DTYPES, read_json
from svg_jax.convert.rules import ConversionError, Leaf
from svg_jax.convert.staging import check_destination, staged_folder
from svg_jax.convert.writer import open_leaves, readable

SHARD_BYTES = 5 * 10**9  # transformers' usual size
_WORDS = {dtype.name: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Source:
    """Where one source tensor lies in the converted folder."""

    leaf: Leaf
    layer: int
    store: ts.TensorStore
    record: TensorRecord

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.record.shape)) * np.dtype(self.record.stored_dtype).itemsize

    def read(self) -> np.ndarray:
        part = self.store[self.layer] if self.leaf.rule.stacked else self.store
        return np.ascontiguousarray(self.leaf.rule.inverse(part.read().result()))


def export_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a converted folder as a pipeline folder in diffusers' layout.

    Names, shapes, dtypes and bytes of all tensors are those of the folder that was converted (after
    the cast, if one was asked for); every tensor is checked against its digest on the way. Skipped
    components are null in model_index.json.

    Args:
        source: What `convert_pipeline` made.
        destination: Folder to be made.
        shard_bytes: Weights larger than this are split into shards with an index.
        overwrite: Whether to replace a checkpoint folder that is at `destination`.
        progress: Called with (bytes done, bytes in all, component).

    Raises:
        ConversionError: One sentence; at `destination` is then what was there before, or nothing.
    """
    source, destination = Path(source), Path(destination)
    manifest = read_manifest(source)
    sources = _open(source, manifest)
    total = sum(tensor.nbytes for tensors in sources.values() for tensor in tensors.values())
    check_destination(destination, source, total, overwrite)
    advance = count_bytes(total, progress)
    with staged_folder(destination, overwrite=overwrite) as staging:
        for name in manifest.files:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, staging / name)
        index = read_json(source / "model_index.json")
        if manifest.skipped:
            index |= {name: [None, None] for name in manifest.skipped}
            text = json.dumps(index, indent=2) + "\n"
            (staging / "model_index.json").write_text(text, encoding="utf-8")
        for component, tensors in sources.items():
            stem = FAMILIES[index[component][1]].stem
            _write_weights(staging / component, stem, tensors, shard_bytes, advance)


def verify_pipeline(source: str | Path, *, progress: Progress | None = None) -> None:
    """Reads a converted folder whole and compares every tensor with the manifest's digest.

    Raises:
        ConversionError: Naming the first tensor or file that is not what was converted.
    """
    source = Path(source)
    sources = _open(source, read_manifest(source))
    total = sum(tensor.nbytes for tensors in sources.values() for tensor in tensors.values())
    advance = count_bytes(total, progress)
    for component, tensors in sources.items():
        for name, tensor in tensors.items():
            _read_checked(component, name, tensor)
            advance(tensor.nbytes, component)


def _open(folder: Path, manifest: Manifest) -> dict[str, dict[str, _Source]]:
    """Per component, every source tensor's place in its orbax checkpoint."""
    for name, sha256 in manifest.files.items():
        if not (folder / name).is_file() or file_digest(folder / name) != sha256:
            raise ConversionError(f"{folder / name}: is not the file that was converted.")
    classes = read_pipeline_index(folder).classes
    sources = {}
    for component, records in manifest.components.items():
        if component not in classes:
            raise ConversionError(f"{folder}: model_index.json lacks the converted {component}.")
        shapes = {name: record.shape for name, record in records.items()}
        leaves = component_leaves(folder / component, classes[component], shapes)
        weights = folder / component / "weights"
        stores = open_leaves(weights)
        if wrong := sorted(
            leaf.rule.target
            for leaf in leaves
            if leaf.path not in stores or stores[leaf.path].shape != leaf.shape
        ):
            raise ConversionError(
                f"{weights}: {len(wrong)} parameters are missing or misshapen, first {wrong[0]}: "
                "convert the source again."
            )
        sources[component] = {
            name: _Source(leaf, layer, stores[leaf.path], records[name])
            for leaf in leaves
            for layer, names in enumerate(leaf.names)
            for name in names
        }
    return sources


def _read_checked(component: str, name: str, tensor: _Source) -> np.ndarray:
    with readable(f"{component}: {name}"):
        array = tensor.read()
    if digest(array) != tensor.record.stored_sha256:
        raise ConversionError(
            f"{component}: {name} is not what was converted: the disk or someone changed it; "
            "convert the source again."
        )
    return array


def _write_weights(
    folder: Path,
    stem: str,
    tensors: Mapping[str, _Source],
    shard_bytes: int,
    advance: Callable[[int, str], None],
) -> None:
    shards = list(_shards(tensors, shard_bytes))
    files = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"{stem}{part}.safetensors"
        files |= dict.fromkeys(names, file.name)
        with file.open("wb") as stream:
            stream.write(_header({name: tensors[name] for name in names}))
            for name in names:
                array = _read_checked(folder.name, name, tensors[name])
                stream.write(array.reshape(-1).view(np.uint8).data)
                advance(array.nbytes, folder.name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Mapping[str, _Source], limit: int) -> Iterator[list[str]]:
    """Names in the order of the files: wide dtypes first, so that every tensor lies aligned."""
    names, size = [], 0
    width = {name: np.dtype(of.record.stored_dtype).itemsize for name, of in tensors.items()}
    for name in sorted(tensors, key=lambda name: (-width[name], name)):
        if names and size + tensors[name].nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].nbytes
    yield names


def _header(tensors: Mapping[str, _Source]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _WORDS[tensor.record.stored_dtype],
            "shape": list(tensor.record.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
