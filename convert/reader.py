"""Safetensors files, read a tensor at a time and believed only as far as they were checked.

The format: 8 bytes (little-endian length of the header), a JSON header {name: {dtype, shape,
data_offsets}}, the tensors' bytes. A reader of our own, because the usual one accepts a key that
stands twice, reads NaN without a word, and knows nothing of shards.
"""

import json
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from svg_jax.convert.rules import ConversionError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What else a safetensors file may hold; a LoRA's does.
ALL_DTYPES = DTYPES | {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
        **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
        "BOOL": np.bool_,
    }.items()
}
STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call the weights
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
_NAME_LIMIT = 500  # characters; names of 100 are long
_JSON_LIMIT = 100_000_000  # bytes; the largest index of a released model has 0.1 % of it
# The bits of infinity in each type; those of NaN are larger.
_INFINITY = {
    DTYPES["F32"]: 0x7F800000,
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
    np.dtype(np.float64): 0x7FF0000000000000,
}
_PIECE_BYTES = 4 * 2**20  # read at once: stays in the processor's cache for all that is done to it


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name in the header.
        file: The safetensors file, or one of torch.save.
        dtype: float32, float16 or bfloat16; from torch.save any, integers and float64 included.
        shape: Its shape.
        start: Offset of its first byte in the file.
        nbytes: Its size in bytes.
        strides: Distance, in elements, of neighbours along each axis; None is row-major order.
        crc32: Checksum of its bytes, where the file has one of just these.
        parts: The tensors whose rows it is made of, one after the other, instead of lying at
            `start`. (Fused weights are taken apart so, and put together in another order.)
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    crc32: int | None = None
    parts: tuple["StoredTensor", ...] = ()


def read_header(file: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> dict[str, StoredTensor]:
    """Reads and checks the header of one safetensors file.

    Args:
        file: The file.
        dtypes: The dtypes that a tensor may have, by their names in the file.

    Raises:
        ConversionError: If the file is not a whole safetensors file, bytes of the data belong to no
            tensor or to two, a name stands twice, or a tensor is of another dtype.
    """
    check_regular(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            header = stream.read(length) if length <= min(size, _HEADER_LIMIT) else b""
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
            f"{_HEADER_LIMIT} are allowed): it is damaged, or no safetensors file; fetch it again."
        )
    entries = _parse_json(header, file)
    entries.pop("__metadata__", None)
    if odd := [name for name in entries if not name.isprintable() or len(name) > _NAME_LIMIT]:
        raise ConversionError(f"{file}: {odd[0]!r:.80} is no name of a tensor: fetch it again.")
    data_start = 8 + length
    tensors = {
        name: _tensor(file, name, entry, data_start, dtypes) for name, entry in entries.items()
    }

    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            kind = "overlaps the tensor" if tensor.start < end else "leaves a hole"
            raise ConversionError(f"{file}: {tensor.name} {kind} before it: the file is damaged.")
        end += tensor.nbytes
    if end != size:
        what = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise ConversionError(f"{file}: {what} ({size} bytes, {end} expected): fetch it again.")
    return tensors


def _tensor(
    file: Path, name: str, entry: Any, data_start: int, dtypes: Mapping[str, np.dtype]
) -> StoredTensor:
    where = f"{file}: {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise ValueError("not all of them are sizes")
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{where} has a damaged header entry, {entry!r:.80}: fetch it again."
        ) from error
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ConversionError(
            f"{where} is {dtype!r:.20}, and a weight must be one of {', '.join(dtypes)}: save the "
            "model unquantised."
        )
    nbytes = math.prod(shape) * dtypes[dtype].itemsize
    if end - begin != nbytes:
        raise ConversionError(
            f"{where} of shape {shape} takes {nbytes} bytes and its offsets give {end - begin}: "
            "the header is damaged."
        )
    return StoredTensor(name, file, dtypes[dtype], tuple(shape), data_start + begin, nbytes)


def read_weights(
    folder: Path, allowed: Iterable[Path] = (), variant: str | None = None
) -> dict[str, StoredTensor]:
    """The tensors of one component: one safetensors file, or shards listed by an index.

    Args:
        folder: The component's folder.
        allowed: Folders, besides `folder`, that symbolic links may lead to (the hub's cache keeps
            the files in a `blobs` folder of its own).
        variant: Which of several sets of weights, e.g. "fp16"; None is the one without a name.

    Raises:
        ConversionError: If there are no weights, or more than one set of them; if shards and index
            do not fit each other exactly; or a file lies outside the folder.
    """
    present = weights_files(folder, variant)
    if len(present) > 1:
        names = " and ".join(path.name for path in present)
        raise ConversionError(f"{folder}: holds {names}: remove the one that is not meant.")
    if not present:
        named = "" if variant is None else f".{variant}"
        others = sorted(path.name for path in folder.glob("*") if path.suffix != ".json")
        raise ConversionError(
            f"{folder}: holds no {STEMS[0]}{named}.safetensors or {STEMS[1]}{named}.safetensors, "
            f"nor an index of shards (found: {', '.join(others[:5]) or 'nothing'}): fetch the "
            "safetensors weights, or choose the variant that is there."
        )
    (weights,) = present
    roots = (folder, *allowed)
    check_inside(weights, roots)
    if weights.suffix == ".safetensors":
        return read_header(weights)
    return _read_shards(weights, roots)


def weights_files(folder: Path, variant: str | None) -> list[Path]:
    """The file of weights, or the index of shards, that a component has of a variant."""
    named = "" if variant is None else f".{variant}"
    names = (f"{named}.safetensors", f".safetensors.index{named}.json")
    paths = [folder / f"{stem}{name}" for stem in STEMS for name in names]
    return [path for path in paths if os.path.lexists(path)]


def _read_shards(index: Path, roots: Iterable[Path]) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json(index)["weight_map"]
    except KeyError as error:
        raise ConversionError(f"{index}: has no weight_map: fetch it again.") from error
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and file.isprintable() for file in files):
        raise ConversionError(f"{index}: its weight_map maps no tensors to files: fetch it again.")

    folder, (stem, _, ending) = index.parent, index.name.partition(".safetensors.index")
    variant = re.escape(ending.removesuffix(".json"))
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard != Path(shard).name or shard in ("", ".."):
            raise ConversionError(
                f"{index}: the shard {shard!r:.80} leads out of its folder: fetch the index again."
            )
        check_inside(folder / shard, roots, named_by=index)
    # Both of diffusers' ways to name the shards of a variant.
    pattern = rf"{stem}({variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.safetensors"
    there = {path.name for path in folder.iterdir() if re.fullmatch(pattern, path.name)}
    stray = there - set(shards)
    if stray:
        raise ConversionError(
            f"{index}: lists nothing of {', '.join(sorted(stray)[:5])}: remove the shards that "
            "are not of this checkpoint, or fetch its index."
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        file = folder / shard
        if not os.path.lexists(file):
            raise ConversionError(f"{file}: the index lists this shard, it is missing: fetch it.")
        found = read_header(file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ConversionError(
                f"{file}: {twice[0]} is also in {tensors[twice[0]].file.name} ({len(twice)} "
                "tensors are in two shards): fetch the checkpoint again."
            )
        listed = {name for name, of in weight_map.items() if of == shard}
        for names, what in (
            (listed - found.keys(), "lacks tensors that the index says are in it"),
            (found.keys() - listed, "holds tensors that the index does not say are in it"),
        ):
            if names:
                some = ", ".join(sorted(names)[:5])
                raise ConversionError(f"{file}: {what} ({len(names)}: {some}): fetch both again.")
        tensors |= found
    return tensors


def check_inside(file: Path, roots: Iterable[Path], *, named_by: Path | None = None) -> None:
    """Refuses a file that does not lie in one of the folders `roots`, links followed.

    Args:
        file: The file.
        roots: The folders.
        named_by: The file that gives its name, if one does, for the error.

    Raises:
        ConversionError: If it does not.
    """
    target = Path(os.path.realpath(file))  # unlike resolve, it takes a link to itself
    if not any(target.is_relative_to(root.resolve()) for root in roots):
        raise ConversionError(
            f"{f'{named_by}: ' if named_by else ''}{file} leads out of the checkpoint's folder, to "
            f"{target}: copy the file into it."
        )


def check_regular(file: Path) -> None:
    """Refuses what is not a file or a link to one: opening a pipe would wait for ever.

    Raises:
        ConversionError: If it is not, or is not there.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        what = "is a link to nothing" if file.is_symlink() else "cannot be read"
        raise ConversionError(f"{file}: {what} ({error.strerror}): fetch it again.") from error
    if not regular:
        raise ConversionError(f"{file}: is no file but a folder, a pipe or a device: remove it.")


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConversionError(f"{file}: the key {twice!r:.80} stands twice: fetch it again.")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{file}: is no whole JSON ({error}): fetch it again.") from error
    if not isinstance(parsed, dict):
        raise ConversionError(f"{file}: its JSON is not an object: fetch it again.")
    return parsed


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; a key that stands twice is an error.

    Raises:
        ConversionError: If there is no such file or it holds anything else.
    """
    check_regular(file)
    try:
        if file.stat().st_size > _JSON_LIMIT:
            raise ConversionError(f"{file}: is larger than {_JSON_LIMIT} bytes: fetch it again.")
        return _parse_json(file.read_bytes(), file)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """Reads one tensor, in its own dtype.

    Raises:
        ConversionError: If the file has shrunk since it was checked, cannot be read, or fails its
            checksum.
    """
    if tensor.strides is None:
        flat, at = np.empty(math.prod(tensor.shape), tensor.dtype), 0
        for piece in read_pieces(tensor):
            flat[at : at + piece.size] = piece
            at += piece.size
        return flat.reshape(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in steps)
    raw = replace(tensor, shape=(reach,), nbytes=reach * tensor.dtype.itemsize, strides=None)
    bytes_apart = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(read_tensor(raw), tensor.shape, bytes_apart)
    return np.ascontiguousarray(view)


def read_pieces(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Reads one tensor, in its own dtype, as flat pieces in row-major order.

    Each piece is gone when the next is asked for: they share their memory.

    Raises:
        ConversionError: See `read_tensor`.
    """
    if tensor.parts:
        for part in tensor.parts:
            yield from read_pieces(part)
        return
    if tensor.strides is not None:
        yield read_tensor(tensor).reshape(-1)
        return
    buffer = np.empty(min(_PIECE_BYTES, tensor.nbytes), np.uint8)
    crc32 = 0
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.start)
            for at in range(0, tensor.nbytes, _PIECE_BYTES):
                piece = buffer[: tensor.nbytes - at]
                filled = 0
                while filled < piece.nbytes:
                    if not (count := stream.readinto(piece[filled:].data)):
                        raise ConversionError(f"{tensor.file}: was cut off while it was read.")
                    filled += count
                if tensor.crc32 is not None:
                    crc32 = zlib.crc32(piece.data, crc32)
                yield piece.view(tensor.dtype)
    except OSError as error:
        raise ConversionError(f"{tensor.file}: cannot be read: {error.strerror}.") from error
    if tensor.crc32 is not None and crc32 != tensor.crc32:
        raise ConversionError(
            f"{tensor.file}: {tensor.name} fails its checksum, the file is damaged: fetch it again."
        )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array in row-major order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite: by the bits, many times faster than np.isfinite.

    Of integers, none is.
    """
    infinity = _INFINITY.get(array.dtype)
    if infinity is None:
        return 0
    width = array.dtype.itemsize
    unsigned, signed = np.dtype(f"u{width}"), np.dtype(f"i{width}")
    minus_infinity = infinity | 1 << (8 * width - 1)
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    count = 0
    for at in range(0, bits.size, _PIECE_BYTES // width):  # bounds the memory
        piece = bits[at : at + _PIECE_BYTES // width]
        # As signed numbers those with a plus are the largest, as unsigned those with a minus.
        if piece.view(signed).max() >= infinity or piece.max() >= minus_infinity:
            exponent = unsigned.type(infinity)
            count += int(np.count_nonzero((piece & exponent) == exponent))
    return count
