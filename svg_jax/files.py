"""Files that are there whole or not at all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` (same suffix) to write to, and renames it at the end.

    If the block fails or is interrupted, nothing is left and an older file stays as it was.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | Path) -> None:
    """FileNotFoundError if there is no folder to write a file into: before the work, not after."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: there is no folder {path.parent}")


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files of processes that were killed while they wrote `path`."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.stem)}\.(\d{{1,9}}){re.escape(path.suffix)}")
    for other in path.parent.iterdir():
        match = name.fullmatch(other.name)
        if match and not _is_running(int(match[1])):
            other.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is a real one
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
