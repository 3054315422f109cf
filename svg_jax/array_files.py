"""Arrays from .npy and .npz files, with headers that are checked before anything is allocated.

Nothing is read before the header fits the argument and the size of the file.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Shaped

from svg_jax.convert.files import open_regular
from svg_jax.convert.formats.show import show

_MOST_BYTES = 2**28  # of one array; HunyuanVideo's noise of 129 frames in 720p has 30 MB
_MOST_SHOWN = 5
_ZIP = b"PK"
_LATENTS = ("batch", "channels or frames", "frames or channels", "height", "width")
_AXES = {
    "latents": _LATENTS,
    "image_latents": _LATENTS,
    "prompt_embeds": ("batch", "tokens", "features"),
    "negative_prompt_embeds": ("batch", "tokens", "features"),
    "pooled_prompt_embeds": ("batch", "features"),
    "negative_pooled_prompt_embeds": ("batch", "features"),
    "prompt_attention_mask": ("batch", "tokens"),
    "negative_prompt_attention_mask": ("batch", "tokens"),
}
_WITH_PROMPT_EMBEDS = [name for name in _AXES if "prompt" in name]


def read_arrays(files: Mapping[str, Path | None]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read arrays from .npy and .npz files.

    An .npz may hold one array of any name, or several, one of which has the argument's name. One
    for prompt_embeds may also hold the other prompts' arrays and masks.

    Args:
        files: Files by the names of the arguments that they are for; None is skipped.

    Returns:
        The arrays by the names of their arguments.

    Raises:
        ValueError: If a file is damaged or of another kind, or the argument does not take its
            array; names the file.
        OSError: If a file does not exist or cannot be read.
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
            except Exception as error:  # damaged archives and headers raise many kinds
                if isinstance(error, OSError) and error.errno is not None:  # the disk's
                    raise
                reason = show(str(error)) or type(error).__name__
                raise ValueError(f"{path} is no .npy or .npz file, or damaged: {reason}") from error
    return arrays


class _ArrayError(Exception):
    """A sentence about what is wrong with a file, without the file's name at its start."""


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
            shown = ", ".join(show(member) for member in list(members)[:_MOST_SHOWN])
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
    """Read the array `name` from an .npy file, or a member of an archive, of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _ArrayError(f"is in version {version[0]}.{version[1]} of the format .npy")
    of_one, of_two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers that Python 2 wrote
        shape, in_columns, dtype = (of_one if version == (1, 0) else of_two)(file)
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
    is_mask = name.endswith("mask")
    if dtype.kind not in ("fbiu" if is_mask else "f"):
        kinds = "bool or integers or floating point" if is_mask else "floating point"
        hint = "; NumPy knows no bfloat16: save it as float32" if dtype.str == "|V2" else ""
        raise _ArrayError(f"must hold {name} in {kinds}: got {str(dtype)[:40]}{hint}")
    if len(shape) != len(_AXES[name]) or min(shape) < 1:
        axes = ", ".join(_AXES[name])
        raise _ArrayError(f"must hold {name} [{axes}]: got the shape {_shown(shape)}")


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 6 else f"of {len(shape)} axes"
