"""Convert a folder back into diffusers' layout, bit for bit."""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from svg_jax.convert.checkpoint.folder import open_folder
from svg_jax.convert.checkpoint.staging import check_destination, staged_folder
from svg_jax.convert.checkpoint.tensors import ConvertedTensor, open_tensors
from svg_jax.convert.formats.json_file import read_json
from svg_jax.convert.formats.stored_tensor import DTYPES
from svg_jax.convert.paths import real_place
from svg_jax.convert.progress import Advance, Progress, count_bytes
from svg_jax.convert.tables.registry import MODEL_CLASSES

SHARD_BYTES = 5 * 10**9  # the default of transformers
_WORDS = {dtype.name: word for word, dtype in DTYPES.items()}


def export_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a converted folder as a pipeline folder in diffusers' layout.

    Names, shapes, dtypes and bytes of all tensors are those of the folder that was converted (after
    the cast, if there was one); every tensor is checked against its digest. Components that were
    left out are null in model_index.json.

    Args:
        source: Converted folder.
        destination: Folder to write.
        shard_bytes: Largest size of a file of weights; larger weights are split into shards with an
            index.
        overwrite: Whether to replace a checkpoint folder that is at `destination`.
        progress: Function called with (bytes done, bytes in all, component).

    Raises:
        ConversionError: One sentence that says what is wrong, where, and what to do. The
            destination is then as it was before.
    """
    folder, destination = open_folder(source), real_place(destination)
    source, manifest = folder.path, folder.manifest
    sources = open_tensors(folder)
    check_destination(destination, source, manifest.tensor_bytes, overwrite)
    advance = count_bytes(manifest.tensor_bytes, progress)
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
            stem = MODEL_CLASSES[index[component][1]].stem
            _write_weights(staging / component, stem, tensors, shard_bytes, advance)


def _write_weights(
    folder: Path, stem: str, tensors: Mapping[str, ConvertedTensor], limit: int, advance: Advance
) -> None:
    shards = list(_shards(tensors, limit))
    files = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"{stem}{part}.safetensors"
        files |= dict.fromkeys(names, file.name)
        with file.open("wb") as stream:
            stream.write(_header({name: tensors[name] for name in names}))
            for name in names:
                array = tensors[name].read()
                stream.write(array.reshape(-1).view(np.uint8).data)
                advance(array.nbytes, folder.name)
    if len(shards) > 1:
        total = sum(tensor.record.stored_nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Mapping[str, ConvertedTensor], limit: int) -> Iterator[list[str]]:
    """Yield the names of each shard, wide dtypes first, so that every tensor is aligned."""
    names, size = [], 0
    width = {name: np.dtype(of.record.stored_dtype).itemsize for name, of in tensors.items()}
    for name in sorted(tensors, key=lambda name: (-width[name], name)):
        if names and size + tensors[name].record.stored_nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].record.stored_nbytes
    yield names


def _header(tensors: Mapping[str, ConvertedTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _WORDS[tensor.record.stored_dtype],
            "shape": list(tensor.record.shape),
            "data_offsets": [offset, offset + tensor.record.stored_nbytes],
        }
        offset += tensor.record.stored_nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
