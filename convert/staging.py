"""A folder that appears whole or not at all.

Everything is written to a hidden sibling of the destination, `.NAME.partial-…`, and renamed at the
end. A run that is killed leaves only that sibling; the next run for the same destination removes
it. A lock on it, which the kernel drops with the process, tells a dead run's from that of one
still at work.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from svg_jax.convert.rules import ConversionError

try:
    import fcntl
except ImportError:  # Windows: a dead run's folder cannot be told, and is left
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
        ConversionError: If the destination is there already, lies in the source or around it, or
            the disk has too little room.
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
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise ConversionError(
            f"{destination}: needs {nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
            "free: make room, or choose another disk."
        )


@contextlib.contextmanager
def staged_folder(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `destination` if the block ends without an error.

    Args:
        destination: The folder to be made.
        overwrite: Whether to replace a folder that is there by then.

    Raises:
        ConversionError: If the system refuses to write there: no room, no right, a read-only disk.
    """
    destination = destination.absolute()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        staging, lock = _make_staging(destination)
    except FileExistsError as error:
        raise ConversionError(f"{error.filename}: is no folder: choose another place.") from error
    except OSError as error:
        raise _cannot_write(destination, error) from error
    try:
        yield staging
        _sync(staging)
        _put_in_place(staging, destination, overwrite)
    except OSError as error:
        raise _cannot_write(destination, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _cannot_write(destination: Path, error: OSError) -> ConversionError:
    return ConversionError(
        f"{destination}: cannot be written ({error.strerror or error}): nothing was left there; "
        "make room or choose another folder."
    )


def _make_staging(destination: Path) -> tuple[Path, int | None]:
    while True:
        staging = destination.with_name(f".{destination.name}.partial-{secrets.token_hex(4)}")
        staging.mkdir()
        if fcntl is None:
            return staging, None
        lock = os.open(staging, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if staging.is_dir():  # else another run took it for a leftover before it was locked
            return staging, lock
        os.close(lock)


def _remove_leftovers(destination: Path) -> None:
    if fcntl is None:
        return
    prefix = f".{destination.name}."
    for leftover in list(destination.parent.iterdir()):
        if leftover.name.startswith(prefix + "partial-"):
            with contextlib.suppress(OSError):  # locked: another run is at work
                lock = os.open(leftover, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(leftover)
                finally:
                    os.close(lock)
        elif leftover.name.startswith(prefix + "replaced-") and destination.exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Brings every file to the disk, so that a power cut after the rename finds them whole."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(staging: Path, destination: Path, overwrite: bool) -> None:
    replaced = destination.with_name(f".{destination.name}.replaced-{secrets.token_hex(4)}")
    if overwrite and destination.exists():
        destination.rename(replaced)
    staging.rename(destination)  # refuses a folder that another run has put there
    shutil.rmtree(replaced, ignore_errors=True)
