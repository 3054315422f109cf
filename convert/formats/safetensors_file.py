"""The headers of safetensors files, read and checked.

The format: 8 bytes (length of the header, little-endian), a JSON header {name: {dtype, shape,
data_offsets}}, the tensors' bytes. The usual reader is not used because it accepts a key that
occurs twice, and NaN.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_regular
from svg_jax.convert.formats.json_file import JSON_LIMIT, parse_json
from svg_jax.convert.formats.show import show
from svg_jax.convert.formats.stored_tensor import DTYPES, FLOAT8, StoredTensor

_OTHERS = ("F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")  # "I8" is numpy's "i1"
_DTYPES = {
    **DTYPES,
    **FLOAT8,
    **{word: np.dtype(f"{word[0].lower()}{int(word[1:]) // 8}") for word in _OTHERS},
    "BOOL": np.dtype(np.bool_),
}
_NAME_LIMIT = 500  # characters; names of 100 are long
_RANK_LIMIT = 64  # torch's


@dataclass(frozen=True)
class Header:
    """Contents of the header of a safetensors file.

    Attributes:
        tensors: Tensors of the file, by name.
        metadata: Value of "__metadata__", unchecked; None if there is none.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Any


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        ConversionError: If the file is not a complete safetensors file, bytes of the data belong to
            no tensor or to two, a name occurs twice, or a dtype is unknown.
    """
    check_regular(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            header = stream.read(length) if length <= min(size, JSON_LIMIT) else b""
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    if prefix == b"version ":
        raise ConversionError(
            f"{file}: is a Git-LFS pointer, not the weights: run `git lfs pull` in that folder."
        )
    if size < 8:
        raise ConversionError(
            f"{file}: has only {size} bytes, too few for a header: fetch it again."
        )
    if len(header) < length or length == 0:
        raise ConversionError(
            f"{file}: claims a header of {length} bytes in a file of {size} (at most "
            f"{JSON_LIMIT} are allowed): it is damaged, or no safetensors file; fetch it again."
        )
    entries = parse_json(header, file)
    metadata = entries.pop("__metadata__", None)
    if odd := [name for name in entries if not name.isprintable() or len(name) > _NAME_LIMIT]:
        raise ConversionError(f"{file}: '{show(odd[0])}' is no name of a tensor: fetch it again.")
    end = data_start = 8 + length
    tensors = {name: _tensor(file, name, entry, data_start) for name, entry in entries.items()}
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            kind = "overlaps the tensor" if tensor.start < end else "leaves a hole"
            raise ConversionError(f"{file}: {tensor.name} {kind} before it: the file is damaged.")
        end += tensor.nbytes
    if end != size:
        what = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise ConversionError(f"{file}: {what} ({size} bytes, {end} expected): fetch it again.")
    return Header(tensors, metadata)


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    where = f"{file}: {show(name)}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise ValueError("not all of them are sizes")
        if len(shape) > _RANK_LIMIT:  # the product of too many could take for ever
            raise ValueError("more axes than a tensor has")
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{where} has a damaged header entry, {show(entry)}: fetch it again."
        ) from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConversionError(
            f"{where} is {dtype!r:.20}, and a weight must be one of {', '.join((*DTYPES, *FLOAT8))}"
            ": save the model unquantised."
        )
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise ConversionError(
            f"{where} of shape {show(shape)} takes {nbytes} bytes and its offsets give "
            f"{end - begin}: the header is damaged."
        )
    return StoredTensor(name, file, _DTYPES[dtype], tuple(shape), data_start + begin, nbytes)
