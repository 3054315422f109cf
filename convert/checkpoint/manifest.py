"""manifest.json: what a converted folder holds and what it was made of; it is written last."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from svg_jax.convert.errors import ConversionError, DamageError
from svg_jax.convert.files import written_atomically
from svg_jax.convert.formats.digests import bytes_digest
from svg_jax.convert.formats.json_file import read_json_file
from svg_jax.convert.formats.show import show
from svg_jax.convert.formats.stored_tensor import DTYPES
from svg_jax.convert.tables.rules import RULES_VERSION
from svg_jax.convert.versions import package_versions

FORMAT_VERSION = 3
NAME = "manifest.json"
SMALL_BYTES = 100 * 2**20  # no file outside of `weights` comes near it
_OWN_DIGEST = "sha256"  # of everything else in the manifest
_VERSIONS_OF = ("svg-jax", "jax", "flax", "orbax-checkpoint", "tensorstore", "numpy")


@dataclass(frozen=True)
class TensorRecord:
    """One source tensor.

    Attributes:
        shape: Its shape, as in the source.
        dtype: Its dtype, as in the source.
        sha256: Digest of its bytes, as in the source.
        stored_dtype: Its dtype in the converted folder.
        stored_sha256: Digest of its bytes in that dtype, in the source's layout. It differs from
            `sha256` where the conversion was asked to cast or to merge a LoRA, and where `dtype` is
            none that a model has: float64 was rounded to float32, float8 widened.
        nonfinite: How many of its elements are NaN or infinite; more than none only where the
            conversion was asked to let them pass.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    stored_dtype: str
    stored_sha256: str
    nonfinite: int = 0

    @property
    def stored_nbytes(self) -> int:
        """Size in the converted folder, in bytes."""
        return math.prod(self.shape) * np.dtype(self.stored_dtype).itemsize


@dataclass(frozen=True)
class LoraRecord:
    """A LoRA that was merged into the weights.

    Attributes:
        source: Name of its file or folder.
        scale: Its strength.
        files: Digests (sha256) of its files, by name.
        into: The component that its names of the transformer mean.
        skipped: Names, with an asterisk for each number, of what the model has no layers for.
    """

    source: str
    scale: float
    files: Mapping[str, str]
    into: str = "transformer"
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What stands in manifest.json.

    Attributes:
        source: Name of the source folder or file.
        pipeline: The pipeline's class in model_index.json; None of a component converted alone.
        dtype: What weights were cast to, if they were.
        variant: Which variant of the weights was taken ("fp16"), if one was asked for.
        components: Per converted component, its tensors' records by the source's names.
        skipped: Components of the source that were left out on request.
        sources: Digests (sha256) of the files that weights and configs were read from, by their
            component and name.
        files: Digests of the files of this folder outside of `weights`, by path.
        weights: Digests of the files of the checkpoints, by path.
        versions: Versions of the libraries that wrote the folder.
        loras: What was merged into the weights, in this order.
        rules_version: Version of the conversion rules.
        format_version: Version of this layout.
    """

    source: str
    pipeline: str | None
    dtype: str | None
    variant: str | None
    components: Mapping[str, Mapping[str, TensorRecord]]
    skipped: tuple[str, ...]
    sources: Mapping[str, str]
    files: Mapping[str, str]
    weights: Mapping[str, str]
    versions: Mapping[str, str]
    loras: tuple[LoraRecord, ...] = ()
    rules_version: int = RULES_VERSION
    format_version: int = FORMAT_VERSION

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors as they are stored."""
        records = (record for tensors in self.components.values() for record in tensors.values())
        return sum(record.stored_nbytes for record in records)


def library_versions() -> dict[str, str]:
    """Give the versions of the libraries that a conversion depends on."""
    return package_versions(_VERSIONS_OF)


def manifest_text(manifest: Manifest) -> str:
    """What stands in the file: the same manifest gives the same text."""
    return _signed(dataclasses.asdict(manifest))


def _signed(values: Mapping[str, Any]) -> str:
    body = json.dumps(values, indent=1, sort_keys=True)
    own = bytes_digest(body.encode("utf-8"))
    return json.dumps({**values, _OWN_DIGEST: own}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, manifest: Manifest, name: str = NAME) -> None:
    """Write the manifest, whole or not at all."""
    with written_atomically(folder / name) as temporary:
        temporary.write_text(manifest_text(manifest), encoding="utf-8")


def read_manifest(folder: Path, name: str = NAME) -> Manifest:
    """Read the manifest of a converted folder and check it against its own digest.

    Raises:
        ConversionError: If the folder is not a converted one, or of another format version.
        DamageError: If a single bit of the manifest is not as it was written.
    """
    file = folder / name
    if not file.is_file():
        if os.path.lexists(file):
            raise DamageError(
                f"{file}: is no file but a folder, a pipe, a device or a link to nothing: convert "
                "the source again."
            )
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
    try:
        said = read_json_file(file)
    except ConversionError as error:
        raise DamageError(str(error)) from error
    values = said.values
    version = values.get("format_version")
    body = {key: value for key, value in values.items() if key != _OWN_DIGEST}
    if _OWN_DIGEST not in values and version == 1:  # which had none
        raise ConversionError(
            f"{file}: is of format 1 and this version reads {FORMAT_VERSION}: convert the source "
            "again."
        )
    if said.content != _signed(body).encode("utf-8"):
        raise DamageError(
            f"{file}: is damaged (it does not have its own digest): convert the source again."
        )
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
        loras = tuple(
            LoraRecord(**{**record, "skipped": tuple(record.get("skipped", ()))})
            for record in body.get("loras", ())
        )
        read = {"components": components, "skipped": skipped, "loras": loras}
        manifest = Manifest(**{**body, **read})
        _check_types(manifest)
        _check_names(manifest)
        return manifest
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = show(repr(error))
        raise DamageError(f"{file}: is damaged ({reason}): convert the source again.") from error


def _check_types(manifest: Manifest) -> None:
    """Refuse values of other types: whoever signs a manifest may have written anything."""
    for name in ("sources", "files", "weights", "versions"):
        table = getattr(manifest, name)
        if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
            raise TypeError(f"{name} is no table of strings")
    for tensors in manifest.components.values():
        for name, record in tensors.items():
            digests = record.sha256, record.stored_sha256
            numbers = *record.shape, record.nonfinite
            if not all(isinstance(text, str) for text in digests) or not all(
                type(number) is int and number >= 0 for number in numbers
            ):
                raise TypeError(f"{name} has no shape, no digest or no count")


def _check_names(manifest: Manifest) -> None:
    """Refuse names that lead out of the folder, for they become paths, and unknown dtypes."""
    for name in (*manifest.components, *manifest.files, *manifest.weights):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"{name} leads out of the folder")
    for tensors in manifest.components.values():
        for name, record in tensors.items():
            if np.dtype(record.stored_dtype) not in DTYPES.values():
                raise ValueError(f"{name} is {record.stored_dtype}")
