"""Untrusted JSON, read in linear time and bounded memory.

The standard reader keeps the last of two equal keys, accepts NaN, reads 1e400 as infinity, and
makes text of half a character (a lone surrogate) that cannot be printed. Here these are refused.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from svg_jax.convert.errors import ConversionError
from svg_jax.convert.formats.checked_files import check_regular
from svg_jax.convert.formats.show import show

# Bytes. A byte can become 24 in memory; the largest index of a released model has 100 kB.
JSON_LIMIT = 16 * 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class JsonFile:
    """A file that holds a JSON object.

    Attributes:
        path: Path of the file.
        content: Bytes of the file, in UTF-8.
        values: Entries of the object.
    """

    path: Path
    content: bytes
    values: dict[str, Any]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConversionError: If the file does not exist or holds anything else; see `parse_json`.
    """
    return read_json_file(file).values


def read_json_file(file: Path) -> JsonFile:
    """Read a JSON object from a file, and its bytes; see `read_json`."""
    check_regular(file)
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise ConversionError(f"{file}: is larger than {JSON_LIMIT} bytes: fetch it again.")
        content = file.read_bytes()
        return JsonFile(file, content, parse_json(content, file))
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}.") from error


def read_json_if_any(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; an empty one if the file does not exist.

    Raises:
        ConversionError: If something of that name exists and `read_json` refuses it.
    """
    return read_json(file) if os.path.lexists(file) else {}


def parse_json(text: bytes, where: Path | str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        text: Text of the object, in UTF-8.
        where: File that it is from, for errors.

    Raises:
        ConversionError: If it is no complete object, has a key twice, or holds a number that is NaN
            or infinite, or text that is not Unicode.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ConversionError(
                    f"{where}: the key '{show(name)}' occurs twice: fetch it again."
                )
            found[name] = value
        return found

    try:
        parsed = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
        if _SURROGATE.search(text.decode("utf-8")):  # a pair of them is one character
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except ConversionError:
        raise
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it nests too deeply" if deep else show(str(error))
        raise ConversionError(f"{where}: is no whole JSON ({reason}): fetch it again.") from error
    if not isinstance(parsed, dict):
        raise ConversionError(f"{where}: its JSON is not an object: fetch it again.")
    return parsed


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{show(text, 20)} is too large for a number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
