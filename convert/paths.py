"""Check and normalise paths from callers, once: code below takes them as they are."""

import os
from pathlib import Path

from svg_jax.convert.errors import ConversionError

_LONGEST = 4000  # characters; Linux takes 4096 bytes
_LONGEST_NAME = 255  # bytes, of each part


def usable_path(path: str | os.PathLike[str]) -> Path:
    """Check a path and replace `~` by the home folder.

    Raises:
        ConversionError: If it is empty, too long, or not encoded as UTF-8, which tensorstore needs.
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
    except RuntimeError:  # no such user: "~name" is an ordinary name
        return Path(text)


def name_of(path: Path) -> str:
    """Name a folder or file; a link to a file has a better name than its target, perhaps a hash."""
    return path.resolve().name if path.is_dir() else path.absolute().name


def real_path(path: str | os.PathLike[str]) -> Path:
    """Check a path (see `usable_path`), make it absolute, and resolve links and `..` in it."""
    return Path(os.path.realpath(usable_path(path)))


def real_place(path: str | os.PathLike[str]) -> Path:
    """Make a path absolute like `real_path`, but do not follow it if it is a link itself."""
    named = usable_path(path)
    return real_path(named) if named.name in ("", "..") else real_path(named.parent) / named.name
