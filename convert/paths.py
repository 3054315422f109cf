"""Paths as callers give them, made whole once: below the result nothing is normalised again."""

import os
from pathlib import Path

from svg_jax.convert.errors import ConversionError

_LONGEST = 4000  # characters; Linux takes 4096 bytes
_LONGEST_NAME = 255  # bytes, of each part


def usable_path(path: str | os.PathLike[str]) -> Path:
    """Take a path as it is, but for `~`, which is the home.

    Raises:
        ConversionError: If it is empty, or its bytes are not those of its text in UTF-8, which is
            what tensorstore writes.
    """
    text = os.fspath(path)
    try:
        in_utf8 = os.fsencode(text) == text.encode("utf-8")
    except UnicodeEncodeError:
        in_utf8 = False
    if not in_utf8:
        raise ConversionError(
            f"{text!a:.300}: is no path in UTF-8: rename it, or set PYTHONUTF8=1 if the "
            "locale is not UTF-8."
        )
    if not text or "\0" in text:
        raise ConversionError(f"{text!r:.300}: is no path: give the name of a file or folder.")
    if len(text) > _LONGEST or max(map(len, text.encode().split(b"/"))) > _LONGEST_NAME:
        raise ConversionError(f"{text!a:.100}…: is too long for a path.")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user, so that it is a name like any other
        return Path(text)


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where a path leads: absolute, and without links and `..`, which mean what the kernel means.

    Raises:
        ConversionError: See `usable_path`.
    """
    return Path(os.path.realpath(usable_path(path)))


def real_place(path: str | os.PathLike[str]) -> Path:
    """Where something by this name is or will be: as `real_path`, but a link itself is the place.

    Raises:
        ConversionError: See `usable_path`.
    """
    named = usable_path(path)
    return real_path(named) if named.name in ("", "..") else real_path(named.parent) / named.name
