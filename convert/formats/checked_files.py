"""Which files may be opened, and whether they changed since."""

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from svg_jax.convert.errors import ConversionError

FileState = tuple[int, int, int]


def file_state(file: Path) -> FileState:
    """Take a file's inode, size and time of change, of which a write or a replacement changes one.

    Links are followed.
    """
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def find_changed(states: Mapping[Path, FileState]) -> Path | None:
    """Find a file that was written to, replaced or removed since its state was taken."""
    for file, state in states.items():
        if not file.exists() or file_state(file) != state:
            return file
    return None


def check_inside(file: Path, roots: Iterable[Path], *, named_by: Path | None = None) -> None:
    """Refuse a file that is not in one of the folders `roots`; links are followed.

    Args:
        file: File that is to be opened.
        roots: Folders that it may be in.
        named_by: File that contains its name, if one does, for errors.

    Raises:
        ConversionError: If it is in none.
    """
    target = Path(os.path.realpath(file))  # unlike resolve, it takes a link to itself
    if not any(target.is_relative_to(root.resolve()) for root in roots):
        raise ConversionError(
            f"{f'{named_by}: ' if named_by else ''}{file} leads out of the checkpoint's folder, to "
            f"{target}: copy the file into it."
        )


def check_regular(file: Path) -> None:
    """Refuse what is neither a file nor a link to one: opening a pipe could wait for ever.

    Raises:
        ConversionError: If it is neither, or does not exist.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        what = "is a link to nothing" if file.is_symlink() else "cannot be read"
        raise ConversionError(
            f"{file}: {what} ({error.strerror}): check the path, or fetch it again."
        ) from error
    if not regular:
        raise ConversionError(f"{file}: is no file but a folder, a pipe or a device: remove it.")
