"""manifest.json: what a converted folder holds and what it was made of; it is written last."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from svg_jax.convert.reader import DTYPES, read_json
from svg_jax.convert.rules import ConversionError

FORMAT_VERSION = 1
NAME = "manifest.json"
_VERSIONS_OF = ("svg-jax", "jax", "flax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class TensorRecord:
    """One source tensor.

    Attributes:
        shape: Its shape, as in the source.
        dtype: Its dtype, as in the source.
        sha256: Digest of its bytes, as in the source.
        stored_dtype: Its dtype in the converted folder.
        stored_sha256: Digest of its bytes in that dtype, in the source's layout. It differs from
            `sha256` only where the conversion was asked to cast.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    stored_dtype: str
    stored_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What stands in manifest.json.

    Attributes:
        source: Name of the source folder.
        pipeline: The pipeline's class in model_index.json.
        components: Per converted component, its tensors' records by the source's names.
        skipped: Components of the source that were left out on request.
        files: Digests (sha256) of the files that were copied as they are, by relative path.
        versions: Versions of the libraries that wrote the folder.
        format_version: Version of this layout.
    """

    source: str
    pipeline: str
    components: Mapping[str, Mapping[str, TensorRecord]]
    skipped: tuple[str, ...]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    format_version: int = FORMAT_VERSION


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a conversion depends on."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


def digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(raw.data).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json: the same manifest gives the same bytes."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a converted folder.

    Raises:
        ConversionError: If the folder is not a whole converted one, or of another format version.
    """
    file = folder / NAME
    if not file.is_file():
        if not folder.is_dir():
            raise ConversionError(f"{folder}: is no folder.")
        if (folder / "model_index.json").is_file():
            raise ConversionError(
                f"{folder}: is a pipeline folder that was not converted: run `svg-jax convert` on "
                "it."
            )
        raise ConversionError(
            f"{folder}: is no converted pipeline (it has no {NAME}): convert it again if a "
            "conversion was cut off."
        )
    values: dict[str, Any] = read_json(file)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ConversionError(
            f"{file}: is of format {version!r} and this version reads {FORMAT_VERSION}: convert "
            "the source again."
        )
    try:
        components = {
            component: {
                name: TensorRecord(**{**record, "shape": tuple(record["shape"])})
                for name, record in tensors.items()
            }
            for component, tensors in values["components"].items()
        }
        skipped = tuple(values["skipped"])
        manifest = Manifest(**{**values, "components": components, "skipped": skipped})
        _check_names(manifest)
        return manifest
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConversionError(
            f"{file}: is damaged ({error!r}): convert the source again."
        ) from error


def _check_names(manifest: Manifest) -> None:
    """Refuses names that lead out of the folder, for they become paths, and unknown dtypes."""
    for name in (*manifest.components, *manifest.files):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{name} leads out of the folder")
    for tensors in manifest.components.values():
        for name, record in tensors.items():
            if np.dtype(record.stored_dtype) not in DTYPES.values():
                raise ValueError(f"{name} is {record.stored_dtype}")
