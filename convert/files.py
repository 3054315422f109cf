"""Write files whole or not at all, and open only regular ones."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

_PROBE = bytes(4096)  # not empty, since even a full disk takes empty files


@contextmanager
def written_atomically(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, with its suffix, and rename it to `path` at the end.

    If the block fails or is interrupted, nothing is left, and an older file stays as it was.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If `path` is a folder.
        OSError: If it cannot be written; the error names `path`, not the temporary file.
    """
    path = Path(path)
    _check_place(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, which names no file
        if error.filename and temporary.name not in str(error.filename):
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Check before long work that a file can be written, by writing another one beside it.

    Raises:
        FileNotFoundError: If its folder does not exist.
        IsADirectoryError: If it is a folder itself.
        ValueError: If it is a device or a pipe, or no file can have its name.
        OSError: If the system refuses: permissions, a read-only or a full disk.
    """
    path = Path(path)
    try:
        _check_place(path)
        temporary = _temporary(path)
        try:
            with temporary.open("xb") as file:
                file.write(_PROBE)
        finally:
            temporary.unlink(missing_ok=True)
        _check_replaceable(path)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        name = os.fsencode(path.name)
        if len(name) > 200:
            raise ValueError(
                f"cannot write a file whose name has {len(name)} bytes: choose a shorter one than "
                f"{path.name[:40]}..."
            ) from error
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading: a pipe could block, and a device never end.

    Raises:
        ValueError: If it is a folder, a pipe or a device, or no file can have its name.
        OSError: If it does not exist or cannot be read.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a zero byte
        raise ValueError(f"{str(path)!r} is no name of a file") from error
    except OSError as error:
        # Sockets cannot be opened, and neither can devices without their hardware.
        with suppress(OSError):
            _check_regular(path, os.stat(path).st_mode)
        raise error
    try:
        _check_regular(path, os.fstat(number).st_mode)
    except ValueError:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files that were left by processes killed while they wrote `path`."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.stem)}\.(\d{{1,9}}){re.escape(path.suffix)}")
    for other in path.parent.iterdir():
        match = name.fullmatch(other.name)
        if match and not _is_running(int(match[1])):
            other.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def _check_place(path: Path) -> None:
    """Check that a path is no folder, device or pipe, and its parent is a folder."""
    if "\0" in str(path) or not path.name or path.name == "..":
        raise ValueError(f"{str(path)!r} is no name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: there is no folder {path.parent}")
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"cannot write {path}: there is a folder of that name")
        _check_regular(path, mode)


def _check_replaceable(path: Path) -> None:
    """Check the owners: in a folder such as /tmp, only a file's and the folder's may replace it."""
    folder = path.parent.stat()
    if not (folder.st_mode & stat.S_ISVTX and hasattr(os, "geteuid") and os.path.lexists(path)):
        return
    if os.geteuid() not in (0, folder.st_uid, path.lstat().st_uid):
        raise PermissionError(1, "another user's file is there", str(path))


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"{path} is no file but {what}")


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is a real one
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True
