"""Progress of long work, and its early end."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # of (bytes done, bytes in all, what is being done)
Advance = Callable[[int, str], None]  # of (bytes just done, what is being done)


class Terminated(KeyboardInterrupt):
    """The process was told to end. A conversion keeps finished components for the next run."""


def count_bytes(total: int, progress: Progress | None) -> Advance:
    """Make a function that adds up bytes and calls `progress`."""
    done = 0

    def advance(nbytes: int, what: str) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, what)

    return advance
