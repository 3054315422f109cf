"""How far long work has come."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


def count_bytes(total: int, progress: Progress | None) -> Callable[[int, str], None]:
    """Makes a function (bytes, what) that adds up the bytes and tells `progress`."""
    done = 0

    def advance(nbytes: int, what: str) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, what)

    return advance
