"""What the command line shows: sentences, tables, and how far steps and bytes have come.

Nothing that is shown can end a command or harm a terminal: control characters are escaped, what the
terminal's encoding lacks is escaped, and what cannot be written (a full disk, a reader that left)
is dropped.
"""

import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

LONGEST_SENTENCE = 500  # characters, with the program's name
_LONGEST_WAIT = 60.0  # seconds from one line about steps to the next
_NAME = "svg-jax: "


class ForgivingStream:
    """A text stream that drops what it cannot write.

    Attributes:
        error: Why something was dropped; None if nothing was, or if its reader left (`| head`).
    """

    def __init__(self, stream: Any):
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with self._forgiven():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what was held back, or drop it."""
        with self._forgiven():
            self._stream.flush()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.error = self.error or error
            # What is held back would fail again when the interpreter ends.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Let no message end the program for as long as the block lasts."""
    _open_standard_files()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # for streams that the shell closed
        streams = [stream or nowhere for stream in before]
        policies = [_escaping(stream, "backslashreplace") for stream in streams]
        sys.stdout, sys.stderr = map(ForgivingStream, streams)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for stream, policy in zip(streams, policies, strict=True):
                _escaping(stream, policy)


def _escaping(stream: Any, policy: str | None) -> str | None:
    """Set what becomes of what a stream's encoding lacks, and give back what was set before."""
    before = getattr(stream, "errors", None)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=policy)
    return before


def _open_standard_files() -> None:
    """Open those that the shell closed: the next file would take their place, and get messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def printable(text: str) -> str:
    r"""Show a text in one line: each control character, lone surrogate and line break escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def say(text: str) -> None:
    """Print a line of a command's outcome."""
    print(printable(text), flush=True)


def tell(text: str) -> None:
    """Print a sentence on standard error: a warning, or why a command ends."""
    line = _NAME + printable(" ".join(text.split()))
    print(shortened(line, LONGEST_SENTENCE), file=sys.stderr, flush=True)


def tell_lines(lines: Iterable[str]) -> None:
    """Print a traceback on standard error, whole."""
    for line in "".join(lines).splitlines():
        print(printable(line), file=sys.stderr)


def shortened(text: str, length: int) -> str:
    """Cut a text to so many characters: of a longer one the beginning and the end are left."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 3]} … {text[-end:]}"


def print_parts(*parts: Any) -> None:
    """Print tables and lines."""
    # As wide as a table needs to be where no terminal would break the lines. What looks like
    # markup is text: names and prompts may hold [brackets].
    width = None if sys.stdout.isatty() else 10_000
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    for part in parts:
        is_line = isinstance(part, str)
        console.print(printable(part) if is_line else part, soft_wrap=is_line)


def add_row(table: Table, *cells: str) -> None:
    """Add a row to a table, as printable text."""
    table.add_row(*map(printable, cells))


def check_printed() -> None:
    """Raise OSError if standard output did not take all: for commands whose outcome it is."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is not None:
        raise OSError(error.errno, error.strerror, "standard output")


@contextmanager
def _bar(*columns: Any) -> Iterator[Progress]:
    """Show a progress bar on the terminal; nothing where there is none."""
    console = Console(stderr=True)
    text = TextColumn("{task.description:10}", markup=False)
    bar, elapsed = BarColumn(), TimeElapsedColumn()
    hidden = not console.is_terminal
    with Progress(text, bar, *columns, elapsed, console=console, disable=hidden) as progress:
        yield progress


@contextmanager
def steps_bar(total: int) -> Iterator[Any]:
    """Show denoising steps: as a bar on a terminal, elsewhere as a line now and then.

    Args:
        total: Steps of all runs together.

    Yields:
        What is called after each step, with what it was.
    """
    with _bar(MofNCompleteColumn()) as progress:
        task = progress.add_task("compiling", total=total)
        start = last = time.monotonic()
        done, wait = 0, 5.0

        def advance(what: str) -> None:
            nonlocal done, last, wait
            done += 1
            progress.update(task, advance=1, description=what)
            now = time.monotonic()
            if progress.disable and done < total and now - last >= wait:
                say(f"{what}: step {done} of {total}, {now - start:.0f} s")
                last, wait = now, min(2 * wait, _LONGEST_WAIT)

        yield advance


@contextmanager
def bytes_bar(*, visible: bool = True) -> Iterator[Any]:
    """Show bytes as a bar; if it is not visible, it comes with the first of them."""
    with _bar(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task("checking", total=None, visible=visible)
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=printable(what), visible=True
        )
