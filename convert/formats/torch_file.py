"""Files of torch.save, read one tensor at a time, without torch and without running code.

The format: a zip archive, uncompressed, with one folder, in which `data.pkl` describes the object
and `data/0`, `data/1`, … hold the tensors' elements. Nothing in it is trusted: the archive is
checked member by member, the pickle is not run (see torch_pickle.py), and its tensors must fit the
members.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_regular
from svg_jax.convert.formats.show import show
from svg_jax.convert.formats.stored_tensor import StoredTensor, row_major
from svg_jax.convert.formats.torch_pickle import SIZE_LIMIT, Inert, StorageRef, TensorRef, unpickle
from svg_jax.convert.formats.wrappers import choose, words_of

_DEPTH = 3  # nested keys that may lead to weights, unless more are given
_DICTS_LIMIT = 1000  # dicts that are searched; one may contain itself
_NOTES = (bool, int, float, str, bytes)
# Keys of what trainers save of themselves beside tensors.
_BESIDE = frozenset(
    {
        *("optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "opt"),
        *("lr_scheduler", "lr_schedulers", "scheduler", "scheduler_state_dict", "scaler"),
        *("callbacks", "loops", "hyper_parameters", "hparams", "config", "rng_state", "rng_states"),
        *("grad_scaler", "dataloader", "metadata", "_metadata"),
        *("critic", "discriminator", "teacher", "fake_score", "real_score"),
    }
)
_DIRECTORY_LIMIT = 16 * 2**20  # bytes, about 200,000 members
_DAMAGE = (zipfile.BadZipFile, struct.error, EOFError)
_AGAIN = "fetch it again"

_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "torch.FloatStorage": np.float32,
        "torch.HalfStorage": np.float16,
        "torch.BFloat16Storage": ml_dtypes.bfloat16,
        "torch.DoubleStorage": np.float64,
        "torch.LongStorage": np.int64,
        "torch.IntStorage": np.int32,
        "torch.ShortStorage": np.int16,
        "torch.CharStorage": np.int8,
        "torch.ByteStorage": np.uint8,
        "torch.BoolStorage": np.bool_,
        "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "torch.float8_e5m2": ml_dtypes.float8_e5m2,
        "torch.uint16": np.uint16,
        "torch.uint32": np.uint32,
        "torch.uint64": np.uint64,
    }.items()
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")


@dataclass(frozen=True)
class _Member:
    """The place of a member's bytes in the archive, and their checksum if torch wrote one."""

    start: int
    nbytes: int
    crc32: int | None


def read_torch_file(file: Path) -> dict[str, StoredTensor]:
    """Find and check the tensors of a file of torch.save; `stored_tensor.read_tensor` reads each.

    The tensors are the values of the dict in the file, or of a dict in it that keys of
    `wrappers.WRAPPERS` lead to. Numbers, text and what trainers save of themselves are ignored.

    Args:
        file: File of torch.save.

    Raises:
        ConversionError: If the file is damaged or not written by torch.save; or the dict holds
            anything but tensors; or there are several dicts.
    """
    dicts = read_dicts(file)
    prefix = choose([f"{keys}." if keys else "" for keys in dicts], None, file)
    return dicts[prefix.removesuffix(".")]


def read_dicts(file: Path, weights_key: str | None = None) -> dict[str, dict[str, StoredTensor]]:
    """Find all dicts of tensors, by the keys that lead to them, "a.b"; see `read_torch_file`."""
    check_regular(file)
    try:
        with file.open("rb", buffering=0) as stream:
            _check_format(stream, file)
            members = _read_members(stream, file)
            root = _find_root(members, file)
            pickled = _read_member(stream, members[f"{root}/data.pkl"], file)
            _check_byte_order(stream, members.get(f"{root}/byteorder"), file)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error
    try:
        tree = unpickle(pickled)
    except ValueError as error:
        raise ConversionError(f"{file}: its pickle {error}: {_AGAIN}.") from error

    storages = {
        name.removeprefix(f"{root}/data/"): member
        for name, member in members.items()
        if name.startswith(f"{root}/data/")
    }
    found = _find_dicts(tree, file, weights_key)
    if not any(found.values()):
        raise ConversionError(
            f"{file}: holds {_kind(tree)} where a state dict is expected: save the model's "
            "state_dict()."
        )
    return {
        keys: {name: _locate(file, name, tensor, storages) for name, tensor in tensors.items()}
        for keys, tensors in found.items()
    }


def _check_format(stream: io.FileIO, file: Path) -> None:
    start = stream.read(512)
    if start.startswith(b"PK\x03\x04"):
        return
    if start.startswith(b"version "):
        what = "is a Git-LFS pointer, not the weights: run `git lfs pull` in that folder"
    elif start[257:262] == b"ustar" or b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19" in start[:16]:
        what = (
            "is in the format of PyTorch before 1.6, which is not read: load it with PyTorch where "
            "you trust it, and save it again"
        )
    elif start.startswith(b"\x80"):
        what = "is a bare pickle, which is not read: fetch the file that torch.save wrote"
    else:
        what = f"is no file of torch.save (no zip archive): {_AGAIN}"
    raise ConversionError(f"{file}: {what}.")


class _DirectoryReader(io.FileIO):
    """A file that refuses to read more at once than a zip directory may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


def _read_members(opened: io.FileIO, file: Path) -> dict[str, _Member]:
    """List the archive's members; none may be compressed, occur twice or overlap another."""
    try:
        with (
            _DirectoryReader(opened.fileno(), closefd=False) as stream,
            zipfile.ZipFile(stream) as archive,
        ):
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            directory_start = archive.start_dir
            spans = [_span(stream, entry, file) for entry in entries]
    except ConversionError:
        raise
    except (ValueError, OverflowError, NotImplementedError, *_DAMAGE) as error:
        raise ConversionError(
            f"{file}: is truncated or damaged as a zip archive ({error!s:.80}): {_AGAIN}."
        ) from error
    members = {}
    for entry, (_, start, _) in zip(entries, spans, strict=True):
        if entry.orig_filename in members:
            raise ConversionError(
                f"{file}: the member {entry.orig_filename!r:.80} occurs twice: {_AGAIN}."
            )
        members[entry.orig_filename] = _Member(start, entry.file_size, entry.CRC or None)
    for (_, _, end), (begin, _, _) in pairwise([*spans, (directory_start, 0, 0)]):
        if end > begin:
            raise ConversionError(f"{file}: members of the archive overlap: {_AGAIN}.")
    return members


def _span(stream: _DirectoryReader, entry: zipfile.ZipInfo, file: Path) -> tuple[int, int, int]:
    """Locate a member: the offsets of its header, its first byte and its end."""
    name = entry.orig_filename
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise ConversionError(f"{file}: the member {name!r:.80} leads out of the archive.")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ConversionError(
            f"{file}: the member {name!r:.80} is compressed ({entry.compress_size} bytes for "
            f"{entry.file_size}), which torch.save never does: {_AGAIN}."
        )
    if entry.flag_bits & 0x1:
        raise ConversionError(f"{file}: the member {name!r:.80} is encrypted: {_AGAIN}.")
    stream.seek(entry.header_offset)
    header = stream.read(30)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
    own_name = stream.read(name_length)
    encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or own_name != name.encode(encoding):
        raise zipfile.BadZipFile(f"no member at the offset of {name!r:.40}")
    start = entry.header_offset + len(header) + name_length + extra_length
    return entry.header_offset, start, start + entry.file_size


def _find_root(members: Mapping[str, _Member], file: Path) -> str:
    roots = [
        root for root, slash, rest in map(lambda n: n.partition("/"), members) if rest == "data.pkl"
    ]
    if len(roots) != 1:
        raise ConversionError(
            f"{file}: is a zip archive that torch.save did not write (it has {len(roots)} "
            f"data.pkl): {_AGAIN}."
        )
    (root,) = roots
    if f"{root}/constants.pkl" in members:
        raise ConversionError(
            f"{file}: is a TorchScript program, not weights: fetch the weights (a state dict)."
        )
    return root


def _read_member(stream: io.FileIO, member: _Member, file: Path) -> bytes:
    """Read the bytes of a small member."""
    if member.nbytes > SIZE_LIMIT:
        raise ConversionError(
            f"{file}: its data.pkl has {member.nbytes} bytes, of which {SIZE_LIMIT} are allowed: "
            "fetch the weights alone (a state dict)."
        )
    stream.seek(member.start)
    data = stream.read(member.nbytes)
    if member.crc32 is not None and zlib.crc32(data) != member.crc32:
        raise ConversionError(f"{file}: its data.pkl fails its checksum: {_AGAIN}.")
    return data


def _check_byte_order(stream: io.FileIO, member: _Member | None, file: Path) -> None:
    if member is None:  # PyTorch before 2.1 did not note it
        return
    order = _read_member(stream, member, file)
    if order != b"little":
        raise ConversionError(
            f"{file}: its byte order is {order!r:.20}, and only little-endian files are read: save "
            "it on a little-endian machine."
        )


def _find_dicts(tree: Any, file: Path, weights_key: str | None) -> dict[str, dict[str, TensorRef]]:
    """Find the dicts of tensors in an unpickled object, by the keys that lead to them."""
    words = words_of(weights_key)
    found: dict[str, dict[str, TensorRef]] = {}
    others: dict[str, dict[Any, Any]] = {}
    left: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    visited, depth = 0, max(_DEPTH, 1 + (weights_key or "").count("."))
    while left:
        keys, held = left.pop()
        if type(held) is not dict:
            continue
        if (visited := visited + 1) > _DICTS_LIMIT:
            raise ConversionError(f"{file}: nests more than {_DICTS_LIMIT} dicts: {_AGAIN}.")
        dicts = {key: of for key, of in held.items() if type(key) is str and type(of) is dict}
        below = {key: of for key, of in dicts.items() if key in words}
        others |= {
            ".".join((*keys, key)): of
            for key, of in dicts.items()
            if key not in words and key not in _BESIDE
        }
        if len(keys) < depth:
            left += [((*keys, key), of) for key, of in below.items()]
        tensors = {key: of for key, of in held.items() if type(of) is TensorRef}
        if below and not any(of.shape for of in tensors.values()):
            continue  # at most a counter
        if keys and not tensors:
            continue  # a config
        found[".".join(keys)] = tensors
        _check_beside(file, ".".join(keys), held, below)
    twins = [keys for keys, of in others.items() if any(map(partial(_is_twin, of), found.values()))]
    if twins:  # under unknown keys: the caller has to choose
        choose([f"{keys}." if keys else "" for keys in (*found, *twins)], weights_key, file)
    return found


def _is_twin(held: dict[Any, Any], weights: dict[str, TensorRef]) -> bool:
    """Tell whether a dict holds a second copy of the weights: more than half of their names."""
    return len(weights) > 0 and 2 * sum(name in held for name in weights) > len(weights)


def _check_beside(file: Path, where: str, held: dict[Any, Any], below: Collection[str]) -> None:
    """Refuse values among the tensors that may be a part of the model."""
    for name, value in held.items():
        if type(name) is not str or not name.isprintable():
            inside = f"{show(where)} " * bool(where)
            raise ConversionError(f"{file}: {inside}holds a key that is no name: {_AGAIN}.")
        if type(value) is TensorRef or name in below or name in _BESIDE:
            continue
        is_number = isinstance(value, Inert) and value.name.endswith(".multiarray.scalar")
        if value is None or is_number or type(value) in _NOTES or value in ({}, [], ()):
            continue
        advice = ", or give it as weights_key" if type(value) is dict else ""
        raise ConversionError(
            f"{file}: {f'{show(where)}: ' * bool(where)}{show(name)} is no tensor but "
            f"{_kind(value)}: save the model's state_dict(){advice}."
        )


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        return f"a '{show(value.name)}'"
    if type(value) is dict and not value:
        return "an empty dict"
    return f"a {'tensor' if type(value) is TensorRef else type(value).__name__!r}"


def _locate(
    file: Path, name: str, tensor: TensorRef, storages: Mapping[str, _Member]
) -> StoredTensor:
    """Locate a tensor in the file, and check that it lies in its storage."""
    where = f"{file}: {show(name)}"
    storage = tensor.storage
    dtype = _dtype(storage, tensor.dtype, where)
    member = storages.get(storage.key)
    if member is None:
        raise ConversionError(
            f"{where} has its elements in '{show(storage.key)}', which is missing: {_AGAIN}."
        )
    untyped = storage.kind in _UNTYPED
    if storage.size * (1 if untyped else dtype.itemsize) != member.nbytes:
        raise ConversionError(
            f"{where} says that its storage has {storage.size} elements, which has "
            f"{member.nbytes} bytes: {_AGAIN}."
        )
    count = math.prod(tensor.shape)
    nbytes = count * dtype.itemsize
    steps = list(zip(tensor.shape, tensor.strides, strict=True))
    reach = sum((size - 1) * stride for size, stride in steps) + 1 if count else 0
    if (tensor.offset + reach) * dtype.itemsize > member.nbytes:
        raise ConversionError(f"{where} reaches out of its storage: {_AGAIN}.")
    if nbytes > member.nbytes:
        raise ConversionError(
            f"{where} repeats the elements of its storage: save a contiguous tensor."
        )
    expected = zip(steps, row_major(tensor.shape), strict=True)
    contiguous = count == 0 or all(size == 1 or stride == step for (size, stride), step in expected)
    return StoredTensor(
        name,
        file,
        dtype,
        tensor.shape,
        member.start + tensor.offset * dtype.itemsize,
        nbytes,
        negative=tensor.negative,
        strides=None if contiguous else tensor.strides,
        crc32=member.crc32 if contiguous and nbytes == member.nbytes else None,
    )


def _dtype(storage: StorageRef, dtype: str | None, where: str) -> np.dtype:
    name = dtype or storage.kind
    if name not in _DTYPES:
        raise ConversionError(
            f"{where} is of '{show(name, 60)}', which is not read: save the model unquantised, in "
            "float32, float16 or bfloat16."
        )
    return _DTYPES[name]
