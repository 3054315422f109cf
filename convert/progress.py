"""How far long work has come, and what ends it early."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


class Terminated(KeyboardInterrupt):
    """The process is told to end: what a conversion has finished is kept for the next run."""


def count_bytes(total: int, progress: Progress | None) -> Callable[[int, str], None]:
    """Makes a function (bytes, what) that adds up the bytes and tells `progress`."""
    done = 0

    def advance(nbytes: int, what: str) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, what)

    return advance
