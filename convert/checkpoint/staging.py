"""Write a folder that appears whole or not at all.

Everything is written to a hidden sibling of the destination, `.NAME.partial`. At the end it is
renamed, or exchanged with the folder that it overwrites, so that one of the two is always there. A
lock on `.NAME.partial.lock`, which the system releases with the process, keeps other runs out. A
killed run leaves only these two, and the next run for the same destination takes them over.
"""

import contextlib
import ctypes
import errno
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from svg_jax.convert.errors import ConversionError, RefusedError
from svg_jax.convert.formats.show import show_some
from svg_jax.convert.progress import Terminated

_LOGGER = logging.getLogger(__name__)
# Files that mark a folder as a checkpoint: `overwrite` removes no other folders.
MARKS = ("manifest.json", "model_index.json")
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def check_destination(destination: Path, source: Path, nbytes: int, overwrite: bool) -> None:
    """Refuse a destination before anything is written.

    Args:
        destination: Folder to write, by `real_place`.
        source: Folder or file to read.
        nbytes: Number of bytes to write.
        overwrite: Whether a checkpoint at the destination may be replaced.

    Raises:
        ConversionError: If the destination exists and may not be replaced, or one of destination
            and source lies inside the other.
        RefusedError: If the disk has too little room.
    """
    here, there = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ConversionError(
            f"{destination}: lies inside the source, {source}, or around it: choose another folder."
        )
    if os.path.lexists(destination):
        if not overwrite:
            raise ConversionError(
                f"{destination}: is there already: remove it, choose another destination, or "
                "pass overwrite=True."
            )
        if not any((destination / mark).is_file() for mark in MARKS) or destination.is_symlink():
            raise ConversionError(
                f"{destination}: is no checkpoint folder, so it is not overwritten: remove it "
                "yourself."
            )
    existing = next(folder for folder in here.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free + _size_of(partial_folder(destination))[1]
    if free < nbytes:
        raise RefusedError(
            f"{destination}: needs {nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
            "free: make room, or choose another disk."
        )


def partial_folder(destination: Path) -> Path:
    """Return the folder in which a destination is written until it is complete."""
    return destination.with_name(f".{destination.name}.partial")


def replaced_folder(destination: Path) -> Path:
    """Return the folder to which an old destination is moved before it is removed."""
    return destination.with_name(f".{destination.name}.replaced")


def describe(folder: Path) -> str:
    """Summarise a folder that is to be deleted: its size, number of files and first entries."""
    files, nbytes = _size_of(folder)
    named = show_some(sorted(path.name for path in folder.iterdir()), 8, 40)
    return f"{folder} ({nbytes / 1e9:.2f} GB in {files} files: {named})"


def _size_of(folder: Path) -> tuple[int, int]:
    """Count the files and bytes of a folder that another process may be changing."""
    files = size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                files, size = files + 1, size + path.lstat().st_size
    return files, size


@contextlib.contextmanager
def staged_folder(
    destination: Path, *, overwrite: bool = False, take_over: bool = False
) -> Iterator[Path]:
    """Give a folder to write into, which becomes `destination` if the block ends without an error.

    Args:
        destination: Folder to write, by `real_place`.
        overwrite: Whether to replace a folder that is there at the end.
        take_over: Whether to begin with what an ended run has written, and to keep it if this run
            is ended, too (`Terminated`); otherwise the folder is empty, and removed after an error.

    Raises:
        ConversionError: If the destination's parent is no folder.
        RefusedError: If the system refuses to write there, or another run is writing the folder.
    """
    staging, replaced = partial_folder(destination), replaced_folder(destination)
    with contextlib.ExitStack() as held:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(destination))
            staging.mkdir(exist_ok=True)
            if staging.is_symlink():  # its target must not be cleared
                raise NotADirectoryError(errno.ENOTDIR, "is a link", str(staging))
        except (FileExistsError, NotADirectoryError) as error:
            raise ConversionError(
                f"{error.filename}: is no folder: choose another place."
            ) from error
        except OSError as error:
            raise _cannot_write(destination, error) from error
        keeps = take_over
        try:
            if destination.exists():
                if not overwrite:
                    raise ConversionError(f"{destination}: another run has put a folder there.")
                _LOGGER.info("will delete %s when the new one is whole", describe(destination))
                _remove(replaced)
            if not take_over:
                clear(staging)
            yield staging
            _sync(staging)
            if not (overwrite and destination.exists()):
                staging.rename(destination)  # fails if another process has put a folder there
            else:
                keeps = False  # from here on, `staging` may be the old folder
                _replace(destination, staging, replaced)
            _remove(replaced)
        except BaseException as error:
            if not (keeps and isinstance(error, Terminated)):
                shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                staging.rmdir()  # if it is empty, since nothing was finished
            if isinstance(error, OSError):
                raise _cannot_write(destination, error) from error
            raise


@contextlib.contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Keep out other runs that would write the same folder."""
    # Not .NAME.lock, which a caller may hold, as the cache does.
    lock = FileLock(destination.with_name(f"{partial_folder(destination).name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RefusedError(
            f"{destination}: another run is writing this folder: wait for it, or choose another "
            "place."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot remove an open file
            os.unlink(lock.lock_file)
        lock.release()


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Empty a folder except for the entries named `keep`."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _cannot_write(destination: Path, error: OSError) -> RefusedError:
    return RefusedError(
        f"{destination}: cannot be written ({error.strerror or error}): nothing was changed "
        "there; make room or choose another folder."
    )


def _sync(folder: Path) -> None:
    """Sync every file to the disk, so that a power cut after the rename leaves them whole."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _replace(destination: Path, new: Path, replaced: Path) -> None:
    """Put a folder in the place of an old one, which is moved to `replaced`.

    Where the system cannot exchange two names, there is a moment without a folder at `destination`.
    A run that is killed then leaves both, and `standing_folder` finds the old one.
    """
    if _exchange(new, destination):
        new.rename(replaced)
    else:
        destination.rename(replaced)
        new.rename(destination)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove(replaced: Path) -> None:
    """Remove an old folder, its marks first, so that no half of it is taken for a whole one."""
    for mark in MARKS:
        with contextlib.suppress(OSError):
            (replaced / mark).unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def standing_folder(folder: Path) -> Path:
    """Return a folder, or its old version if a run was killed in `_replace`."""
    old = replaced_folder(folder)
    return old if not os.path.lexists(folder) and (old / MARKS[0]).is_file() else folder
