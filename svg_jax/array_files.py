"""Arrays of .npy and .npz files, whose headers are believed only as far as the files go.

A header is read and judged by itself: what it claims is neither allocated nor read before it fits
the argument and the file.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Shaped

from svg_jax.convert.files import open_regular

_MOST_BYTES = 2**28  # of one array; HunyuanVideo's noise of 129 frames in 720p has 30 MB
_MOST_SHOWN = 5
_ZIP = b"PK"


@dataclass(frozen=True)
class _Rule:
    """What an argument's array may be.

    Attributes:
        axes: Their names.
        kinds: NumPy's letters of the dtypes that it may have, and how they are called.
    """

    axes: tuple[str, ...]
    kinds: Mapping[str, str]


_FLOATS = {"f": "floating point"}
_LATENTS = _Rule(("batch", "channels or frames", "frames or channels", "height", "width"), _FLOATS)
_FEATURES = _Rule(("batch", "tokens", "features"), _FLOATS)
_POOLED = _Rule(("batch", "features"), _FLOATS)
_MASK = _Rule(("batch", "tokens"), {"b": "bool", "i": "integers", "u": "integers", **_FLOATS})
_RULES = {
    "latents": _LATENTS,
    "image_latents": _LATENTS,
    "prompt_embeds": _FEATURES,
    "negative_prompt_embeds": _FEATURES,
    "pooled_prompt_embeds": _POOLED,
    "negative_pooled_prompt_embeds": _POOLED,
    "prompt_attention_mask": _MASK,
    "negative_prompt_attention_mask": _MASK,
}
_WITH_PROMPT_EMBEDS = [name for name in _RULES if "prompt" in name]


def read_arrays(files: Mapping[str, Path | None]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read arrays from .npy and .npz files.

    An .npz may hold one array of any name, or the argument's; with prompt_embeds also those that go
    with them.

    Args:
        files: Files by the name of the argument that each is for; None is left out.

    Returns:
        Arrays by the names of their arguments.

    Raises:
        ValueError: If a file is damaged or no such file, or its array is none that the argument
            takes; names the file.
        OSError: If a file is not there, or cannot be read.
    """
    arrays = {}
    for name, path in files.items():
        if path is None:
            continue
        with open_regular(path) as file:
            try:
                arrays |= _read_file(file, name)
            except _ArrayError as error:
                raise ValueError(f"{path} {error}") from error
            except OSError as error:
                if error.errno is not None:  # the disk's; damage has none
                    raise
                raise ValueError(_no_arrays(path, error)) from error
            except Exception as error:  # what damaged archives and headers raise is no one thing
                raise ValueError(_no_arrays(path, error)) from error
    return arrays


class _ArrayError(Exception):
    """What is wrong with a file, as a sentence that lacks its subject."""


def _read_file(file: BufferedReader, name: str) -> dict[str, np.ndarray]:
    size = os.fstat(file.fileno()).st_size
    is_zip = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    if not is_zip:
        return {name: _read_array(file, size, name)}
    with zipfile.ZipFile(file) as archive:
        members = {
            member.filename.removesuffix(".npy"): member
            for member in archive.infolist()
            if not member.is_dir()
        }
        if name not in members and len(members) != 1:
            shown = ", ".join(_printable(member) for member in list(members)[:_MOST_SHOWN])
            more = ", ..." if len(members) > _MOST_SHOWN else ""
            raise _ArrayError(f"has no array {name}: it has {shown or 'none'}{more}")
        found = name if name in members else next(iter(members))
        if found != name and found in _WITH_PROMPT_EMBEDS:
            raise _ArrayError(f"has no array {name}: it has {found}, which is another argument's")
        wanted = {name: members[found]}
        if name == "prompt_embeds":
            wanted |= {other: members[other] for other in _WITH_PROMPT_EMBEDS if other in members}
        arrays = {}
        for other, member in wanted.items():
            with archive.open(member) as content:
                arrays[other] = _read_array(content, member.file_size, other)
        return arrays


def _read_array(file: BufferedIOBase | IO[bytes], size: int, name: str) -> np.ndarray:
    """One array of an .npy file, or of a part of an archive, that has so many bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _ArrayError(f"is in version {version[0]}.{version[1]} of the format .npy")
    read = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        read = np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        shape, in_columns, dtype = read(file)
    _check_header(name, shape, dtype)
    count = math.prod(shape)
    needed, there = count * dtype.itemsize, size - file.tell()
    if needed != there:
        raise _ArrayError(
            f"is cut off or damaged: {name} of the shape {_shown(shape)} has {needed:,} bytes, and "
            f"there are {there:,}"
        )
    if needed > _MOST_BYTES:
        raise _ArrayError(
            f"is too large: {name} of the shape {_shown(shape)} has {needed:,} bytes, over "
            f"{_MOST_BYTES:,}"
        )
    content = file.read(needed)
    if len(content) != needed or file.read(1):
        raise _ArrayError("is cut off or damaged: it does not hold as much as it says")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")
    array = np.ascontiguousarray(array, dtype.newbyteorder("="))
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise _ArrayError(f"holds {name} with values that are not finite")
    return array


def _check_header(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    rule = _RULES[name]
    if dtype.kind not in rule.kinds:
        kinds = " or ".join(dict.fromkeys(rule.kinds.values()))
        hint = "; NumPy knows no bfloat16: save it as float32" if dtype.str == "|V2" else ""
        raise _ArrayError(f"must hold {name} in {kinds}: got {str(dtype)[:40]}{hint}")
    if len(shape) != len(rule.axes) or min(shape) < 1:
        axes = ", ".join(rule.axes)
        raise _ArrayError(f"must hold {name} [{axes}]: got the shape {_shown(shape)}")


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 6 else f"of {len(shape)} axes"


def _no_arrays(path: Path, error: Exception) -> str:
    reason = _printable(str(error)) or type(error).__name__
    return f"{path} is no .npy or .npz file, or damaged: {reason}"


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")[:80]
