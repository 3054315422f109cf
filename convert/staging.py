"""A folder that appears whole or not at all.

Everything is written to a hidden sibling of the destination, `.NAME.partial`, and renamed at the
end. A run that is killed leaves only that sibling; the next run for the same destination takes it
over. A lock on it, which the kernel drops with the process, keeps a second run out.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from svg_jax.convert.rules import ConversionError, RefusedError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None

# What marks a folder as a checkpoint, so that `overwrite` cannot remove anything else.
MARKS = ("manifest.json", "model_index.json")


def check_destination(destination: Path, source: Path, nbytes: int, overwrite: bool) -> None:
    """Refuses a destination before anything is written.

    Args:
        destination: The folder to be made.
        source: The folder that is read.
        nbytes: How much will be written.
        overwrite: Whether a checkpoint that is there may be replaced.

    Raises:
        ConversionError: If the destination is there already, or lies in the source or around it.
        RefusedError: If the disk has too little room.
    """
    here, there = destination.resolve(), source.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ConversionError(
            f"{destination}: lies inside the source, {source}, or around it: choose another folder."
        )
    if os.path.lexists(destination):
        if not overwrite:
            raise ConversionError(
                f"{destination}: is there already: remove it, choose another, or ask to overwrite."
            )
        if not any((destination / mark).is_file() for mark in MARKS) or destination.is_symlink():
            raise ConversionError(
                f"{destination}: is no checkpoint folder, so it is not overwritten: remove it "
                "yourself."
            )
    existing = next(folder for folder in here.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free + _size_of(_partial(destination.absolute()))
    if free < nbytes:
        raise RefusedError(
            f"{destination}: needs {nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
            "free: make room, or choose another disk."
        )


def _partial(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial")


def _size_of(folder: Path) -> int:
    """Bytes in a folder that another process may be changing."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size


@contextlib.contextmanager
def staged_folder(
    destination: Path, *, overwrite: bool = False, take_over: bool = False
) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `destination` if the block ends without an error.

    Args:
        destination: The folder to be made.
        overwrite: Whether to replace a folder that is there by then.
        take_over: Whether to leave in it what a run that was killed had written; otherwise it is
            empty.

    Raises:
        ConversionError: If the destination's parent is no folder.
        RefusedError: If the system refuses to write there: no room, no right, a read-only disk; or
            another run is writing the same folder.
    """
    destination = destination.absolute()
    staging = _partial(destination)
    replaced = destination.with_name(f".{destination.name}.replaced")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_folder(staging, destination)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConversionError(f"{error.filename}: is no folder: choose another place.") from error
    except OSError as error:
        raise _cannot_write(destination, error) from error
    try:
        if destination.exists():
            if not overwrite:
                raise ConversionError(f"{destination}: another run has put a folder there.")
            shutil.rmtree(replaced, ignore_errors=True)
        if not take_over:
            clear(staging)
        yield staging
        _sync(staging)
        _put_in_place(staging, destination, replaced, overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(destination, error) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Empties a folder but for the entries named `keep`."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _cannot_write(destination: Path, error: OSError) -> RefusedError:
    return RefusedError(
        f"{destination}: cannot be written ({error.strerror or error}): nothing was left there; "
        "make room or choose another folder."
    )


def _lock_folder(staging: Path, destination: Path) -> int | None:
    while True:
        staging.mkdir(exist_ok=True)
        if fcntl is None:
            return None
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else another run ended, and moved or removed it, before it was locked.
            if os.path.samestat(os.fstat(lock), os.stat(staging)):
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise RefusedError(
                f"{destination}: another run is writing this folder: wait for it, or choose "
                "another place."
            ) from error
        except FileNotFoundError:
            pass
        os.close(lock)


def _sync(folder: Path) -> None:
    """Brings every file to the disk, so that a power cut after the rename finds them whole."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(staging: Path, destination: Path, replaced: Path, overwrite: bool) -> None:
    if overwrite and destination.exists():
        destination.rename(replaced)
    staging.rename(destination)  # refuses a folder that somebody else has put there
    shutil.rmtree(replaced, ignore_errors=True)
