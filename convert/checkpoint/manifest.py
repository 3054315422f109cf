"""manifest.json: what a converted folder holds and what it was made from. It is written last."""

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

FORMAT_VERSION = 3
NAME = "manifest.json"
SMALL_BYTES = 100 * 2**20  # no file outside `weights` comes near it
_OWN_DIGEST = "sha256"  # key of the digest of everything else in the manifest


@dataclass(frozen=True)
class TensorRecord:
    """What is known of one tensor of the source.

    Attributes:
        shape: Shape in the source.
        dtype: Dtype in the source.
        sha256: Digest of the bytes in the source.
        stored_dtype: Dtype in the converted folder.
        stored_sha256: Digest of the bytes in that dtype, in the source's layout. It differs from
            `sha256` after a cast or a merged LoRA, and where no model has `dtype`: float64 is
            rounded to float32, float8 is widened.
        nonfinite: Number of elements that are NaN or infinite; 0 unless the conversion was asked
            to allow them.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    stored_dtype: str
    stored_sha256: str
    nonfinite: int = 0

    @property
    def stored_nbytes(self) -> int:
        """Bytes that it takes in the converted folder."""
        return math.prod(self.shape) * np.dtype(self.stored_dtype).itemsize


@dataclass(frozen=True)
class LoraRecord:
    """A LoRA that was merged into the weights.

    Attributes:
        source: Name of the LoRA's file or folder.
        scale: Strength of the LoRA.
        files: Digests (sha256) of the LoRA's files, by name.
        into: Component that received the LoRA's layers of a "transformer".
        skipped: Names of parts whose layers the model lacks, each number replaced by an asterisk.
    """

    source: str
    scale: float
    files: Mapping[str, str]
    into: str = "transformer"
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        source: Name of the source folder or file.
        pipeline: Class of the pipeline in model_index.json; None for a component converted alone.
        dtype: Dtype that weights were cast to; None if they were not.
        variant: Variant of the weights that was asked for, such as "fp16".
        components: Records of each component's tensors, by their names in the source.
        skipped: Components of the source that were left out on request.
        sources: Digests (sha256) of the files that weights and configs were read from, by
            "component/name".
        files: Digests of this folder's files outside `weights`, by path.
        weights: Digests of the checkpoints' files, by path.
        versions: Versions of the libraries that wrote the folder.
        loras: LoRAs that were merged into the weights, in this order.
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
        """Bytes of all tensors as they are stored."""
        records = (record for tensors in self.components.values() for record in tensors.values())
        return sum(record.stored_nbytes for record in records)

    def add(
        self, component: str, records: Mapping[str, TensorRecord], **digests: Mapping[str, str]
    ) -> "Manifest":
        """Add a component: its records, and its digests in `sources`, `files` and `weights`."""
        tables = {name: {**getattr(self, name), **more} for name, more in digests.items()}
        components = {**self.components, component: records}
        return dataclasses.replace(self, components=components, **tables)


def _signed(values: Mapping[str, Any]) -> str:
    body = json.dumps(values, indent=1, sort_keys=True)
    own = bytes_digest(body.encode("utf-8"))
    return json.dumps({**values, _OWN_DIGEST: own}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, manifest: Manifest, name: str = NAME) -> None:
    """Write the manifest, whole or not at all."""
    with written_atomically(folder / name) as temporary:
        temporary.write_text(_signed(dataclasses.asdict(manifest)), encoding="utf-8")


def read_manifest(folder: Path, name: str = NAME) -> Manifest:
    """Read the manifest of a converted folder and check it against its own digest.

    Raises:
        ConversionError: If the folder was not converted, or has another format version.
        DamageError: If a single bit of the manifest was changed.
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
        what = (
            f"no converted pipeline (it has no {NAME}): convert it again if a conversion was cut "
        )
        what += "off."
        if (folder / "model_index.json").is_file():
            what = "a pipeline folder that was not converted: run `svg-jax convert` on it."
        raise ConversionError(f"{folder}: is {what}")
    try:
        said = read_json_file(file)
    except ConversionError as error:
        raise DamageError(str(error)) from error
    values = said.values
    version = values.get("format_version")
    body = {key: value for key, value in values.items() if key != _OWN_DIGEST}
    is_first = version == 1 and _OWN_DIGEST not in values  # format 1 had no digest
    if said.content != _signed(body).encode("utf-8") and not is_first:
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
        loras = tuple(
            LoraRecord(**{**record, "skipped": tuple(record.get("skipped", ()))})
            for record in body.get("loras", ())
        )
        body |= {"components": components, "skipped": tuple(body["skipped"]), "loras": loras}
        manifest = Manifest(**body)
        _check(manifest)
        return manifest
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = show(repr(error))
        raise DamageError(f"{file}: is damaged ({reason}): convert the source again.") from error


def _check(manifest: Manifest) -> None:
    """Refuse wrong types, unknown dtypes, and names that, as paths, lead out of the folder.

    A valid digest does not prove who wrote the manifest.
    """
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
            if np.dtype(record.stored_dtype) not in DTYPES.values():
                raise ValueError(f"{name} is {record.stored_dtype}")
    for name in (*manifest.components, *manifest.files, *manifest.weights):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"{name} leads out of the folder")
