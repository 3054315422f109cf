"""Digests of files: of one that is there, and of those that are being written."""

import contextlib
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


def file_digest(file: Path) -> str:
    """sha256 of a file, in little memory."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class WrittenDigests:
    """Digests of the files of a checkpoint, taken by a thread while they still lie in memory.

    Read again when all is written, files larger than the memory would come from the disk.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet.

        Args:
            folder: The checkpoint. It may have a longer name until it is whole.
        """
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._taken: dict[tuple[int, int, int], Future[str]] = {}

    def take(self) -> None:
        """Begins with what was written since the last call."""
        for file in self._folder.parent.glob(f"{self._folder.name}*/**/d/*"):
            with contextlib.suppress(FileNotFoundError):
                if (state := _state(file)) not in self._taken:
                    self._taken[state] = self._pool.submit(file_digest, file)

    def result(self) -> dict[str, str]:
        """The digests of all files, now that no more are written, by path in the folder."""
        digests = {}
        for file in sorted(self._folder.rglob("*")):
            if file.is_dir():
                continue
            name = file.relative_to(self._folder).as_posix()
            taken = self._taken.get(_state(file))
            if taken is None or taken.exception() is not None:  # renamed before its turn came
                digests[name] = file_digest(file)
            else:
                digests[name] = taken.result()
        return digests

    def close(self) -> None:
        """Drops what was not begun."""
        self._pool.shutdown(cancel_futures=True)


def _state(file: Path) -> tuple[int, int, int]:
    """What a rename leaves as it is and a write does not."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
